"""Call a module of a network on one window of its map.

A window brings the neighbourhood that the layer reads, so zeros belong only where the window touches the map's border,
and a group norm takes statistics of the whole map. Both are answered where the module calls torch, not by reading its
weights: whatever casts, moves, quantises or adapts those in the module's own call stays in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latent_tiles.errors import ExecutorError
from latent_tiles.executor.statistics import Moments


class Border(NamedTuple):
    """Rows and columns of zeros that a window needs because it touches the border of its map."""

    top: int
    bottom: int
    left: int
    right: int


def convolve(
    module: nn.Module, values: Float[Tensor, "rows channels height width"], border: Border, kernel: tuple[int, int]
) -> Float[Tensor, "rows out_channels out_height out_width"]:
    """Call a convolution on a window, with zeros only at the map's border.

    A three-dimensional causal convolution is taken for one frame: only the last tap in time sees it.

    Args:
        module: a 2-D convolution, or a causal 3-D one, or a wrapper of one (LoRA, quantisation).
        values: the window with all that the kernel reads.
        border: zeros to add.
        kernel: height and width of the kernel; inner convolutions of another size (LoRA's second) get no zeros.

    Raises:
        ExecutorError: the module's weights are on another device than the window.
    """
    weight: Any = getattr(module, "weight", None)
    three = isinstance(weight, Tensor) and weight.ndim == 5
    with _Windowed(border=border, kernel=kernel, moments=None):
        result: Tensor = module(values.unsqueeze(2) if three else values)
    return result.squeeze(2) if three else result


def normalise(
    module: nn.Module, values: Float[Tensor, "rows channels height width"], moments: Moments
) -> Float[Tensor, "rows channels height width"]:
    """Call a group norm on a window, with the statistics of the whole map."""
    with _Windowed(border=None, kernel=None, moments=moments):
        return module(values)


class _Windowed(TorchFunctionMode):
    def __init__(self, *, border: Border | None, kernel: tuple[int, int] | None, moments: Moments | None) -> None:
        super().__init__()
        self._border, self._kernel, self._moments = border, kernel, moments

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._border is not None:
            if func in (F.conv2d, F.conv3d):
                return self._convolve(*args, **kwargs)
            if func is F.pad:
                # A causal convolution pads by itself before it convolves; the border is ours.
                return args[0]
        if func is F.group_norm and self._moments is not None:
            return _group_norm(self._moments, *args, **kwargs)
        return func(*args, **kwargs)

    def _convolve(
        self,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if weight.ndim == 5:
            # One frame of a causal 3-D convolution: only the last tap in time sees it.
            stride, dilation = _last_two(stride), _last_two(dilation)
            flat = self._convolve(values.squeeze(2), weight[:, :, -1], bias, stride, 0, dilation, groups)
            return flat.unsqueeze(2)
        if weight.device != values.device:
            msg = (
                f"a convolution's weights are on {weight.device}, its input on {values.device}; move the model there, "
            )
            raise ExecutorError(msg + "or offload it by model or by leaf (offload_type='leaf_level')")
        border = self._border
        assert border is not None
        if tuple(weight.shape[2:]) != self._kernel:
            return F.conv2d(values, weight, bias, stride, padding, dilation, groups)
        if border.top == border.bottom and border.left == border.right:
            return F.conv2d(values, weight, bias, stride, (border.top, border.left), dilation, groups)
        padded = F.pad(values, (border.left, border.right, border.top, border.bottom))
        return F.conv2d(padded, weight, bias, stride, 0, dilation, groups)


def _last_two(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)[-2:]


def _group_norm(
    moments: Moments,
    values: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise by given moments as one affine map per channel, in float32."""
    channels = values.shape[1]
    per_group = channels // num_groups
    factor = torch.rsqrt(moments.variance + eps)
    shift = -moments.mean * factor
    factor, shift = (
        value.to(values.device, torch.float32).repeat_interleave(per_group, dim=1) for value in (factor, shift)
    )
    if weight is not None:
        factor, shift = factor * weight.float(), shift * weight.float()
    if bias is not None:
        shift = shift + bias.float()
    shape = (*factor.shape, *(1,) * (values.ndim - 2))
    return torch.addcmul(shift.view(shape), values.float(), factor.view(shape)).to(values.dtype)
