"""The kinds of layer that the executor can run window by window.

Each says, on one axis at a time, how long its output is and which part of its inputs a part of the output reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_tiles.errors import ProgramError
from latent_tiles.executor.attention import KeyValues, attend
from latent_tiles.executor.leaves import Border, convolve, normalise
from latent_tiles.executor.statistics import Moments
from latent_tiles.geometry import Box, Size, Span


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where one call of an op lies.

    Args:
        box: the part of the output to make.
        sizes: sizes of the input maps.
        boxes: the parts of the inputs that are given, exactly what `reach` asked for.
    """

    box: Box
    sizes: tuple[Size, ...]
    boxes: tuple[Box, ...]


@runtime_checkable
class Op(Protocol):
    """One layer."""

    def length(self, axis: int, lengths: tuple[int, ...]) -> int:
        """Length of the output on an axis (0 height, 1 width), from the lengths of the inputs."""
        ...

    def reach(self, axis: int, span: Span, lengths: tuple[int, ...]) -> tuple[Span, ...]:
        """The span of each input that a span of the output reads, within the maps."""
        ...

    def run(self, window: Window, values: Sequence[Tensor], fact: Any) -> Tensor:
        """The output in the window's box.

        Args:
            window: where it lies.
            values: the inputs in the window's boxes.
            fact: the pooled statistic, or the keys and values, that the op was declared to need; None without one.
        """
        ...

    def flops(self, channels_in: tuple[int, ...], channels_out: int) -> float:
        """Floating point operations for one position of the output, attention's scores aside."""
        ...


PointFunction = (
    Callable[[Tensor], Tensor] | Callable[[Tensor, Tensor], Tensor] | Callable[[Tensor, Tensor, Tensor], Tensor]
)
"""A function of one to three maps at the same position."""


class Pointwise:
    """A function of the inputs at the same position: activations, sums, 1 x 1 layers, norms over channels.

    Args:
        function: from the inputs' windows to the output's.
        flops: operations for one position.
    """

    def __init__(self, function: PointFunction, *, flops: float = 0.0) -> None:
        self._function: Callable[..., Tensor] = function
        self._flops = flops

    def length(self, axis: int, lengths: tuple[int, ...]) -> int:
        """As the inputs, which must agree.

        Raises:
            ProgramError: inputs of different lengths.
        """
        if len(set(lengths)) != 1:
            raise ProgramError(f"inputs of one layer differ in {'height' if axis == 0 else 'width'}: {lengths}")
        return lengths[0]

    def reach(self, axis: int, span: Span, lengths: tuple[int, ...]) -> tuple[Span, ...]:
        """The same span."""
        del axis
        return (span,) * len(lengths)

    def run(self, window: Window, values: Sequence[Tensor], fact: Any) -> Tensor:
        """Apply the function."""
        del window, fact
        return self._function(*values)

    def flops(self, channels_in: tuple[int, ...], channels_out: int) -> float:
        """As declared."""
        del channels_in, channels_out
        return self._flops


