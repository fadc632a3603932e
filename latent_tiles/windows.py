"""How much each position of a tile counts when overlapping tiles are fused.

A window is a function of one axis; a tile's weights are the outer product of its two axes. Windows rise only where a
neighbour overlaps: at the frame's border and in a tile's core the weight is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.errors import TilingError
from latent_tiles.geometry import TileGrid

Window = Callable[[int, int, int], Float[Tensor, " length"]]
"""(length, ramp_before, ramp_after) -> float32 weights, all > 0."""

_GAUSSIAN_SIGMA = 1 / 6
"""Standard deviation over the tile's length: the weight at the border is exp(-4.5), about 1 % of the centre's."""


def cosine(length: int, before: int, after: int) -> Float[Tensor, " length"]:
    """Raised-cosine ramps over the overlaps: two neighbours sum to 1 (sin^2 + cos^2)."""
    return _ramped(length, before, after, lambda x: torch.sin(x * (math.pi / 2)) ** 2)


def linear(length: int, before: int, after: int) -> Float[Tensor, " length"]:
    """Straight ramps over the overlaps: two neighbours sum to 1."""
    return _ramped(length, before, after, lambda x: x)


def gaussian(length: int, before: int, after: int) -> Float[Tensor, " length"]:
    """A bell over the whole tile, whatever the overlap (Mixture of Diffusers, arXiv 2302.02412)."""
    del before, after
    x = (torch.arange(length, dtype=torch.float32) + 0.5) / length - 0.5
    return torch.exp(-0.5 * (x / _GAUSSIAN_SIGMA) ** 2)


def uniform(length: int, before: int, after: int) -> Float[Tensor, " length"]:
    """Every tile counts alike: the flat average of MultiDiffusion (arXiv 2302.08113)."""
    del before, after
    return torch.ones(length)


WINDOWS: dict[str, Window] = {"cosine": cosine, "linear": linear, "gaussian": gaussian, "uniform": uniform}


def resolve_window(window: str | Window) -> Window:
    """A window by name, or the callable itself.

    Raises:
        TilingError: no window has this name; the message lists those that exist.
    """
    if callable(window):
        return window
    if window not in WINDOWS:
        raise TilingError(f"unknown window {window!r}; use one of {', '.join(WINDOWS)}, or a callable")
    return WINDOWS[window]


def tile_weights(grid: TileGrid, index: int, window: Window) -> Float[Tensor, "height width"]:
    """Weights of one tile of a grid, float32, on the CPU.

    Raises:
        TilingError: a window gave weights of another length, or not all above zero and finite.
    """
    box, ramps = grid[index], grid.ramps(index)
    axes = [_checked(window, length, *ramp) for length, ramp in zip(box.size, ramps, strict=True)]
    return torch.outer(*axes)


def check_window(grid: TileGrid, window: Window) -> None:
    """Check, before any work, that a window serves every row and column of a grid.

    Raises:
        TilingError: see `tile_weights`.
    """
    columns = len(grid.columns)
    for index in (*range(columns), *range(0, len(grid), columns)):
        tile_weights(grid, index, window)


def _checked(window: Window, length: int, before: int, after: int) -> Float[Tensor, " length"]:
    weights = window(length, before, after)
    if weights.shape != (length,):
        raise TilingError(f"window gave weights of shape {tuple(weights.shape)}, not ({length},)")
    if not bool(((weights > 0) & weights.isfinite()).all()):
        raise TilingError("window gave a weight that is not above zero and finite; every position must count")
    return weights.float()


def _ramped(length: int, before: int, after: int, shape: Callable[[Tensor], Tensor]) -> Float[Tensor, " length"]:
    # Half-integer samples: the ramp is never 0, and mirrored ramps of two neighbours meet exactly.
    position = torch.arange(length, dtype=torch.float32) + 0.5
    rise = shape((position / before).clamp(max=1)) if before else torch.ones(length)
    fall = shape(((length - position) / after).clamp(max=1)) if after else torch.ones(length)
    return rise * fall
