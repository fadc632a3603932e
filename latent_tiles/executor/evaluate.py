"""Compute one window of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from latent_tiles.executor.ops import Window
from latent_tiles.executor.program import Program
from latent_tiles.executor.reach import Reach
from latent_tiles.executor.schedule import Pass
from latent_tiles.geometry import Box, Size

Read = Callable[[int, Box], Tensor]
FactOf = Callable[[int], Any]
Observe = Callable[[int, Box, Tensor], None]


class Evaluator:
    """Computes the target of a pass in a box, from the kept maps.

    Args:
        program: the layers.
        task: the pass.
        sizes: sizes of all maps.
        read: gives a box of a kept map.
        fact_of: gives what a node must know of whole maps, or None.
    """

    def __init__(self, program: Program, task: Pass, sizes: Sequence[Size], read: Read, fact_of: FactOf) -> None:
        self._program, self._task, self._sizes = program, task, sizes
        self._read, self._fact_of = read, fact_of
        self._reach = Reach(program, task, sizes)
        # Each window is computed with no more tensors alive than are still to be read.
        self._last = {entry: index for index in task.steps for entry in program.nodes[index].inputs}

    def __call__(self, box: Box, observe: Observe | None = None) -> Tensor:
        """The target in a box.

        Args:
            box: part of the target's map.
            observe: shown every computed node with its box.
        """
        boxes = self.boxes(box)
        if not self._task.steps:
            return self._read(self._task.target, box)
        values = dict[int, Tensor]()
        for index in self._task.steps:
            self.step(index, boxes, values)
            if observe is not None:
                observe(index, boxes[index], values[index])
        return values[self._task.target]

    def boxes(self, box: Box) -> dict[int, Box]:
        """The box of every node that a box of the target needs."""
        return self._reach.boxes(box)

    def step(self, index: int, boxes: dict[int, Box], values: dict[int, Tensor]) -> None:
        """Compute one node, reading kept maps where it is the first to need them, and drop what nothing needs after.

        Args:
            index: the node.
            boxes: the box of every node in this window.
            values: what is computed and read so far; changed.
        """
        node = self._program.nodes[index]
        assert node.op is not None
        parts = self._reach.inputs(index, boxes[index])
        for entry in node.inputs:
            if entry not in values:
                values[entry] = self._read(entry, boxes[entry])
        window = Window(box=boxes[index], sizes=tuple(self._sizes[entry] for entry in node.inputs), boxes=parts)
        given = [crop(values[entry], boxes[entry], part) for entry, part in zip(node.inputs, parts, strict=True)]
        values[index] = node.op.run(window, given, self._fact_of(index))
        for entry in set(node.inputs):
            if self._last[entry] == index:
                del values[entry]


def crop(values: Tensor, have: Box, want: Box) -> Tensor:
    """The part of a window's values that lies in a smaller box; both boxes are of the whole map."""
    if have == want:
        return values
    top, left = want.top - have.top, want.left - have.left
    return values[:, :, top : top + want.height, left : left + want.width]
