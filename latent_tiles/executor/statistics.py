"""What a layer must know of a whole map before it can work on a part of it, pooled window by window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Pool(Protocol):
    """Gathers one statistic from windows that do not overlap."""

    def add(self, values: Float[Tensor, "rows channels height width"]) -> None:
        """Take in one window."""
        ...

    def result(self) -> Any:
        """The statistic of everything taken in."""
        ...


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each group of channels over a whole map, float64 on the CPU."""

    mean: Float[Tensor, "rows groups"]
    variance: Float[Tensor, "rows groups"]


@dataclass
class MomentPool:
    """Pools the moments of groups of channels: float32 in a window, merged in float64.

    Args:
        groups: number of groups; must divide the channels.

    Source:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979): the
        variance of a union is the mean of the variances plus the variance of the means, both weighted by count.
    """

    groups: int
    _windows: list[tuple[int, Tensor, Tensor]] = field(default_factory=list[tuple[int, Tensor, Tensor]])

    def add(self, values: Float[Tensor, "rows channels height width"]) -> None:
        """Take in one window."""
        rows, channels = values.shape[:2]
        positions = values.shape[2] * values.shape[3]
        # A group norm's statistics are many times as fast as `var_mean` on a CPU, but for channels-last windows they
        # subtract squares, which loses digits where a group's mean is large beside its deviation. So each group is
        # shifted near zero first. eps=0 gives back the variance as it is, 1/inf for a constant window included.
        offset = values[:, :, 0, 0].float().unflatten(1, (self.groups, -1)).mean(-1)
        shifted = values.float() - offset.repeat_interleave(channels // self.groups, dim=1)[:, :, None, None]
        layout = torch.channels_last if shifted.stride(1) == 1 else torch.contiguous_format
        shifted = shifted.contiguous(memory_format=layout)
        statistics: Any = torch.native_group_norm
        _, mean, inverse = statistics(shifted, None, None, rows, channels, positions, self.groups, 0.0)
        self._windows.append((positions, mean.view(rows, -1) + offset, inverse.view(rows, -1)))

    def result(self) -> Moments:
        """The moments of everything taken in."""
        device = torch.device("cpu")
        counts = torch.tensor([count for count, _, _ in self._windows], dtype=torch.float64)[:, None, None]
        mean = torch.stack([entry[1] for entry in self._windows]).to(device).double()
        variance = torch.stack([entry[2] for entry in self._windows]).to(device).double() ** -2
        weights = counts / counts.sum()
        total = (weights * mean).sum(0)
        return Moments(mean=total, variance=(weights * (variance + (mean - total) ** 2)).sum(0))


@dataclass
class SumPool:
    """Pools a sum over all positions of what a function makes of a window: float32 in a window, merged in float64.

    Args:
        summand: from a window to the sum over its positions.
    """

    summand: Any
    _total: Tensor | None = None

    def add(self, values: Float[Tensor, "rows channels height width"]) -> None:
        """Take in one window."""
        part: Tensor = self.summand(values).to("cpu").double()
        self._total = part if self._total is None else self._total + part

    def result(self) -> Tensor:
        """The sum of everything taken in, float64 on the CPU."""
        if self._total is None:
            raise ValueError("nothing was pooled")
        return self._total
