"""Run a program over maps that do not fit, by a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latent_tiles.executor.attention import KeyValues
from latent_tiles.executor.cost import score_values
from latent_tiles.executor.evaluate import Evaluator
from latent_tiles.executor.maps import Map, Sink, Source
from latent_tiles.executor.plan import Plan
from latent_tiles.executor.program import Program
from latent_tiles.executor.reach import windows
from latent_tiles.executor.schedule import Pass
from latent_tiles.executor.spill import MapStore
from latent_tiles.geometry import Box

Progress = Callable[[int, int], None]
"""Told after every window: windows done, windows in all."""
PickKeys = Callable[[int, KeyValues], KeyValues]
"""May replace what an attention (by the number of its node) attends to."""


@dataclass(kw_only=True)
class Run:
    """One run of a program.

    Args:
        program: the layers.
        plan: passes, windows and places of maps.
        inputs: where each input is read from.
        sink: takes the output.
        store: makes the maps.
        dtype: of the maps.
        rows: size of the batch.
        facts: statistics that are known beforehand, by their number; the plan's passes need not pool them.
        pick_keys: may reduce what an attention attends to.
        progress: told after every window.
    """

    program: Program
    plan: Plan
    inputs: Mapping[int, Source]
    sink: Sink
    store: MapStore
    dtype: torch.dtype
    rows: int
    facts: dict[int, Any] = field(default_factory=dict[int, Any])
    pick_keys: PickKeys | None = None
    progress: Progress | None = None
    _kept: dict[int, Map] = field(default_factory=dict[int, Map])
    _key_values: dict[int, KeyValues] = field(default_factory=dict[int, KeyValues])
    _done: int = 0

    def __call__(self) -> None:
        """Run all passes; the sink has the whole output afterwards."""
        for number, task in enumerate(self.plan.passes):
            self.sweep(number, task)
            for gone in task.frees:
                if gone in self._kept:
                    self.store.drop(self._kept.pop(gone))

    def sweep(self, number: int, task: Pass) -> None:
        """Run one pass."""
        target, size = task.target, self.plan.sizes[task.target]
        pools = [(index, self.program.statistics[index].pool()) for index in task.statistics]
        is_output = target == self.program.output
        if task.keeps and task.steps and not is_output:
            shape = (self.rows, self.program.nodes[target].channels, size.height, size.width)
            self._kept[target] = self.store.make(shape, self.dtype, self.plan.places[target])
        evaluate = self.evaluator(task)
        observe = self.observer(task)
        for box in windows(size, self.plan.sides[number]):
            values = evaluate(box, None if observe is None else observe(box))
            for _, pool in pools:
                pool.add(values)
            if is_output:
                self.sink.write(box, values)
            elif target in self._kept:
                self._kept[target].write(box, values)
            del values  # else it would lie beside the next window
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, self.plan.windows)
        self._key_values.clear()
        self.facts.update((index, pool.result()) for index, pool in pools)

    def evaluator(self, task: Pass) -> Evaluator:
        """What computes a window of a pass."""
        return Evaluator(self.program, task, self.plan.sizes, self.read, self.fact_of)

    def observer(self, task: Pass) -> Callable[[Box], Callable[[int, Box, Tensor], None]] | None:
        """What looks on as windows of a pass are computed; nobody here."""
        del task
        return None

    def read(self, index: int, box: Box) -> Tensor:
        """A box of an input or of a kept map."""
        source: Source = self._kept[index] if index in self._kept else self.inputs[index]
        return source.read(box)

    def fact_of(self, index: int) -> Any:
        """What a node must know of whole maps."""
        node = self.program.nodes[index]
        if node.statistic is not None:
            return self.facts[node.statistic]
        if not node.maps:
            return None
        if node.maps[0] not in self._key_values:
            keys, values = (self._kept[entry] for entry in node.maps)
            chunk = self.plan.chunk_tokens
            whole = KeyValues(
                keys=keys,
                values=values,
                chunk_tokens=chunk,
                score_values=self.rows * score_values(chunk, node.channels),
            )
            self._key_values[node.maps[0]] = self.pick_keys(index, whole) if self.pick_keys else whole
        return self._key_values[node.maps[0]]
