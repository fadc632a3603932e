"""In which passes over whole maps a program is run, given which maps are kept between them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from latent_tiles.executor.program import Program


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One sweep of windows over the map of one node.

    Args:
        target: the node that is computed everywhere.
        keeps: whether its map is kept; if not, only statistics are pooled over it.
        statistics: what is pooled over it.
        steps: the nodes that are computed for a window, in order; the target comes last.
        reads: the kept nodes that windows are read from.
        streams: the kept nodes that are read whole (keys and values).
        frees: kept nodes that nothing needs after this pass.
    """

    target: int
    keeps: bool
    statistics: tuple[int, ...]
    steps: tuple[int, ...]
    reads: tuple[int, ...]
    streams: tuple[int, ...]
    frees: tuple[int, ...]


def kept_by_need(program: Program) -> frozenset[int]:
    """The nodes that must be kept whatever else is: the inputs, and keys and values."""
    return frozenset(program.inputs) | {entry for node in program.nodes for entry in node.maps}


def passes(program: Program, kept: Collection[int], known: Collection[int] = ()) -> tuple[Pass, ...]:
    """The passes that compute a program's output when certain maps are kept between them.

    Between two passes a layer is computed anew, window by window, from the nearest kept maps; the fewer are kept, the
    more is computed and the less memory it takes.

    Args:
        program: what to run.
        kept: nodes whose maps are kept once computed; those that must be are added.
        known: statistics that are known beforehand, or found otherwise, and not pooled.
    """
    stored = kept_by_need(program) | frozenset(kept)
    pooled: dict[int, list[int]] = {}
    for index, statistic in enumerate(program.statistics):
        if index in known:
            continue
        pooled.setdefault(statistic.of, []).append(index)
    # An input needs no pass to be computed, but one where something is pooled over it.
    targets = [
        index
        for index, node in enumerate(program.nodes)
        if index in pooled or (node.op is not None and (index in stored or index == program.output))
    ]
    traced = [_trace(program, target, stored) for target in targets]
    last: dict[int, int] = {}
    for number, (_, reads, streams) in enumerate(traced):
        last |= dict.fromkeys((*reads, *streams), number)
    return tuple(
        Pass(
            target=target,
            keeps=target in stored or target == program.output,
            statistics=tuple(pooled.get(target, ())),
            steps=steps,
            reads=reads,
            streams=streams,
            frees=tuple(sorted(node for node, at in last.items() if at == number)),
        )
        for number, (target, (steps, reads, streams)) in enumerate(zip(targets, traced, strict=True))
    )


def _trace(
    program: Program, target: int, stored: Collection[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What is computed for a window of a node, what is read for it, and what is read whole."""
    if program.nodes[target].op is None:
        return (), (target,), ()
    steps, reads, streams, waiting = set[int](), set[int](), set[int](), [target]
    while waiting:
        index = waiting.pop()
        if index in steps:
            continue
        steps.add(index)
        streams.update(program.nodes[index].maps)
        for entry in program.nodes[index].inputs:
            if entry in stored:
                reads.add(entry)
            else:
                waiting.append(entry)
    return tuple(sorted(steps)), tuple(sorted(reads)), tuple(sorted(streams))
