"""Choose how to run a program within budgets: which maps are kept, where, and how large windows are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from latent_tiles.errors import BudgetError
from latent_tiles.executor.cost import pass_cost, window_side, working_values
from latent_tiles.executor.program import Mark, Program
from latent_tiles.executor.schedule import Pass, passes
from latent_tiles.executor.spill import Place, place_maps
from latent_tiles.geometry import Size

_MIB = 2**20
_LEAST_WINDOW_VALUES = 2**14
_SMALL_MAP = 16
"""A map this many times smaller than the largest is always kept: recomputing it would save nothing."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a machine does in a second.

    Args:
        flops: operations of convolutions.
        attention_flops: operations of attention.
        host_bytes: bytes read from or written to maps in memory.
        disk_bytes: bytes read from or written to maps on disk.
    """

    flops: float
    attention_flops: float
    host_bytes: float
    disk_bytes: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may take.

    Args:
        window_bytes: what windows may take on the device.
        kernel_share: what windows take in all over what their tensors take; the rest is the library's, inside kernels.
        device_bytes: what kept maps may take on the device, beside the windows.
        host_bytes: what kept maps may take in memory.
        disk_bytes: what kept maps may take on disk.
        seconds: how long it may be predicted to take; None for no limit.
        window_values: most values of one tensor in a window; None for what `window_bytes` allows.
        wide_window_values: the same where layers are run one after another between kept maps, so that their borders add
            up; None for `window_values`.
    """

    window_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float | None = None
    window_values: int | None = None
    wide_window_values: int | None = None
    kernel_share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a program is run, and what that costs.

    Args:
        keeps: which maps are kept between passes, in a word: "all", "blocks and
            layers", "blocks", "blocks, then stages", "stages", "small".
        passes: the passes, in order.
        sides: the longest side of a window of each pass.
        places: where each kept map lies.
        held: most bytes of kept maps in each place.
        window_bytes: bytes that windows take at the worst moment.
        chunk_tokens: keys that an attention has on the device at a time.
        sizes: the size of every node's map.
        windows: number of windows in all passes.
        flops: operations of all layers but attention's scores.
        attention_flops: operations of attention.
        moved: bytes read from and written to kept maps and inputs.
        seconds: predicted time.
        patch_values: values, for one row of the batch, that patches of large maps may take together where their
            statistics are sampled.
    """

    keeps: str
    passes: tuple[Pass, ...]
    sides: tuple[int, ...]
    places: Mapping[int, Place]
    held: Mapping[Place, int]
    window_bytes: int
    chunk_tokens: int
    sizes: tuple[Size, ...]
    windows: int
    flops: float
    attention_flops: float
    moved: int
    seconds: float
    patch_values: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be planned.

    Args:
        program: the layers.
        sizes: the size of every node's map.
        rows: size of the batch.
        itemsize: bytes of a value.
        keys: most keys that an attention reads; None for all.
        sampled: the statistics of large maps are found otherwise: one choice, which keeps only small maps.
    """

    program: Program
    sizes: tuple[Size, ...]
    rows: int
    itemsize: int
    keys: int | None = None
    sampled: bool = False

    @property
    def barriers(self) -> frozenset[int]:
        """The computed nodes whose whole map a later layer must know something of."""
        return frozenset(entry.of for entry in self.program.statistics) - frozenset(self.program.inputs)

    def map_bytes(self, node: int) -> int:
        """Bytes of a node's whole map."""
        return self.rows * self.program.nodes[node].channels * self.sizes[node].area * self.itemsize


