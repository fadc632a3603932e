"""Tile memory: what a tile may see of the others, one strategy a file."""

from latent_tiles.memory.base import ModelStep, TileMemory
from latent_tiles.memory.spec import build_memory

__all__ = ["ModelStep", "TileMemory", "build_memory"]
