"""Which denoisers can be tiled."""

from __future__ import annotations

from torch import nn

from latent_tiles.errors import FamilyError
from latent_tiles.families.base import ModelCallFactory
from latent_tiles.families.unet import UNetCall

_FAMILIES: dict[str, ModelCallFactory] = {"UNet2DConditionModel": UNetCall}


def supported() -> tuple[str, ...]:
    """Class names of the denoisers that can be tiled.

    Example:
        >>> "UNet2DConditionModel" in supported()
        True
    """
    return tuple(_FAMILIES)


def family_of(module: nn.Module) -> ModelCallFactory:
    """How calls of this denoiser are taken apart.

    Raises:
        FamilyError: the denoiser's class is not supported; the message lists those that are.
    """
    for kind in type(module).__mro__:
        if kind.__name__ in _FAMILIES:
            return _FAMILIES[kind.__name__]
    raise FamilyError(f"{type(module).__name__} cannot be tiled; supported are {', '.join(supported())}")