def choices(work: Work) -> Iterator[tuple[str, frozenset[int]]]:
    """Which maps may be kept between passes, from the fastest choice to the one with the least memory.

    Small maps are kept in all of them.
    """
    nodes = work.program.nodes
    barriers = work.barriers
    inner = [index for index, node in enumerate(nodes) if node.op is not None]
    widest = max(work.sizes[index].area for index in inner)
    small = small_maps(work)
    if work.sampled:
        yield "small", small
        return
    layers = frozenset(index for index in inner if nodes[index].mark >= Mark.LAYER)
    blocks = frozenset(index for index in inner if nodes[index].mark >= Mark.BLOCK)
    stages = frozenset(index for index in inner if nodes[index].mark >= Mark.STAGE)
    coarse = frozenset(index for index in inner if work.sizes[index].area * 4 < widest)
    seen = set[frozenset[int]]()
    for name, kept in (
        ("all", barriers),
        ("blocks and layers", small | layers),
        ("blocks", small | blocks),
        ("blocks, then stages", small | (blocks & coarse) | stages),
        ("stages", small | frozenset(index for index in stages if work.sizes[index].area < widest)),
        ("small", small),
    ):
        # What comes after the last barrier needs no keeping.
        useful = frozenset(index for index in kept if index < max(barriers, default=0) or index in barriers)
        if useful not in seen:
            seen.add(useful)
            yield name, useful


def small_maps(work: Work) -> frozenset[int]:
    """The nodes with a statistic whose maps are so small that they are always kept."""
    nodes = work.program.nodes
    largest = max(work.map_bytes(index) for index, node in enumerate(nodes) if node.op is not None)
    return frozenset(index for index in work.barriers if work.map_bytes(index) * _SMALL_MAP <= largest)


def sampled(work: Work) -> frozenset[int]:
    """The statistics that are found otherwise when `work.sampled`: those of maps that are not small."""
    if not work.sampled:
        return frozenset()
    small = small_maps(work)
    return frozenset(index for index, entry in enumerate(work.program.statistics) if entry.of not in small)


def plan(work: Work, budget: Budget, speed: Speed) -> Plan:
    """The plan that is predicted to be the fastest of those within the budget.

    Raises:
        BudgetError: there is none; the message names the smallest budget that would do.
    """
    if not work.program.statistics and not work.program.attends:
        candidates = [("all", frozenset[int]())]
    else:
        candidates = list(choices(work))
    room: dict[Place, int] = {"device": budget.device_bytes, "host": budget.host_bytes, "disk": budget.disk_bytes}
    known = sampled(work)
    made = list[Plan]()
    short = list[int]()
    narrow: BudgetError | None = None
    for name, kept in candidates:
        sweeps = passes(work.program, kept, known)
        order = _order(work, sweeps)
        sizes = {node: work.map_bytes(node) for node, _ in order if node is not None}
        placed = place_maps(sizes, order, room)
        if placed is None:
            everything = place_maps(sizes, order, {"host": sum(sizes.values())})
            assert everything is not None
            short.append(everything[1]["host"])
            continue
        try:
            made.append(_costed(work, name, sweeps, *placed, budget, speed))
        except BudgetError as error:
            # Fewer kept maps mean wider borders, so larger windows.
            narrow = narrow or error
            continue
        if not made[-1].held.get("disk"):
            # Those that follow keep less and compute more; only a disk may be slower than that.
            break
    if not made and narrow is not None:
        raise narrow
    if not made:
        raise BudgetError(_too_little_room(budget, min(short)))
    best = min(made, key=lambda entry: entry.seconds)
    if budget.seconds is not None and best.seconds > budget.seconds:
        msg = f"the fastest way within these budgets is predicted to take {best.seconds:.0f} s, more than the "
        msg += f"{budget.seconds:.0f} s given"
        if best.attention_flops > best.flops:
            msg += "; most of it is attention over the whole frame, which attention_keys would bound"
        raise BudgetError(msg + f"; give at least {math.ceil(best.seconds)} s, or mode='sampled'")
    return best


def _too_little_room(budget: Budget, least: int) -> str:
    given = budget.device_bytes + budget.host_bytes + budget.disk_bytes
    return (
        f"the maps between passes take at least {least / _MIB:.1f} MiB, more than the {given / _MIB:.1f} MiB of the "
        f"budgets for memory and disk; give at least {math.ceil(least / _MIB)} MiB in one of them "
        "(ram_budget_mib, spill_budget_mib), or use mode='sampled'"
    )


def _order(work: Work, sweeps: Sequence[Pass]) -> list[tuple[int | None, tuple[int, ...]]]:
    return [
        (sweep.target if sweep.keeps and sweep.steps and sweep.target != work.program.output else None, sweep.frees)
        for sweep in sweeps
    ]


