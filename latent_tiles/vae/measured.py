"""A run that measures what its approximations do: sampled statistics, attention to part of the keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from latent_tiles.executor.attention import KeyValues, attend
from latent_tiles.executor.evaluate import crop
from latent_tiles.executor.ops import Attention
from latent_tiles.executor.run import Run
from latent_tiles.executor.schedule import Pass
from latent_tiles.executor.statistics import Moments, Pool
from latent_tiles.geometry import Box, Size
from latent_tiles.vae.sampled import core, estimate, sampled_statistics

_PROBES_PER_WINDOW = 4
_LEAST_DEVIATION = 1e-3
"""Norms add 1e-6 to a variance: where a map is flatter than that, they divide by this."""


@dataclass(kw_only=True)
class MeasuredRun(Run):
    """A run with sampled statistics, or with attention to part of the keys, that measures what that does.

    Args:
        sampled: take the statistics of large maps from patches.
        attention_keys: attend to at most so many keys; None for all.
    """

    sampled: bool = False
    attention_keys: int | None = None
    _measured: dict[int, Pool] = field(default_factory=dict[int, Pool])
    _errors: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    _exact: dict[int, KeyValues] = field(default_factory=dict[int, KeyValues])

    def __post_init__(self) -> None:
        """Reduce keys where that is asked for."""
        if self.attention_keys is not None:
            self.pick_keys = self._pick

    @property
    def residual(self) -> float | None:
        """The largest difference of a statistic used from the one measured, in standard deviations."""
        if not self.sampled:
            return None
        measured = self._measured.items()
        return max((statistic_difference(self.facts[index], pool.result()) for index, pool in measured), default=0.0)

    @property
    def attention_error(self) -> float | None:
        """Root mean square error of attention over the root mean square of its output, on the probes."""
        if not self._errors:
            return None
        error, size = (sum(entry[part] for entry in self._errors) for part in range(2))
        return math.sqrt(error / size) if size else 0.0

    def sweep(self, number: int, task: Pass) -> None:
        """Run one pass, after estimating the statistics that it needs and nobody pooled."""
        if self.sampled:
            wanted = sampled_statistics(self.program, task, self.facts)
            if wanted:
                estimate(self, task, wanted)
                self._measured |= {index: self.program.statistics[index].pool() for index in wanted}
        super().sweep(number, task)
        self._exact.clear()

    def observer(self, task: Pass) -> Callable[[Box], Callable[[int, Box, Tensor], None]] | None:
        """Pools the statistics that were estimated, and probes attention."""
        watched = {
            self.program.statistics[index].of: pool
            for index, pool in self._measured.items()
            if self.program.statistics[index].of in task.steps
        }
        probed = {
            self.program.nodes[index].inputs[0]: index
            for index in task.steps
            if isinstance(self.program.nodes[index].op, Attention) and self.attention_keys is not None
        }
        if not watched and not probed:
            return None

        def observing(window: Box) -> Callable[[int, Box, Tensor], None]:
            queries: dict[int, Tensor] = {}

            def observe(index: int, box: Box, values: Tensor) -> None:
                if index in watched:
                    own = core(window, self.plan.sizes[task.target], self.plan.sizes[index], box)
                    if own is not None:
                        watched[index].add(crop(values, box, own))
                if index in probed:
                    queries[probed[index]] = values
                if index in queries:
                    self._probe(index, queries.pop(index), values)

            return observe

        return observing

    def _pick(self, index: int, whole: KeyValues) -> KeyValues:
        assert self.attention_keys is not None
        self._exact[index] = whole
        picked = spread(whole.keys.size, self.attention_keys)
        return whole if picked is None else replace(whole, picked=picked)

    def _probe(self, index: int, queries: Tensor, approximate: Tensor) -> None:
        op = self.program.nodes[index].op
        assert isinstance(op, Attention)
        area = queries.shape[2] * queries.shape[3]
        places = torch.linspace(0, area - 1, min(_PROBES_PER_WINDOW, area)).long().to(queries.device)
        some = queries.flatten(2)[:, :, places, None]
        exact = attend(some.contiguous(), self._exact[index], heads=op.heads).float()
        difference = approximate.flatten(2)[:, :, places, None].float() - exact
        self._errors.append((float((difference**2).sum()), float((exact**2).sum())))


def spread(size: Size, count: int) -> Tensor | None:
    """Positions (row by row) spread evenly over a map, one in each cell of a grid; None where all are wanted."""
    if count >= size.area:
        return None
    rows = max(1, min(size.height, count, round(math.sqrt(count * size.height / size.width))))
    columns = max(1, min(size.width, count // rows))
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(2, rows, columns, generator=generator, dtype=torch.float64)
    top = ((torch.arange(rows)[:, None] + jitter[0]) * size.height / rows).long().clamp_(max=size.height - 1)
    left = ((torch.arange(columns) + jitter[1]) * size.width / columns).long().clamp_(max=size.width - 1)
    return torch.unique(top * size.width + left)


def statistic_difference(used: Any, measured: Any) -> float:
    """How far two values of one statistic are apart, in standard deviations (or as a part of it, for sums)."""
    if isinstance(used, Moments):
        deviation = measured.variance.sqrt()
        scale = deviation.clamp_min(_LEAST_DEVIATION)
        shift = ((used.mean - measured.mean).abs() / scale).max()
        stretch = ((used.variance.sqrt() - deviation).abs() / scale).max()
        return float(torch.maximum(shift, stretch))
    return float((used - measured).norm() / measured.norm().clamp_min(1e-12))
