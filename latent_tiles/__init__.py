"""Upscale and retouch photographs that no model fits, with any diffusers model and a memory between tiles.

Public names are loaded when they are first used, so that `import latent_tiles` is instant.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_tiles.errors import LatentTilesError
    from latent_tiles.families.registry import supported as supported_families
    from latent_tiles.geometry import Box, Size, TileGrid, plan_grid
    from latent_tiles.noise import NoiseField
    from latent_tiles.pipelines.latent_tiling import latent_tiling
    from latent_tiles.pipelines.upscale import LatentTiledUpscalePipeline
    from latent_tiles.reference.folder import reference_model
    from latent_tiles.tiling import Tiling
    from latent_tiles.vae.exact import exact_vae
    from latent_tiles.vae.options import VaeOptions
    from latent_tiles.vae.registry import supported_vaes

__version__ = version("latent-tiles")

__all__ = [
    "Box",
    "LatentTiledUpscalePipeline",
    "LatentTilesError",
    "NoiseField",
    "Size",
    "TileGrid",
    "Tiling",
    "VaeOptions",
    "exact_vae",
    "latent_tiling",
    "plan_grid",
    "reference_model",
    "supported_families",
    "supported_vaes",
]

_HOMES = {
    "Box": ("geometry", "Box"),
    "LatentTiledUpscalePipeline": ("pipelines.upscale", "LatentTiledUpscalePipeline"),
    "LatentTilesError": ("errors", "LatentTilesError"),
    "NoiseField": ("noise", "NoiseField"),
    "Size": ("geometry", "Size"),
    "TileGrid": ("geometry", "TileGrid"),
    "Tiling": ("tiling", "Tiling"),
    "VaeOptions": ("vae.options", "VaeOptions"),
    "exact_vae": ("vae.exact", "exact_vae"),
    "latent_tiling": ("pipelines.latent_tiling", "latent_tiling"),
    "plan_grid": ("geometry", "plan_grid"),
    "reference_model": ("reference.folder", "reference_model"),
    "supported_families": ("families.registry", "supported"),
    "supported_vaes": ("vae.registry", "supported_vaes"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
