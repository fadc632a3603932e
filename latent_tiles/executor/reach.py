"""Which part of every map one window of a pass needs, and how a pass is cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from latent_tiles.executor.program import Program
from latent_tiles.executor.schedule import Pass
from latent_tiles.geometry import Box, Size, Span

_ALIGNMENT = 8
"""Windows start at multiples of this, so that their shapes and those of the coarser maps under them are few."""


class Reach:
    """What a pass needs, by propagating spans of its target back through its layers, exactly, one axis at a time.

    Args:
        program: the layers.
        task: the pass.
        sizes: sizes of all maps.
    """

    def __init__(self, program: Program, task: Pass, sizes: Sequence[Size]) -> None:
        self._program, self._task, self._sizes = program, task, sizes
        self._known: dict[tuple[int, Span], dict[int, Span]] = {}

    def spans(self, axis: int, span: Span) -> dict[int, Span]:
        """The span of every computed or read node on one axis (0 height, 1 width)."""
        key = (axis, span)
        if key not in self._known:
            self._known[key] = self._propagate(axis, span)
        return self._known[key]

    def boxes(self, box: Box) -> dict[int, Box]:
        """The box of every computed or read node."""
        rows = self.spans(0, Span(box.top, box.height))
        columns = self.spans(1, Span(box.left, box.width))
        return {
            node: Box(row.start, columns[node].start, row.length, columns[node].length) for node, row in rows.items()
        }

    def inputs(self, node: int, box: Box) -> tuple[Box, ...]:
        """The box of each input that a box of a node reads."""
        layer = self._program.nodes[node]
        assert layer.op is not None
        sizes = [self._sizes[entry] for entry in layer.inputs]
        rows = layer.op.reach(0, Span(box.top, box.height), tuple(size.height for size in sizes))
        columns = layer.op.reach(1, Span(box.left, box.width), tuple(size.width for size in sizes))
        return tuple(
            Box(row.start, column.start, row.length, column.length) for row, column in zip(rows, columns, strict=True)
        )

    def _propagate(self, axis: int, span: Span) -> dict[int, Span]:
        needed = {self._task.target: span}
        for index in reversed(self._task.steps):
            node = self._program.nodes[index]
            assert node.op is not None
            lengths = tuple(self._sizes[entry][axis] for entry in node.inputs)
            for entry, part in zip(node.inputs, node.op.reach(axis, needed[index], lengths), strict=True):
                needed[entry] = _union(needed[entry], part) if entry in needed else part
        return needed


def _union(one: Span, other: Span) -> Span:
    start = min(one.start, other.start)
    return Span(start, max(one.stop, other.stop) - start)


def cut(length: int, side: int) -> tuple[Span, ...]:
    """Cut an axis into parts of about one length that do not overlap.

    Args:
        length: of the axis.
        side: the most that a part may have.
    """
    if length <= side:
        return (Span(0, length),)
    parts = -(-length // side)
    step = -(-length // parts)
    step = min(side, -(-step // _ALIGNMENT) * _ALIGNMENT)
    return tuple(Span(start, min(step, length - start)) for start in range(0, length, step))


def windows(size: Size, side: int) -> Iterator[Box]:
    """Parts that cover a map once, in bands from top to bottom."""
    columns = cut(size.width, side)
    for row in cut(size.height, side):
        for column in columns:
            yield Box(row.start, column.start, row.length, column.length)
