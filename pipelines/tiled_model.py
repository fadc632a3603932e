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
from latent_tiles.tiling import LatentUnits


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


def units_of(pipe: Any, *, canvas_multiple_of: int = 1) -> LatentUnits:
    """Pixels per latent of a pipeline's autoencoder, and what its denoiser needs tiles to be multiples of.

    Args:
        pipe: the pipeline.
        canvas_multiple_of: what the pipeline needs a canvas to be a multiple of.

    Raises:
        UnsupportedHostError: it has no denoiser or no autoencoder.
        FamilyError: its denoiser cannot be tiled.
    """
    inner = inner_of(denoiser_of(pipe))
    family = family_of(inner)
    if getattr(pipe, "vae", None) is None:
        raise UnsupportedHostError(f"{type(pipe).__name__} has no autoencoder; only latent canvases are tiled")
    return LatentUnits(
        pixels_per_latent=int(pipe.vae_scale_factor),
        multiple_of=family.multiple_of(inner),
        canvas_multiple_of=canvas_multiple_of,
    )


def training_side_px(pipe: Any) -> int | None:
    """The side of the pictures that the denoiser was trained at, where its configuration says so."""
    side = inner_of(denoiser_of(pipe)).config.sample_size
    return side * int(pipe.vae_scale_factor) if isinstance(side, int) else None


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
