"""The tiled denoiser: one function of the whole latent, computed tile by tile.

Canvas in, prediction out; the sampler steps once, globally. The denoiser knows neither the model (a `ModelCall` does)
nor what tiles pass on to each other (a `TileMemory` does); it owns the order, the batches and the fusion.

`Denoiser` is the seam for ways of running a canvas that are not tile after tile, such as all tiles in lockstep, layer
by layer: they take the same `ModelCall` and return the same prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from latent_tiles.canvas import TileCanvas
from latent_tiles.families.base import ModelCall
from latent_tiles.geometry import Box, Size, TileGrid
from latent_tiles.memory import ModelStep, TileMemory
from latent_tiles.noise import NoiseField
from latent_tiles.parameterisation import levels
from latent_tiles.windows import Window, tile_weights


@runtime_checkable
class Denoiser(Protocol):
    """Answers one call of the host's model over the whole canvas."""

    def predict(self, call: ModelCall) -> Any:
        """What the host's model returns."""
        ...


@dataclass(kw_only=True)
class Clock:
    """Counts, over one pipeline call; shared by the denoiser and whoever watches the sampler."""

    steps: int = 0
    """Finished calls of the sampler's `step`."""
    calls_in_step: int = 0
    """Calls of the model since then."""
    model_calls: int = 0
    """Calls of the model in all."""
    tiles: int = 0
    """Tiles that went through the model."""

    def called(self) -> None:
        """The model has answered."""
        self.calls_in_step += 1
        self.model_calls += 1

    def stepped(self) -> None:
        """The sampler has finished a step."""
        self.steps += 1
        self.calls_in_step = 0


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """A grid and its fusion weights."""

    grid: TileGrid
    weights: Sequence[Tensor] = field(repr=False)


@dataclass(kw_only=True)
class TiledDenoiser:
    """Runs a denoiser tile by tile and fuses the predictions in float32.

    A grid of one tile passes the host's call through untouched.

    Args:
        plan_grid: grid over a canvas of latents.
        window: fusion weights of a tile.
        memory: what a tile sees of the others.
        tile_batch: tiles in one call of the model.
        scheduler: the host's scheduler, which states the noise levels to the memories that need them.
        noise: the noise field, or None where the host draws its own.
        branches: finds the weight of each guidance branch, at the time of a model call.
        clock: counts steps, calls and tiles.
        on_tiles: told the number of tiles just done, after every call of the model.
    """

    plan_grid: Callable[[Size], TileGrid]
    window: Window
    memory: TileMemory
    tile_batch: int
    scheduler: Any
    noise: NoiseField | None
    branches: Callable[[], tuple[float, ...]]
    clock: Clock = field(default_factory=Clock)
    on_tiles: Callable[[int], None] = lambda count: None
    _plans: dict[Any, TilePlan] = field(default_factory=dict, init=False, repr=False)

    def predict(self, call: ModelCall) -> Any:
        """The fused prediction over the whole canvas, in the form the host expects."""
        plan = self._plan(call)
        if len(plan.grid) == 1:
            result = call.run_whole()
            self._count(1)
        else:
            result = call.wrap(self._fuse(call, plan))
        self.clock.called()
        return result

    def _fuse(self, call: ModelCall, plan: TilePlan) -> Tensor:
        noisy, memory = call.noisy, self.memory
        memory.begin(self._step(call, plan))
        canvas: TileCanvas | None = None
        # Sums of floats depend on their order: tiles are added in the grid's, whatever the order they ran in.
        waiting: dict[int, Tensor] = {}
        upcoming = 0
        for tick in memory.ticks(plan.grid):
            for batch in _batches(plan.grid, tick, self.tile_batch):
                boxes = [plan.grid[index] for index in batch]
                own = [_crop(noisy, box) for box in boxes]
                seen = [memory.see(index, tile) for index, tile in zip(batch, own, strict=True)]
                predictions = call.run_tiles(boxes, seen)
                for index, tile, view, prediction in zip(batch, own, seen, predictions, strict=True):
                    waiting[index] = memory.decide(index, noisy=tile, seen=view, prediction=prediction)
                while upcoming in waiting:
                    decided = waiting.pop(upcoming)
                    if canvas is None:
                        # A model may predict more than the noise: a variance behind it.
                        rows, channels = decided.shape[:2]
                        canvas = TileCanvas(rows=rows, channels=channels, size=call.canvas, device=noisy.device)
                    canvas.add(plan.grid[upcoming], decided, plan.weights[upcoming])
                    upcoming += 1
                self._count(len(batch))
            memory.end_tick()
        assert canvas is not None  # every grid has a tile
        return canvas.finish()

    def _plan(self, call: ModelCall) -> TilePlan:
        device = call.noisy.device
        key = (call.canvas, device)
        if key not in self._plans:
            grid = self.plan_grid(call.canvas)
            weights = [tile_weights(grid, index, self.window).to(device) for index in range(len(grid))]
            self._plans[key] = TilePlan(grid=grid, weights=weights)
        return self._plans[key]

    def _step(self, call: ModelCall, plan: TilePlan) -> ModelStep:
        rows, channels = call.noisy.shape[:2]
        branches = self.branches()
        noise = None
        if self.noise is not None:
            whole = Box(0, 0, *call.canvas)
            items = max(1, rows // len(branches))
            noise = partial(self.noise.sample, "initial", items=items, channels=channels, box=whole)
        return ModelStep(
            grid=plan.grid,
            weights=plan.weights,
            levels=lambda: levels(self.scheduler, call.timestep),
            noise=noise,
            branches=branches,
            rows=rows,
            channels=channels,
            call=self.clock.calls_in_step,
            device=call.noisy.device,
        )

    def _count(self, tiles: int) -> None:
        self.clock.tiles += tiles
        self.on_tiles(tiles)


def _crop(canvas: Tensor, box: Box) -> Tensor:
    rows, columns = box.to_slices()
    return canvas[:, :, rows, columns]


def _batches(grid: TileGrid, tick: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Tiles of one tick in batches of one shape; a canvas that is no whole multiple has shorter tiles at its border."""
    ordered = sorted(tick, key=lambda index: grid[index].size, reverse=True)
    for _, group in groupby(ordered, key=lambda index: grid[index].size):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]
