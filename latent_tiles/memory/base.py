"""What a tile may see of the others: the protocol behind every memory strategy.

A strategy is made for one pipeline call and lives as long as it. Within each call of the model the denoiser asks it for
the order of the tiles, what each tile sees, and what a tile's prediction means for the canvas:

    begin -> for every tick: (see -> model -> decide) for every tile -> end_tick

The tiles of one tick are independent of each other: they may run in one batch, and none of them sees what another of
the same tick decided. `end_tick` is where their decisions become visible.

Rows of a batch are branch-major, as diffusers concatenates them for classifier-free guidance: all items of the first
branch, then all items of the second. `branches` gives each branch's weight in the guided prediction; a strategy that
keeps features keeps them per branch, one that keeps clean latents keeps the guided ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.geometry import TileGrid
from latent_tiles.parameterisation import Levels


@dataclass(frozen=True, kw_only=True)
class ModelStep:
    """What all tiles of one call of the model share.

    Args:
        grid: where the tiles lie.
        weights: fusion weights of each tile, float32, on the model's device.
        levels: finds signal and noise level of this call; raises where the scheduler does not state them.
        noise: the field's initial noise over the whole canvas, (items, channels, height, width), float32; None where
            the host draws its own.
        branches: weight of each guidance branch in the guided prediction; they sum to 1.
        rows: rows of the batch, branches times items.
        channels: channels of the noisy latent.
        call: how many times the model was called before, since the sampler's last step.
        device: where the model runs.
    """

    grid: TileGrid
    weights: Sequence[Float[Tensor, "_ _"]]
    levels: Callable[[], Levels]
    noise: Callable[[], Tensor] | None
    branches: tuple[float, ...]
    rows: int
    channels: int
    call: int
    device: torch.device


@runtime_checkable
class TileMemory(Protocol):
    """A memory strategy; see the module's text for the order of calls."""

    order_free: bool
    """True where the result does not depend on the order of tiles within a step."""

    uses_levels_and_noise: bool
    """True where it reads `ModelStep.levels` and `ModelStep.noise`, so that callers can check before any model runs."""

    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        """The order of the tiles: every tile once, those of one tick independent of each other."""
        ...

    def begin(self, step: ModelStep) -> None:
        """A call of the model starts.

        Raises:
            MemoryStrategyError: the strategy does not fit this model, scheduler or host.
        """
        ...

    def see(
        self, index: int, noisy: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows channels height width"]:
        """What tile `index` is shown instead of its part of the canvas. Never changes `noisy` in place."""
        ...

    def decide(
        self,
        index: int,
        *,
        noisy: Float[Tensor, "rows channels height width"],
        seen: Float[Tensor, "rows channels height width"],
        prediction: Float[Tensor, "rows channels height width"],
    ) -> Float[Tensor, "rows channels height width"]:
        """Take note of a tile's prediction and restate it at the canvas's own input, so that it can be fused."""
        ...

    def end_tick(self) -> None:
        """All tiles of the tick have decided; the next tick may see them."""
        ...
