"""Denoisers whose canvas is one argument, (rows, channels, height, width), taken apart by a table.

A family says which arguments lie over the canvas, which have one row for each row of the batch, and which are the
same for every tile; an argument that stands in none of these is refused, so that a newer diffusers cannot make tiles
silently wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latent_tiles.errors import FamilyError
from latent_tiles.geometry import Box, Size


class CanvasCall:
    """One call of a denoiser over the whole canvas.

    Hosts may have concatenated further channels behind the noisy latent (the x4 upscaler its low-resolution image,
    InstructPix2Pix the encoded image).

    Args:
        module: the denoiser.
        forward: what runs it.
        args: the host's positional arguments.
        kwargs: the host's keyword arguments.

    Raises:
        FamilyError: an argument that cannot be cut into tiles.
    """

    CANVAS: ClassVar[str] = "hidden_states"
    """The argument that is the canvas."""
    FEATURES: ClassVar[frozenset[str]] = frozenset()
    """Feature maps (rows, channels, height, width) at a whole fraction of the canvas's resolution."""
    TOKENS: ClassVar[frozenset[str]] = frozenset()
    """Feature maps as tokens (rows, height * width, channels), one for each patch of the canvas."""
    BATCHED: ClassVar[frozenset[str]] = frozenset()
    """One row for each row of the batch, or one for all."""
    SHARED: ClassVar[frozenset[str]] = frozenset()
    """The same for every tile."""
    OUTPUT: ClassVar[tuple[str, str]] = ("diffusers.models.modeling_outputs", "Transformer2DModelOutput")
    """Module and name of the class that the model returns."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._module: Any = module
        self._forward, self._args, self._kwargs = forward, args, kwargs
        signature = inspect.signature(type(module).forward)
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop("self")
        self._sample: Tensor = bound.pop(self.CANVAS)
        self._return_dict: bool = bound.pop("return_dict", True)
        self._arguments: dict[str, Any] = {name: value for name, value in bound.items() if value is not None}
        self._channels = self.noisy_channels(module)
        if self._sample.ndim != 4 or self._sample.shape[1] < self._channels:
            msg = f"expected a sample of (rows, >= {self._channels}, height, width), got {tuple(self._sample.shape)}"
            raise FamilyError(msg)

    @staticmethod
    def noisy_channels(module: Any) -> int:
        """Channels of the noisy latent."""
        return int(module.config.in_channels)

    @staticmethod
    def multiple_of(module: Any) -> int:
        """Latents that origins and sizes of tiles must be multiples of."""
        return int(module.config.patch_size)

    @property
    def noisy(self) -> Float[Tensor, "rows channels height width"]:
        """The noisy latent: the first channels of the canvas."""
        return self._sample[:, : self._channels]

    @property
    def canvas(self) -> Size:
        """Height and width of the canvas."""
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
        arguments = {name: self.cut(name, value, boxes) for name, value in self._arguments.items()}
        # Keyword arguments throughout: diffusers' LoRA scaling reads its own only there.
        prediction = self._forward(**{self.CANVAS: torch.cat(samples)}, return_dict=False, **arguments)[0]
        return prediction.chunk(len(boxes))

    def wrap(self, prediction: Tensor) -> Any:
        """A tuple, or the model's output class, as the host asked for."""
        prediction = prediction.to(self._sample.dtype)
        if not self._return_dict:
            return (prediction,)
        module, name = self.OUTPUT
        return getattr(import_module(module), name)(sample=prediction)

    def cut(self, name: str, value: Any, boxes: Sequence[Box]) -> Any:
        """An argument for tiles of one shape.

        Raises:
            FamilyError: it stands in no table, or does not fit the canvas.
        """
        if name in self.FEATURES:
            return map_tensors(value, lambda tensor: self._crop_features(name, tensor, boxes))
        if name in self.TOKENS:
            return map_tensors(value, lambda tensor: self._crop_tokens(name, tensor, boxes))
        if name in self.BATCHED:
            return map_tensors(value, lambda tensor: self._repeat(name, tensor, len(boxes)))
        if name in self.SHARED:
            return value
        kind = type(self._module).__name__
        raise FamilyError(f"{kind} argument {name!r} is not known to be safe under tiling; leave it out")

    def _with_extra(self, box: Box, noisy: Tensor) -> Tensor:
        if self._sample.shape[1] == self._channels:
            return noisy
        rows, columns = box.to_slices()
        return torch.cat([noisy, self._sample[:, self._channels :, rows, columns]], dim=1)

    def _crop_features(self, name: str, tensor: Tensor, boxes: Sequence[Box]) -> Tensor:
        factor, rest = divmod(self.canvas.height, tensor.shape[-2])
        if rest or tensor.shape[-1] * factor != self.canvas.width:
            msg = f"{name} of {tuple(tensor.shape[-2:])} is not a whole fraction of the canvas {tuple(self.canvas)}"
            raise FamilyError(msg)
        self._require_rows(name, tensor)
        crops: list[Tensor] = []
        for box in boxes:
            rows, columns = box.shrunk(factor).to_slices()
            crops.append(tensor[..., rows, columns].expand(self._sample.shape[0], -1, -1, -1))
        return torch.cat(crops)

    def _crop_tokens(self, name: str, tensor: Tensor, boxes: Sequence[Box]) -> Tensor:
        patch = self.multiple_of(self._module)
        height, width = self.canvas.height // patch, self.canvas.width // patch
        if tensor.ndim != 3 or tensor.shape[1] != height * width:
            msg = (
                f"{name} of {tuple(tensor.shape)} has not one token for each of the canvas's {height} x {width} patches"
            )
            raise FamilyError(msg)
        self._require_rows(name, tensor)
        crops: list[Tensor] = []
        for box in boxes:
            rows, columns = box.shrunk(patch).to_slices()
            inside = tensor.unflatten(1, (height, width))[:, rows, columns].flatten(1, 2)
            crops.append(inside.expand(self._sample.shape[0], -1, -1))
        return torch.cat(crops)

    def _require_rows(self, name: str, tensor: Tensor) -> None:
        if tensor.shape[0] not in (1, self._sample.shape[0]):
            raise FamilyError(f"{name} has {tensor.shape[0]} rows, the sample {self._sample.shape[0]}")

    def _repeat(self, name: str, tensor: Tensor, count: int) -> Tensor:
        rows = self._sample.shape[0]
        if tensor.ndim == 0 or (tensor.shape[0] == 1 and rows > 1):
            return tensor
        if tensor.shape[0] != rows:
            msg = f"{name} has {tensor.shape[0]} rows, the sample {rows}; expected as many, or one for all"
            raise FamilyError(msg)
        return tensor.repeat(count, *[1] * (tensor.ndim - 1)) if count > 1 else tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dicts; leave plain values alone."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