def fit_windows(
    work: Work, sweeps: Sequence[Pass], budget: Budget, *, wide: bool = False
) -> tuple[tuple[int, ...], int, int]:
    """The longest sides of windows, and the keys at a time, that keep windows within their budget.

    Returns:
        The side for each pass, keys at a time, and the bytes that windows take at the worst moment.

    Raises:
        BudgetError: not even the smallest windows do.
    """
    limit = (budget.wide_window_values if wide else None) or budget.window_values
    if limit is None:
        limit = max(_LEAST_WINDOW_VALUES, budget.window_bytes // (work.rows * work.itemsize))
    while True:
        sides, chunk, taken = _windows_for(work, sweeps, limit, budget)
        if taken <= budget.window_bytes:
            return sides, chunk, taken
        if limit <= _LEAST_WINDOW_VALUES:
            least = _least_window_bytes(work, sweeps, budget, taken)
            msg = f"windows take at least {least / _MIB:.1f} MiB, more than the {budget.window_bytes / _MIB:.1f} MiB "
            raise BudgetError(msg + f"that are left for them; give device_budget_mib >= {math.ceil(least / _MIB)}")
        limit = max(_LEAST_WINDOW_VALUES, min(limit - 1, int(limit * max(0.5, 0.95 * budget.window_bytes / taken))))


def _least_window_bytes(work: Work, sweeps: Sequence[Pass], budget: Budget, taken: int) -> int:
    """The smallest budget for windows that holds; attention takes a part of whatever budget there is."""
    least = taken
    while (needed := _windows_for(work, sweeps, _LEAST_WINDOW_VALUES, replace(budget, window_bytes=least))[2]) > least:
        least = needed
    return least


def _windows_for(work: Work, sweeps: Sequence[Pass], limit: int, budget: Budget) -> tuple[tuple[int, ...], int, int]:
    chunk = _chunk_tokens(work, int(budget.window_bytes / budget.kernel_share))
    sides = tuple(window_side(work.program, sweep, work.sizes, limit) for sweep in sweeps)
    taken = max(
        working_values(work.program, sweep, work.sizes, side, chunk_tokens=chunk)
        for sweep, side in zip(sweeps, sides, strict=True)
    )
    return sides, chunk, int(taken * work.rows * work.itemsize * budget.kernel_share)


def _chunk_tokens(work: Work, window_bytes: int) -> int:
    """Keys and values at a time: all of them where they take a quarter of the windows' budget, else fewer."""
    attending = [node for node in work.program.nodes if node.maps]
    if not attending:
        return 1
    channels = max(node.channels for node in attending)
    tokens = max(work.sizes[node.maps[0]].area for node in attending)
    affordable = window_bytes // 4 // (2 * channels * work.rows * work.itemsize)
    # Chunks also need copies in float32 and scores.
    return affordable if affordable >= tokens else max(16, affordable // 5)


def _costed(
    work: Work,
    name: str,
    sweeps: tuple[Pass, ...],
    places: Mapping[int, Place],
    held: Mapping[Place, int],
    budget: Budget,
    speed: Speed,
) -> Plan:
    wide = name != "all" or not work.program.statistics
    sides, chunk, taken = fit_windows(work, sweeps, budget, wide=wide)
    costs = [
        pass_cost(work.program, sweep, work.sizes, side, work.keys) for sweep, side in zip(sweeps, sides, strict=True)
    ]
    flops = work.rows * sum(cost.flops for cost in costs)
    attention = work.rows * sum(cost.attention_flops for cost in costs)
    moved = work.rows * work.itemsize * sum(cost.values_moved for cost in costs)
    on_disk = sum(2 * work.map_bytes(node) for node, place in places.items() if place == "disk")
    seconds = flops / speed.flops + attention / speed.attention_flops
    seconds += moved / speed.host_bytes + on_disk / speed.disk_bytes
    return Plan(
        keeps=name,
        passes=sweeps,
        sides=sides,
        places=places,
        held=held,
        window_bytes=taken,
        chunk_tokens=chunk,
        sizes=work.sizes,
        windows=sum(cost.windows for cost in costs),
        flops=flops,
        attention_flops=attention,
        moved=moved,
        seconds=seconds,
    )
