"""What a pass costs before it is run: operations, traffic, and the memory that a window takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from latent_tiles.executor.ops import Attention
from latent_tiles.executor.program import Program
from latent_tiles.executor.reach import Reach, cut
from latent_tiles.executor.schedule import Pass
from latent_tiles.geometry import Size, Span


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """What one pass costs.

    Args:
        windows: number of windows.
        flops: operations of all layers but attention's scores.
        attention_flops: operations of attention.
        values_moved: values read from kept maps and written to them.
    """

    windows: int
    flops: float
    attention_flops: float
    values_moved: int


def pass_cost(program: Program, task: Pass, sizes: Sequence[Size], side: int, keys: int | None = None) -> PassCost:
    """Count a pass.

    A window's height depends on its rows and its width on its columns alone, so sums over all windows are products of
    sums over rows and over columns.

    Args:
        program: the layers.
        task: the pass.
        sizes: sizes of all maps.
        side: longest side of a window.
        keys: how many keys an attention reads, if not all.
    """
    reach = Reach(program, task, sizes)
    rows, columns = (cut(sizes[task.target][axis], side) for axis in range(2))
    height, width = (_totals(reach, axis, spans) for axis, spans in enumerate((rows, columns)))
    flops = attention = 0.0
    for index in task.steps:
        node = program.nodes[index]
        assert node.op is not None
        area = height[index] * width[index]
        flops += area * node.op.flops(tuple(program.nodes[entry].channels for entry in node.inputs), node.channels)
        if isinstance(node.op, Attention):
            attention += 4.0 * area * node.channels * min(sizes[node.maps[0]].area, keys or sizes[node.maps[0]].area)
    moved = sum(height[entry] * width[entry] * program.nodes[entry].channels for entry in task.reads)
    if task.keeps:
        moved += sizes[task.target].area * program.nodes[task.target].channels
    return PassCost(windows=len(rows) * len(columns), flops=flops, attention_flops=attention, values_moved=moved)


def _totals(reach: Reach, axis: int, spans: Sequence[Span]) -> dict[int, int]:
    totals: dict[int, int] = {}
    for span in spans:
        for node, part in reach.spans(axis, span).items():
            totals[node] = totals.get(node, 0) + part.length
    return totals


def window_side(program: Program, task: Pass, sizes: Sequence[Size], values: int) -> int:
    """The longest side of a window whose own part of every map has at most so many values, borders not counted.

    Args:
        program: the layers.
        task: the pass.
        sizes: sizes of all maps.
        values: most values in one tensor, for one row of the batch; a side of 1 is the least there is.
    """
    target = sizes[task.target]

    def side(node: int) -> float:
        finer = max(sizes[node].height / target.height, sizes[node].width / target.width)
        return math.sqrt(values / program.nodes[node].channels) / finer

    longest = max(1, min(max(target), int(min(side(node) for node in (task.target, *task.steps, *task.reads)))))
    return longest if longest < 16 else longest // 8 * 8


def _largest(reach: Reach, size: Size, side: int) -> dict[int, tuple[int, int]]:
    """The largest extent of every node in any window of a pass."""
    extents: dict[int, list[int]] = {}
    for axis in range(2):
        for span in _kinds(cut(size[axis], side)):
            for node, part in reach.spans(axis, span).items():
                extent = extents.setdefault(node, [0, 0])
                extent[axis] = max(extent[axis], part.length)
    return {node: (height, width) for node, (height, width) in extents.items()}


def _kinds(spans: Sequence[Span]) -> list[Span]:
    """One span of each kind: the first, one inside (the others are shifted copies), the last."""
    return [spans[0], spans[len(spans) // 2], spans[-1]]


def score_values(chunk_tokens: int, channels: int) -> int:
    """Scores that an attention computes at a time where its keys come in chunks: as many as a chunk has values."""
    return chunk_tokens * channels


def _attention_scratch(keys: int, chunk_tokens: int, channels: int, queries: int) -> int:
    """Values that an attention takes beside its input and output, in values of 16 bits at the worst."""
    if keys <= chunk_tokens:
        return 0
    # A chunk of keys and values and their copies in float32, scores, and the queries and sums in float32.
    return 6 * chunk_tokens * channels + 4 * score_values(chunk_tokens, channels) + 6 * queries


def _held_keys(program: Program, task: Pass, sizes: Sequence[Size], chunk_tokens: int) -> int:
    """Values of the keys and values that are read once and stay for the whole pass, since they fit at once."""
    maps = {node.maps: node.channels for node in (program.nodes[index] for index in task.steps) if node.maps}
    areas = ((sizes[keys].area, channels) for (keys, _), channels in maps.items())
    return sum(2 * area * channels for area, channels in areas if area <= chunk_tokens)


def working_values(program: Program, task: Pass, sizes: Sequence[Size], side: int, *, chunk_tokens: int) -> int:
    """Values in memory at the worst moment of a pass's largest window, for one row of the batch.

    Counts the tensors that are alive between layers, keys and values that stay for the pass, a copy of a layer's input
    or output (padding, casting, changing the layout, the two steps of an activated sum), and for attention the keys,
    values and scores of a chunk. What a library takes inside a kernel is not in it.
    """
    shape = _largest(Reach(program, task, sizes), sizes[task.target], side)
    count = {node: height * width * program.nodes[node].channels for node, (height, width) in shape.items()}
    last = {entry: index for index in task.steps for entry in program.nodes[index].inputs}
    alive, worst = _held_keys(program, task, sizes, chunk_tokens), 0
    present = set[int]()
    for index in task.steps:
        node = program.nodes[index]
        for entry in node.inputs:
            if entry not in present:
                present.add(entry)
                alive += count[entry]
        scratch = max(count[index], *(count[entry] for entry in node.inputs))
        if isinstance(node.op, Attention):
            scratch += _attention_scratch(sizes[node.maps[0]].area, chunk_tokens, node.channels, count[index])
        present.add(index)
        alive += count[index]
        worst = max(worst, alive + scratch)
        for entry in set(node.inputs):
            if last[entry] == index:
                present.discard(entry)
                alive -= count[entry]
    return max(worst, 2 * max(count.values()))
