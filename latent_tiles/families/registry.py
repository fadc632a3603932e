"""Which denoisers can be tiled."""

from __future__ import annotations

from torch import nn

from latent_tiles.errors import FamilyError
from latent_tiles.families.canvas import CanvasCall
from latent_tiles.families.pixart import PixArtCall
from latent_tiles.families.sana import SanaCall
from latent_tiles.families.sd3 import SD3Call
from latent_tiles.families.unet import UNetCall

_FAMILIES: dict[str, type[CanvasCall]] = {
    "UNet2DConditionModel": UNetCall,
    "SD3Transformer2DModel": SD3Call,
    "SanaTransformer2DModel": SanaCall,
    "PixArtTransformer2DModel": PixArtCall,
}


def supported() -> tuple[str, ...]:
    """Class names of the denoisers that can be tiled.

    Example:
        >>> "UNet2DConditionModel" in supported()
        True
    """
    return tuple(_FAMILIES)


def family_of(module: nn.Module) -> type[CanvasCall]:
    """How calls of this denoiser are taken apart.

    Raises:
        FamilyError: the denoiser's class is not supported; the message lists those that are.
    """
    for kind in type(module).__mro__:
        if kind.__name__ in _FAMILIES:
            return _FAMILIES[kind.__name__]
    raise FamilyError(f"{type(module).__name__} cannot be tiled; supported are {', '.join(supported())}")
