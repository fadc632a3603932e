"""Exact tiled autoencoders: any size in bounded memory, equal to one untiled pass."""
