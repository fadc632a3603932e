"""`none`: tiles share the latent and the noise, and nothing else.

The cosine-weighted fusion of predictions on one canvas (MultiDiffusion, arXiv 2302.08113; Mixture of Diffusers,
arXiv 2302.02412), the baseline of every comparison. With a shared x_t and one global solver step, fusing epsilon, v or
x0 is the same thing, since they are affine in each other.

Schedule: all tiles in one tick. Memory: nothing beyond the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latent_tiles.geometry import TileGrid
from latent_tiles.memory.base import ModelStep


class NoMemory:
    """Every tile sees its part of the canvas."""

    order_free = True
    uses_levels_and_noise = False

    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        """One tick with every tile."""
        return (tuple(range(len(grid))),)

    def begin(self, step: ModelStep) -> None:
        """Nothing to prepare."""

    def see(self, index: int, noisy: Tensor) -> Tensor:
        """The canvas itself."""
        del index
        return noisy

    def decide(self, index: int, *, noisy: Tensor, seen: Tensor, prediction: Tensor) -> Tensor:
        """The prediction itself."""
        del index, noisy, seen
        return prediction

    def end_tick(self) -> None:
        """Nothing to publish."""