class Norm(Pointwise):
    """A group norm with the statistics of the whole map.

    Args:
        module: the norm, called as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(lambda values: values)
        self._module = module

    def run(self, window: Window, values: Sequence[Tensor], fact: Moments) -> Tensor:
        """Normalise by the pooled moments."""
        del window
        return normalise(self._module, values[0], fact)


class WithFact(Pointwise):
    """A function of one input at the same position and of a pooled statistic.

    Args:
        function: from the window and the statistic to the output's window.
    """

    def __init__(self, function: Callable[[Tensor, Any], Tensor], *, flops: float = 0.0) -> None:
        super().__init__(lambda values: values, flops=flops)
        self._with_fact = function

    def run(self, window: Window, values: Sequence[Tensor], fact: Any) -> Tensor:
        """Apply the function."""
        del window
        return self._with_fact(values[0], fact)


class Attention(Pointwise):
    """Queries at every position attend to keys and values of the whole map.

    Args:
        heads: number of heads; must divide the channels.
    """

    def __init__(self, *, heads: int) -> None:
        super().__init__(lambda values: values)
        self.heads = heads

    def run(self, window: Window, values: Sequence[Tensor], fact: KeyValues) -> Tensor:
        """Attend, with no more keys on the device at a time than fit."""
        del window
        result = attend(values[0], fact, heads=self.heads)
        # With one row in the batch the stride over rows may be anything, and a convolution would then take the layout
        # for channels first, in which all that follows is slower.
        return result.clone(memory_format=torch.channels_last)


class Convolution:
    """A convolution, zero padded at the map's border only.

    Args:
        module: the layer, called as it is.
        pads: zeros at (top, bottom, left, right); None takes the module's own padding.

    Raises:
        ProgramError: a padding other than zeros, or one given by name.
    """

    def __init__(self, module: nn.Module, pads: tuple[int, int, int, int] | None = None) -> None:
        self.module = module
        settings: Any = getattr(module, "base_layer", module)
        if settings.padding_mode != "zeros":
            raise ProgramError(f"padding_mode={settings.padding_mode!r} cannot be tiled; only 'zeros'")
        if isinstance(settings.padding, str):
            raise ProgramError(f"padding={settings.padding!r} cannot be tiled; give it as numbers")
        self.kernel = Size(*settings.kernel_size[-2:])
        self.stride = Size(*settings.stride[-2:])
        self.dilation = Size(*settings.dilation[-2:])
        own = tuple(settings.padding[-2:])
        self.pads = pads or (own[0], own[0], own[1], own[1])
        self._groups = int(settings.groups)

    def length(self, axis: int, lengths: tuple[int, ...]) -> int:
        """The number of places where the kernel fits."""
        before, after = self.pads[2 * axis : 2 * axis + 2]
        return (lengths[0] + before + after - self._extent(axis)) // self.stride[axis] + 1

    def reach(self, axis: int, span: Span, lengths: tuple[int, ...]) -> tuple[Span, ...]:
        """What the kernel reads, without the zeros beyond the border."""
        start, stop = self._reads(axis, span)
        start, stop = max(0, start), min(lengths[0], stop)
        return (Span(start, stop - start),)

    def run(self, window: Window, values: Sequence[Tensor], fact: Any) -> Tensor:
        """Convolve, with zeros where the kernel reads beyond the map."""
        del fact
        top, bottom = self._reads(0, Span(window.box.top, window.box.height))
        left, right = self._reads(1, Span(window.box.left, window.box.width))
        size = window.sizes[0]
        border = Border(max(0, -top), max(0, bottom - size.height), max(0, -left), max(0, right - size.width))
        return convolve(self.module, values[0], border, self.kernel)

    def flops(self, channels_in: tuple[int, ...], channels_out: int) -> float:
        """Two for each multiply-add."""
        return 2.0 * self.kernel.area * channels_in[0] * channels_out / self._groups

    def _extent(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def _reads(self, axis: int, span: Span) -> tuple[int, int]:
        start = span.start * self.stride[axis] - self.pads[2 * axis]
        return start, start + (span.length - 1) * self.stride[axis] + self._extent(axis)


class _Finer:
    """An op whose output is finer than its input by a whole factor."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def length(self, axis: int, lengths: tuple[int, ...]) -> int:
        """The input's times the factor."""
        del axis
        return lengths[0] * self.factor

    def reach(self, axis: int, span: Span, lengths: tuple[int, ...]) -> tuple[Span, ...]:
        """The coarse positions that the fine span touches."""
        del axis, lengths
        start, stop = span.start // self.factor, -(-span.stop // self.factor)
        return (Span(start, stop - start),)

    def run(self, window: Window, values: Sequence[Tensor], fact: Any) -> Tensor:
        """Refine, and cut off what the ends of the span do not need."""
        del fact
        fine = self._refine(values[0])
        top = window.box.top - window.boxes[0].top * self.factor
        left = window.box.left - window.boxes[0].left * self.factor
        return fine[:, :, top : top + window.box.height, left : left + window.box.width]

    def flops(self, channels_in: tuple[int, ...], channels_out: int) -> float:
        """None that count."""
        del channels_in, channels_out
        return 0.0

    def _refine(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class Upsample(_Finer):
    """Each position becomes a square of `factor` by `factor` (nearest neighbour)."""

    def _refine(self, values: Tensor) -> Tensor:
        return F.interpolate(values, scale_factor=float(self.factor), mode="nearest")


class DepthToSpace(_Finer):
    """`factor` squared channels become a square of positions (pixel shuffle)."""

    def _refine(self, values: Tensor) -> Tensor:
        return F.pixel_shuffle(values, self.factor)


class _Coarser:
    """An op whose output is coarser than its input by a whole factor."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def length(self, axis: int, lengths: tuple[int, ...]) -> int:
        """The input's over the factor."""
        del axis
        return lengths[0] // self.factor

    def reach(self, axis: int, span: Span, lengths: tuple[int, ...]) -> tuple[Span, ...]:
        """The fine positions under the coarse span."""
        del axis, lengths
        return (Span(span.start * self.factor, span.length * self.factor),)

    def run(self, window: Window, values: Sequence[Tensor], fact: Any) -> Tensor:
        """Coarsen."""
        del window, fact
        return self._coarsen(values[0])

    def flops(self, channels_in: tuple[int, ...], channels_out: int) -> float:
        """None that count."""
        del channels_in, channels_out
        return 0.0

    def _coarsen(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class SpaceToDepth(_Coarser):
    """A square of positions becomes `factor` squared channels (pixel unshuffle).

    Args:
        factor: side of the square; lengths must be multiples of it.
    """

    def length(self, axis: int, lengths: tuple[int, ...]) -> int:
        """The input's over the factor.

        Raises:
            ProgramError: it is not a multiple.
        """
        if lengths[0] % self.factor:
            name, nearest = ("height", "width")[axis], lengths[0] // self.factor * self.factor
            msg = f"a map's {name} of {lengths[0]} is not a multiple of {self.factor}; "
            raise ProgramError(msg + f"pad or crop it, e.g. to {nearest}")
        return lengths[0] // self.factor

    def _coarsen(self, values: Tensor) -> Tensor:
        return F.pixel_unshuffle(values, self.factor)


class Subsample(_Coarser):
    """The upper left position of each square of `factor` by `factor` (nearest neighbour)."""

    def _coarsen(self, values: Tensor) -> Tensor:
        return values[:, :, :: self.factor, :: self.factor]


class AveragePool(_Coarser):
    """The mean of each square of `factor` by `factor` positions; a rest at the lower or right border is left out."""

    def _coarsen(self, values: Tensor) -> Tensor:
        return F.avg_pool2d(values, self.factor)
