"""Statistics of large maps from patches of them, spread over the frame.

The patches are computed side by side, layer after layer, each with all that its kernels read, so that what is sampled
is exact but for the choice of places.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latent_tiles.errors import BudgetError
from latent_tiles.executor.cost import pass_cost, working_values
from latent_tiles.executor.evaluate import crop
from latent_tiles.executor.plan import Budget, Plan, Speed, Work
from latent_tiles.executor.program import Program
from latent_tiles.executor.run import Run
from latent_tiles.executor.schedule import Pass
from latent_tiles.geometry import Box, Size

_PATCH = 2
"""Side of a patch, in positions of the coarsest map. What is near is alike, so many small patches say more than few
large ones of the same cost."""
_FEWEST, _MOST = 16, 400
_MIB = 2**20
_PATCH_BYTES = 2**28
"""What all patches of a pass take together at most; more of them than that buys would say little more."""


def sampled_statistics(program: Program, task: Pass, facts: Collection[int]) -> tuple[int, ...]:
    """The statistics that a pass needs and that are not known yet."""
    needed = (program.nodes[index].statistic for index in task.steps)
    return tuple(sorted({index for index in needed if index is not None and index not in facts}))


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Where a pass is sampled, and what that costs.

    Args:
        boxes: parts of the pass's target.
        values: values that all of them take at the worst moment, for one row of the batch.
        flops: operations, for one row.
    """

    boxes: tuple[Box, ...]
    values: int
    flops: float


def patches_of(program: Program, task: Pass, sizes: Sequence[Size], most_values: int) -> Patches:
    """Where to sample a pass: as many patches as fit, but no more work than half the pass itself.

    Args:
        program: the layers.
        task: the pass.
        sizes: sizes of all maps.
        most_values: values that all patches may take together, for one row of the batch.
    """
    target = sizes[task.target]
    side = max(1, round(_PATCH * target.height / min(size.height for size in sizes)))
    each = max(1, working_values(program, task, sizes, side, chunk_tokens=1))
    all_of_them = pass_cost(program, task, sizes, side)
    flops = all_of_them.flops / all_of_them.windows
    half = pass_cost(program, task, sizes, max(target)).flops / 2
    count = max(_FEWEST, min(_MOST, most_values // each, int(half / max(flops, 1.0))))
    boxes = tuple(spread_boxes(target, side, count))
    return Patches(boxes=boxes, values=each * len(boxes), flops=flops * len(boxes))


def with_patches(made: Plan, work: Work, budget: Budget, speed: Speed) -> Plan:
    """A plan of mode "sampled" with what its patches cost.

    Raises:
        BudgetError: the fewest patches take more than there is for windows.
    """
    if not work.sampled:
        return made
    per_value = work.rows * work.itemsize * budget.kernel_share
    most_bytes = min(_PATCH_BYTES, budget.window_bytes)
    found = set[int]()
    held, flops = made.window_bytes, 0.0
    for task in made.passes:
        wanted = sampled_statistics(work.program, task, found)
        found.update((*wanted, *task.statistics))
        if not wanted:
            continue
        patches = patches_of(work.program, task, made.sizes, int(most_bytes / per_value))
        taken = int(patches.values * per_value)
        if taken > budget.window_bytes:
            msg = f"the {len(patches.boxes)} patches of mode 'sampled' take {taken / _MIB:.1f} MiB, more than the "
            msg += f"{budget.window_bytes / _MIB:.1f} MiB that are left for them; "
            raise BudgetError(msg + f"give device_budget_mib >= {math.ceil(taken / _MIB)}")
        held, flops = max(held, taken), flops + patches.flops * work.rows
    return replace(
        made,
        window_bytes=held,
        flops=made.flops + flops,
        seconds=made.seconds + flops / speed.flops,
        patch_values=int(most_bytes / per_value),
    )


def estimate(run: Run, task: Pass, wanted: Sequence[int]) -> None:
    """Estimate statistics from patches of the maps that a pass computes.

    Args:
        run: gives the maps; learns each statistic as soon as it is estimated, since later layers need it.
        task: the pass.
        wanted: numbers of the statistics.
    """
    program, sizes = run.program, run.plan.sizes
    patches = patches_of(program, task, sizes, run.plan.patch_values).boxes
    evaluate = run.evaluator(task)
    boxes = [evaluate.boxes(patch) for patch in patches]
    values: list[dict[int, Tensor]] = [{} for _ in patches]
    pools = {index: program.statistics[index].pool() for index in wanted}
    last = max(program.statistics[index].of for index in wanted)
    for step in task.steps:
        if step > last:
            break
        for patch_boxes, patch_values in zip(boxes, values, strict=True):
            evaluate.step(step, patch_boxes, patch_values)
        for index in wanted:
            if program.statistics[index].of == step:
                sampled = 0
                for patch, patch_boxes, patch_values in zip(patches, boxes, values, strict=True):
                    own = core(patch, sizes[task.target], sizes[step], patch_boxes[step])
                    if own is not None:
                        pools[index].add(crop(patch_values[step], patch_boxes[step], own))
                        sampled += own.area
                found = pools[index].result()
                # A sum over the patches stands for one over the map.
                run.facts[index] = found * (sizes[step].area / sampled) if isinstance(found, Tensor) else found


def spread_boxes(size: Size, side: int, count: int) -> list[Box]:
    """Boxes of one side, one at a random place in each cell of a grid over a map; they do not overlap."""
    rows = max(1, min(size.height // side, round(math.sqrt(count * size.height / size.width))))
    columns = max(1, min(size.width // side, count // rows))
    generator = torch.Generator().manual_seed(0)
    boxes = list[Box]()
    for row in range(rows):
        for column in range(columns):
            top, bottom = row * size.height // rows, (row + 1) * size.height // rows
            left, right = column * size.width // columns, (column + 1) * size.width // columns
            height, width = min(side, bottom - top), min(side, right - left)
            down, across = torch.rand(2, generator=generator).tolist()
            place = (top + int(down * (bottom - top - height + 1)), left + int(across * (right - left - width + 1)))
            boxes.append(Box(*place, height, width))
    return boxes


def core(window: Box, target: Size, size: Size, have: Box) -> Box | None:
    """The part of another map that belongs to a window of the target alone: over all windows, each position once.

    Args:
        window: a box of the target's map.
        target: size of that map.
        size: size of the other map.
        have: the box of the other map that was computed.
    """

    def scaled(position: int, axis: int) -> int:
        return -(-position * size[axis] // target[axis])

    top, bottom = scaled(window.top, 0), scaled(window.bottom, 0)
    left, right = scaled(window.left, 1), scaled(window.right, 1)
    return Box(top, left, bottom - top, right - left).intersection(have)
