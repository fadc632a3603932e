"""U-Nets with cross-attention: Stable Diffusion 1.x, 2.x, XL, the x4 upscaler, InstructPix2Pix.

All of them are diffusers' `UNet2DConditionModel`. The table below says which arguments lie over the canvas, which have
one row for each row of the batch, and which are the same for every tile; an argument that stands in none of the three
is refused, so that a newer diffusers cannot make tiles silently wrong.

Source of the table: the signature and body of `UNet2DConditionModel.forward` in diffusers 0.42.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latent_tiles.errors import FamilyError
from latent_tiles.geometry import Box, Size

_SPATIAL = frozenset(
    {
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    }
)
"""Feature maps of ControlNet and T2I-Adapter at 1/1, 1/2, 1/4 ... of the canvas."""

_BATCHED = frozenset(
    {
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "encoder_attention_mask",
        "added_cond_kwargs",
    }
)
"""One row for each row of the batch, or one for all."""

_MASKS = "ip_adapter_masks"
_PLAIN_CROSS_ATTENTION = frozenset({"scale", _MASKS})


class UNetCall:
    """One call of a `UNet2DConditionModel`.

    The canvas is the argument `sample`, (rows, channels, height, width); hosts may have concatenated further channels
    behind the noisy latent (the x4 upscaler its low-resolution image, InstructPix2Pix the encoded image).

    Raises:
        FamilyError: an argument that cannot be cut into tiles.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._forward, self._args, self._kwargs = forward, args, kwargs
        signature = inspect.signature(type(module).forward)
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop("self")
        self._sample: Tensor = bound.pop("sample")
        self._return_dict: bool = bound.pop("return_dict", True)
        self._arguments: dict[str, Any] = {name: value for name, value in bound.items() if value is not None}
        self._channels = int(module.config.out_channels)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        if self._sample.ndim != 4 or self._sample.shape[1] < self._channels:
            msg = f"expected a sample of (rows, >= {self._channels}, height, width), got {tuple(self._sample.shape)}"
            raise FamilyError(msg)

    @property
    def noisy(self) -> Float[Tensor, "rows channels height width"]:
        """The noisy latent: the first channels of the sample, as many as the model predicts."""
        return self._sample[:, : self._channels]

    @property
    def canvas(self) -> Size:
        """Height and width of the sample."""
        return Size(*self._sample.shape[-2:])

    @property
    def timestep(self) -> Tensor | float:
        """The timestep that the host passed."""
        return self._arguments["timestep"]

    def run_whole(self) -> Any:
        """The host's own call."""
        return self._forward(*self._args, **self._kwargs)

    def run_tiles(self, boxes: Sequence[Box], noisy: Sequence[Tensor]) -> Sequence[Tensor]:
        """Predictions of tiles of one shape; rows are concatenated tile by tile."""
        samples = [self._with_extra(box, tile) for box, tile in zip(boxes, noisy, strict=True)]
        arguments = {name: self._cut(name, value, boxes) for name, value in self._arguments.items()}
        # Keyword arguments throughout: diffusers' LoRA scaling reads `cross_attention_kwargs` only there.
        prediction = self._forward(sample=torch.cat(samples), return_dict=False, **arguments)[0]
        return prediction.chunk(len(boxes))

    def wrap(self, prediction: Tensor) -> Any:
        """A tuple, or the model's output class, as the host asked for."""
        prediction = prediction.to(self._sample.dtype)
        if not self._return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _with_extra(self, box: Box, noisy: Tensor) -> Tensor:
        if self._sample.shape[1] == self._channels:
            return noisy
        rows, columns = box.to_slices()
        return torch.cat([noisy, self._sample[:, self._channels :, rows, columns]], dim=1)

    def _cut(self, name: str, value: Any, boxes: Sequence[Box]) -> Any:
        if name in _SPATIAL:
            return _map_tensors(value, lambda tensor: self._crop_features(name, tensor, boxes))
        if name in _BATCHED:
            return _map_tensors(value, lambda tensor: self._repeat(name, tensor, len(boxes)))
        if name == "cross_attention_kwargs":
            return self._cut_cross_attention(value, boxes)
        raise FamilyError(f"UNet2DConditionModel argument {name!r} is not known to be safe under tiling; leave it out")

    def _crop_features(self, name: str, tensor: Tensor, boxes: Sequence[Box]) -> Tensor:
        factor, rest = divmod(self.canvas.height, tensor.shape[-2])
        if rest or tensor.shape[-1] * factor != self.canvas.width:
            msg = f"{name} of {tuple(tensor.shape[-2:])} is not a whole fraction of the canvas {tuple(self.canvas)}"
            raise FamilyError(msg)
        if tensor.shape[0] not in (1, self._sample.shape[0]):
            raise FamilyError(f"{name} has {tensor.shape[0]} rows, the sample {self._sample.shape[0]}")
        crops: list[Tensor] = []
        for box in boxes:
            rows, columns = box.shrunk(factor).to_slices()
            crops.append(tensor[..., rows, columns].expand(self._sample.shape[0], -1, -1, -1))
        return torch.cat(crops)

    def _repeat(self, name: str, tensor: Tensor, count: int) -> Tensor:
        rows = self._sample.shape[0]
        if tensor.ndim == 0 or (tensor.shape[0] == 1 and rows > 1):
            return tensor
        if tensor.shape[0] != rows:
            msg = f"{name} has {tensor.shape[0]} rows, the sample {rows}; expected as many, or one for all"
            raise FamilyError(msg)
        return tensor.repeat(count, *[1] * (tensor.ndim - 1)) if count > 1 else tensor

    def _cut_cross_attention(self, value: Mapping[str, Any], boxes: Sequence[Box]) -> dict[str, Any]:
        unknown = [key for key in value if key not in _PLAIN_CROSS_ATTENTION]
        if unknown:
            msg = f"cross_attention_kwargs {unknown} are not known to be safe under tiling; "
            raise FamilyError(msg + f"known are {sorted(_PLAIN_CROSS_ATTENTION)}")
        cut = dict(value)
        if cut.get(_MASKS) is not None:
            masks = cut[_MASKS]
            # diffusers also takes one tensor, (adapters, 1, height, width), for one mask per adapter.
            as_list = masks if isinstance(masks, list) else list(masks.unsqueeze(1))
            cut[_MASKS] = [mask if mask is None else self._crop_mask(mask, boxes) for mask in as_list]
        return cut

    def _crop_mask(
        self, mask: Float[Tensor, "1 images mask_height mask_width"], boxes: Sequence[Box]
    ) -> Float[Tensor, "rows images height width"]:
        """Crop an IP-Adapter mask, given in pixels, to tiles; one row for each row of the batch."""
        factor, rest = divmod(mask.shape[-2], self.canvas.height)
        if rest or factor < 1 or mask.shape[-1] != self.canvas.width * factor:
            msg = f"IP-Adapter mask of {tuple(mask.shape[-2:])} px is not a whole multiple of the canvas "
            raise FamilyError(msg + f"{tuple(self.canvas)}; give it the size of the output frame")
        crops: list[Tensor] = []
        for box in boxes:
            rows, columns = box.scaled(factor).to_slices()
            crops.append(mask[..., rows, columns].expand(self._sample.shape[0], -1, -1, -1))
        return torch.cat(crops)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dicts; leave plain values alone."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value
