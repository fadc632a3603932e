"""`pin`: where a tile overlaps neighbours that are already processed, it starts from what they decided.

Rule. Before its model call a tile's input x is drawn towards the neighbours' clean latent, noised to the present level
with the frame's own initial noise n:

    x' = x + lambda r (a x0_neighbours + s n - x),      r = W / (W + w)

with W the fusion weight that the processed neighbours have put down at a position and w the tile's own: a soft ramp
from 1 at the tile's outer edge to 0 where the overlap ends. The tile's x0 is fused: its prediction at x' is restated at
the canvas's x (`Levels.rebase`), which is the same thing and leaves a tile without neighbours untouched bit for bit.

Under classifier-free guidance the neighbours' **guided** x0 is pinned, the same for all branches. A host that calls the
model once per branch is refused: the guided prediction is not known there.

Schedule: wavefront; a tile sees its left, upper and upper-left neighbours.
Memory: one float32 canvas of clean latents and one of noise, items x channels x height x width each.
Source: the overlap re-injection of sliding-window video diffusion, with the noising of RePaint (Lugmayr et al., arXiv
2201.09865, eq. 8a). Deviations: a soft ramp instead of a hard mask, no resampling loop, the frame's noise instead of a
fresh draw, and a fused canvas instead of finished windows. `guidance_rescale` acts after fusion, on the whole canvas;
the pinned estimate is without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latent_tiles.canvas import TileCanvas
from latent_tiles.errors import MemoryStrategyError
from latent_tiles.geometry import Box, TileGrid, wavefront
from latent_tiles.memory.base import ModelStep
from latent_tiles.parameterisation import Levels


class Pin:
    """Pins overlaps to already processed neighbours.

    Args:
        strength: lambda, 0 (no effect) to 1 (the overlap's outer edge is the neighbours').

    Raises:
        MemoryStrategyError: lambda outside [0, 1].
    """

    order_free = False
    uses_levels_and_noise = True

    def __init__(self, *, strength: float = 1.0) -> None:
        if not 0 <= strength <= 1:
            raise MemoryStrategyError(f"pin: lambda must be between 0 and 1, got {strength}")
        self._strength = strength
        self._noise: Tensor | None = None

    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        """Anti-diagonals of the grid."""
        return wavefront(grid)

    def begin(self, step: ModelStep) -> None:
        """Start an empty canvas of clean latents.

        Raises:
            MemoryStrategyError: the host draws its own noise, calls the model per branch, or has other branches than
                stated.
        """
        if step.noise is None:
            raise MemoryStrategyError("pin needs the shared noise field; use noise='field'")
        if step.call > 0:
            msg = "pin needs all guidance branches in one call of the model; this host calls it once per branch"
            raise MemoryStrategyError(msg)
        if step.rows % len(step.branches):
            msg = f"pin: {step.rows} rows are not a whole number of items for {len(step.branches)} guidance branches"
            raise MemoryStrategyError(msg)
        if self._noise is None:
            self._noise = step.noise().to(step.device)
        self._step = step
        self._levels: Levels = step.levels()
        self._items = step.rows // len(step.branches)
        self._branches = torch.tensor(step.branches, device=step.device).view(-1, 1, 1, 1, 1)
        self._clean = TileCanvas(rows=self._items, channels=step.channels, size=step.grid.frame, device=step.device)
        self._pending: list[tuple[Box, Tensor, Tensor]] = []
        self._anything_decided = False

    def see(self, index: int, noisy: Tensor) -> Tensor:
        """The tile's input, drawn towards the processed neighbours in the overlap."""
        if not self._anything_decided:
            return noisy
        assert self._noise is not None
        box = self._step.grid[index]
        rows, columns = box.to_slices()
        clean, decided = self._clean.read(box)
        ramp = self._strength * decided / (decided + self._step.weights[index])
        pinned = self._levels.noisy(clean, self._noise[:, :, rows, columns])
        pinned = pinned.repeat(len(self._step.branches), 1, 1, 1)
        exact = noisy.float()
        return (exact + ramp * (pinned - exact)).to(noisy.dtype)

    def decide(self, index: int, *, noisy: Tensor, seen: Tensor, prediction: Tensor) -> Tensor:
        """Keep the tile's guided clean latent; restate its prediction at the canvas's input.

        Raises:
            MemoryStrategyError: the model predicts something else beside the noise.
        """
        if prediction.shape != seen.shape:
            msg = f"pin needs a prediction of {seen.shape[1]} channels, this model gives {prediction.shape[1]} "
            raise MemoryStrategyError(msg + "(a variance behind the noise); use memory='none'")
        by_branch = prediction.float().unflatten(0, (len(self._step.branches), self._items))
        guided = (self._branches * by_branch).sum(dim=0)
        clean = self._levels.clean(seen[: self._items].float(), guided)
        self._pending.append((self._step.grid[index], clean, self._step.weights[index]))
        if seen is noisy:
            return prediction
        return self._levels.rebase(prediction.float(), seen.float(), noisy.float())

    def end_tick(self) -> None:
        """Write the tick's clean latents where the next tick reads them."""
        for box, clean, weights in self._pending:
            self._clean.add(box, clean, weights)
        self._pending.clear()
        self._anything_decided = True
