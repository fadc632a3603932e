"""Tile a host pipeline's denoiser for the length of one call."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from latent_tiles.denoiser import Denoiser
from latent_tiles.errors import UnsupportedHostError
from latent_tiles.families import family_of
from latent_tiles.patches import patched


def denoiser_of(pipe: Any) -> Any:
    """A pipeline's denoiser, whatever compiles it.

    Raises:
        UnsupportedHostError: it has none that could be cut into tiles.
    """
    module = getattr(pipe, "unet", None)
    module = getattr(pipe, "transformer", None) if module is None else module
    if module is None:
        raise UnsupportedHostError(f"{type(pipe).__name__} has neither a U-Net nor a transformer to tile")
    return module


def inner_of(module: Any) -> Any:
    """The module itself, where torch.compile has wrapped it."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def tiled_forward(module: nn.Module, denoiser: Denoiser) -> Generator[None, None, None]:
    """Within the block, a call of the model over the canvas is answered by a denoiser.

    The forward that the module has at this moment, offload hooks and LoRA scaling included, becomes the call of one
    tile. It is installed for each call anew, since `maybe_free_model_hooks` at the end of a host's call sets `forward`
    back and would lose a permanent one.

    Raises:
        FamilyError: the model's class cannot be tiled.
    """
    inner: nn.Module = inner_of(module)
    family = family_of(inner)
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return denoiser.predict(family(inner, original, args, kwargs))

    with patched(module, "forward", forward):
        yield
