"""A network as a flat list of layers, each with the layers that it reads."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from latent_tiles.errors import ProgramError
from latent_tiles.executor.ops import (
    Attention,
    AveragePool,
    Convolution,
    DepthToSpace,
    Norm,
    Op,
    PointFunction,
    Pointwise,
    SpaceToDepth,
    Subsample,
    Upsample,
    WithFact,
)
from latent_tiles.executor.statistics import MomentPool, Pool
from latent_tiles.geometry import Size


class Mark(enum.IntEnum):
    """How good a place a layer's output is to be kept while later ones are computed anew from it."""

    NONE = 0
    LAYER = 1
    BLOCK = 2
    STAGE = 3


@dataclass(frozen=True, kw_only=True)
class Node:
    """One layer of a program.

    Args:
        op: what it does; None for an input of the program.
        inputs: nodes whose windows it reads.
        maps: nodes that it reads whole: keys and values.
        statistic: index of the pooled statistic that it needs.
        channels: channels of its output.
        mark: whether a costly layer, a block or a stage of the network ends here.
    """

    op: Op | None
    inputs: tuple[int, ...] = ()
    maps: tuple[int, ...] = ()
    statistic: int | None = None
    channels: int
    mark: Mark = Mark.NONE


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """Something that a later layer must know of a whole map.

    Args:
        of: the node that it is pooled over.
        pool: makes an empty pool.
    """

    of: int
    pool: Callable[[], Pool]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A network as a flat list of layers in an order in which they can be run.

    Args:
        nodes: the layers; a node reads only earlier ones.
        statistics: what is pooled over whole maps.
        inputs: the nodes that are given.
        output: the node that is wanted.
    """

    nodes: tuple[Node, ...]
    statistics: tuple[Statistic, ...]
    inputs: tuple[int, ...]
    output: int

    def sizes(self, inputs: Mapping[int, Size]) -> tuple[Size, ...]:
        """The size of every node's map, from those of the inputs.

        Raises:
            ProgramError: a map would have no positions, or sizes do not fit each other.
        """
        sizes = list[Size]()
        for index, node in enumerate(self.nodes):
            if node.op is None:
                sizes.append(inputs[index])
                continue
            size = Size(
                *(node.op.length(axis, tuple(sizes[entry][axis] for entry in node.inputs)) for axis in range(2))
            )
            if min(size) < 1:
                shapes = ", ".join(f"{given.height} x {given.width}" for given in inputs.values())
                raise ProgramError(f"an input of {shapes} is too small: a layer inside would have no positions")
            sizes.append(size)
        return tuple(sizes)

    @property
    def attends(self) -> bool:
        """Whether some layer reads a whole map, at a cost that grows with the square of the frame."""
        return any(node.maps for node in self.nodes)


class _NoPool:
    """What is pooled where a map is only to be kept."""

    def add(self, values: Tensor) -> None:
        """Take in nothing."""

    def result(self) -> None:
        """Nothing."""


class ProgramBuilder:
    """Writes a program layer by layer; every method returns the number of the node it added."""

    def __init__(self) -> None:
        self._nodes = list[Node]()
        self._statistics = list[Statistic]()
        self._inputs = list[int]()

    def input(self, channels: int) -> int:
        """A map that is given."""
        index = self._add(Node(op=None, channels=channels))
        self._inputs.append(index)
        return index

    def channels(self, node: int) -> int:
        """Channels of a node."""
        return self._nodes[node].channels

    def convolution(self, x: int, module: nn.Module, *, pads: tuple[int, int, int, int] | None = None) -> int:
        """A convolution; `pads` are zeros at (top, bottom, left, right) in place of the module's own.

        Raises:
            ProgramError: a module that is not a convolution, or pads with something else than zeros.
        """
        settings: Any = getattr(module, "base_layer", module)
        if not isinstance(settings, (nn.Conv2d, nn.Conv3d)):
            raise ProgramError(f"{type(settings).__name__} is not a convolution that can be tiled")
        op = Convolution(module, pads)
        return self._add(Node(op=op, inputs=(x,), channels=settings.out_channels))

    def pointwise(self, function: PointFunction, *inputs: int, channels: int | None = None, flops: float = 0.0) -> int:
        """A function of nodes at the same position; as many channels as the first, unless told otherwise."""
        channels = self.channels(inputs[0]) if channels is None else channels
        return self._add(Node(op=Pointwise(function, flops=flops), inputs=inputs, channels=channels))

    def linear(self, x: int, module: nn.Module, *, channels: int) -> int:
        """A linear layer over the channels of each position."""
        flops = 2.0 * self.channels(x) * channels
        return self.pointwise(lambda values: over_channels(module, values), x, channels=channels, flops=flops)

    def group_norm(self, x: int, module: nn.Module) -> int:
        """A group norm with the statistics of the whole map.

        Raises:
            ProgramError: a module that is not a group norm.
        """
        settings: Any = getattr(module, "base_layer", module)
        if not isinstance(settings, nn.GroupNorm):
            raise ProgramError(f"{type(settings).__name__} is not a group norm")
        groups = settings.num_groups
        statistic = self.statistic(x, lambda: MomentPool(groups))
        return self._add(Node(op=Norm(module), inputs=(x,), statistic=statistic, channels=self.channels(x)))

    def statistic(self, x: int, pool: Callable[[], Pool]) -> int:
        """Declare something to be pooled over a node's whole map; returns the statistic's number."""
        self._statistics.append(Statistic(of=x, pool=pool))
        return len(self._statistics) - 1

    def checkpoint(self, x: int) -> int:
        """Have a map kept where maps are kept at all, as those are that a statistic is pooled over; returns its node.

        For networks whose norms make no map one of those: where several passes go on from one (the queries, keys and
        values of an attention), and where the layers in a row are so many that windows would need wide borders.
        """
        self.statistic(x, _NoPool)
        return x

    def with_statistic(
        self, x: int, statistic: int, function: Callable[[Tensor, Any], Tensor], *, channels: int, flops: float = 0.0
    ) -> int:
        """A function of a node at each position and of a pooled statistic."""
        op = WithFact(function, flops=flops)
        return self._add(Node(op=op, inputs=(x,), statistic=statistic, channels=channels))

    def attention(self, queries: int, keys: int, values: int, *, heads: int) -> int:
        """Every position attends to all positions."""
        op = Attention(heads=heads)
        return self._add(Node(op=op, inputs=(queries,), maps=(keys, values), channels=self.channels(values)))

    def add(self, x: int, y: int, *, divisor: float = 1.0) -> int:
        """The sum of two nodes, divided."""
        if divisor == 1.0:
            return self.pointwise(lambda a, b: a + b, x, y)
        return self.pointwise(lambda a, b: (a + b) / divisor, x, y)

    def upsample(self, x: int, factor: int = 2) -> int:
        """Nearest-neighbour enlargement."""
        return self._add(Node(op=Upsample(factor), inputs=(x,), channels=self.channels(x)))

    def average_pool(self, x: int, factor: int = 2) -> int:
        """The mean of each square."""
        return self._add(Node(op=AveragePool(factor), inputs=(x,), channels=self.channels(x)))

    def depth_to_space(self, x: int, factor: int = 2) -> int:
        """Pixel shuffle."""
        return self._add(Node(op=DepthToSpace(factor), inputs=(x,), channels=self.channels(x) // factor**2))

    def subsample(self, x: int, factor: int) -> int:
        """The upper left position of each square."""
        return self._add(Node(op=Subsample(factor), inputs=(x,), channels=self.channels(x)))

    def space_to_depth(self, x: int, factor: int = 2) -> int:
        """Pixel unshuffle."""
        return self._add(Node(op=SpaceToDepth(factor), inputs=(x,), channels=self.channels(x) * factor**2))

    def mark(self, x: int, mark: Mark) -> int:
        """Say that a block or a stage ends with this node."""
        node = self._nodes[x]
        self._nodes[x] = Node(
            op=node.op,
            inputs=node.inputs,
            maps=node.maps,
            statistic=node.statistic,
            channels=node.channels,
            mark=max(mark, node.mark),
        )
        return x

    def build(self, output: int) -> Program:
        """The program that ends with a node."""
        return Program(
            nodes=tuple(self._nodes),
            statistics=tuple(self._statistics),
            inputs=tuple(self._inputs),
            output=output,
        )

    def _add(self, node: Node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1


def over_channels(module: nn.Module, values: Tensor) -> Tensor:
    """Call a layer that works on the last axis of tokens (a linear one, a norm) on a map."""
    return module(values.movedim(1, -1)).movedim(-1, 1)
