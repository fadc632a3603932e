"""Model families: how one call of a denoiser is cut into tiles, one adapter a file."""

from latent_tiles.families.base import ModelCall, ModelCallFactory
from latent_tiles.families.registry import family_of, supported

__all__ = ["ModelCall", "ModelCallFactory", "family_of", "supported"]
