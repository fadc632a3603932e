"""The reference model that comes with the library: its folder, checked before it is used."""

from latent_tiles.reference.folder import DESCRIPTION, reference_model

__all__ = ["DESCRIPTION", "reference_model"]
