"""Pictures as the pipelines see them: float32 RGB in [0, 1], alpha and greyscale remembered apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latent_tiles.errors import ImageError, SettingError
from latent_tiles.geometry import Size

_PLAIN = (np.dtype(np.uint8), np.dtype(np.float32))
_OTHER_FLOATS = (np.dtype(np.float16), np.dtype(np.float64))

OutputType = Literal["pil", "np", "pt"]

PIL_MODES: dict[str, str] = {
    "1": "L", "L": "L", "LA": "LA", "La": "LA", "P": "RGB", "PA": "RGBA",
    "RGB": "RGB", "RGBX": "RGB", "RGBA": "RGBA", "RGBa": "RGBA",
}  # fmt: skip
"""PIL modes that are taken, and the mode of straight 8-bit channels that each becomes."""

_LUMA = (0.299, 0.587, 0.114)
"""Rec. 601, what PIL uses for mode L."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A batch of pictures of one size.

    Args:
        rgb: colour, (items, 3, height, width), float32 in [0, 1]; grey sources have three equal channels.
        alpha: opacity, (items, 1, height, width), or None; straight, not multiplied into the colour.
        grey: the source had no colour; results go back to one channel.
    """

    rgb: Float[Tensor, "items 3 height width"]
    alpha: Float[Tensor, "items 1 height width"] | None = None
    grey: bool = False

    @property
    def size(self) -> Size:
        """Height and width."""
        return Size(*self.rgb.shape[-2:])

    @property
    def items(self) -> int:
        """Number of pictures."""
        return self.rgb.shape[0]

    def resized(self, size: Size) -> Picture:
        """All channels enlarged or reduced by an antialiased bicubic filter, clamped to [0, 1]."""
        alpha = None if self.alpha is None else resize(self.alpha, size)
        return replace(self, rgb=resize(self.rgb, size), alpha=alpha)

    def repeated(self, count: int) -> Picture:
        """Every picture `count` times, copies next to each other."""
        alpha = None if self.alpha is None else self.alpha.repeat_interleave(count, dim=0)
        return replace(self, rgb=self.rgb.repeat_interleave(count, dim=0), alpha=alpha)

    def to_channels(self) -> Float[Tensor, "items channels height width"]:
        """One tensor with the source's channels: grey or RGB, then alpha."""
        colour = self.rgb
        if self.grey:
            luma = torch.tensor(_LUMA, dtype=colour.dtype, device=colour.device).view(1, 3, 1, 1)
            colour = (colour * luma).sum(dim=1, keepdim=True)
        return colour if self.alpha is None else torch.cat([colour, self.alpha], dim=1)

    def export(self, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
        """PIL images (8 bit), a numpy array (items, height, width, channels) or a tensor (items, channels, ...).

        Arrays and tensors are float32 in [0, 1].
        """
        channels = self.to_channels()
        if output_type == "pt":
            return channels
        array = channels.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return array
        levels = (array * 255).round().astype(np.uint8)
        return [Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item) for item in levels]


def resize(
    values: Float[Tensor, "items channels height width"], size: Size
) -> Float[Tensor, "items channels height2 width2"]:
    """Antialiased bicubic resampling (Keys, a = -0.5), clamped to [0, 1]; the same size comes back untouched."""
    if Size(*values.shape[-2:]) == size:
        return values
    return F.interpolate(values, size=tuple(size), mode="bicubic", antialias=True).clamp(0, 1)


def pad_to(
    values: Float[Tensor, "items channels height width"], size: Size
) -> Float[Tensor, "items channels height2 width2"]:
    """Repeat the last row and column until `size` is reached."""
    bottom, right = size.height - values.shape[-2], size.width - values.shape[-1]
    return F.pad(values, (0, right, 0, bottom), mode="replicate") if bottom or right else values


def as_picture(image: Any) -> Picture:
    """Bring any accepted image into one form.

    Args:
        image: a PIL image; a numpy array (height, width[, channels]) or (items, height, width, channels), uint8, uint16
            or float in [0, 1]; a tensor (channels, height, width) or (items, channels, height, width), uint8 or float
            in [0, 1]; a path; or a list of these, all of one size. 1 channel is grey, 2 grey + alpha, 3 RGB, 4 RGBA.

    Raises:
        ImageError: not an image, empty, of an unknown shape or dtype, out of range, or with NaN or infinite values.
        FrameFileError: a path that cannot be read.
    """
    if isinstance(image, list | tuple):
        return _stack([as_picture(item) for item in cast("Sequence[Any]", image)])
    if isinstance(image, Tensor):
        return _split(_unit_range(image if image.ndim == 4 else image[None], "tensor"))
    if isinstance(image, np.ndarray):
        return _split(_from_numpy(image))
    if isinstance(image, str | PathLike):
        from latent_tiles.frames.files import read_frame

        return read_frame(image).picture
    if isinstance(image, Image.Image):
        return _from_pil(image)
    raise ImageError(f"expected a PIL image, numpy array, tensor, path or list of these, got {type(image).__name__}")


def _from_pil(image: Image.Image) -> Picture:
    if 0 in image.size:
        raise ImageError(f"image of {image.size[1]} x {image.size[0]} px is empty")
    if image.mode.startswith(("I", "F")):
        msg = f"PIL image of mode {image.mode}: PIL cannot say its range; pass a uint16 or float array instead"
        raise ImageError(msg)
    if image.mode not in PIL_MODES:
        raise ImageError(f"PIL image of mode {image.mode} is not supported; convert it to RGB first")
    mode = PIL_MODES[image.mode]
    if "transparency" in image.info and not mode.endswith("A"):
        mode += "A"
    return _split(_from_numpy(np.asarray(image if image.mode == mode else image.convert(mode))))


def _from_numpy(array: np.ndarray) -> Float[Tensor, "items channels height width"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4:
        raise ImageError(f"array of shape {array.shape} is not (height, width[, channels]) or a batch of these")
    if array.dtype == np.uint16:
        # torch has no arithmetic on uint16; every level is exact in float32.
        array = array.astype(np.float32) / 65535
    elif array.dtype in _OTHER_FLOATS:
        array = array.astype(np.float32)
    elif array.dtype not in _PLAIN:
        raise ImageError(f"array of dtype {array.dtype} is not supported; use uint8, uint16 or float in [0, 1]")
    # Copied where it is read-only, as what `np.asarray` makes of a PIL image is: torch has no such tensors.
    array = np.require(array, requirements=["C", "W"])
    return _unit_range(torch.from_numpy(array).permute(0, 3, 1, 2), "array")


def _unit_range(values: Tensor, what: str) -> Float[Tensor, "items channels height width"]:
    if values.ndim != 4 or values.shape[1] not in (1, 2, 3, 4):
        msg = f"{what} of shape {tuple(values.shape)}: expected 1 to 4 channels, ([items,] channels, height, width)"
        raise ImageError(msg)
    if 0 in values.shape:
        raise ImageError(f"{what} of shape {tuple(values.shape)} is empty")
    if values.dtype == torch.uint8:
        return values.float() / 255
    if not values.is_floating_point():
        raise ImageError(f"{what} of dtype {values.dtype} is not supported; use uint8 or float in [0, 1]")
    values = values.float()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ImageError(f"{what} has {bad} NaN or infinite values; replace them first")
    low, high = (float(bound) for bound in values.aminmax())
    if low < 0 or high > 1:
        raise ImageError(f"{what} has values from {low:.4g} to {high:.4g}; expected 0 to 1, so scale or clamp it")
    return values


def _split(channels: Float[Tensor, "items channels height width"]) -> Picture:
    count = channels.shape[1]
    alpha = channels[:, -1:] if count in (2, 4) else None
    colour = channels[:, : count - 1] if alpha is not None else channels
    grey = colour.shape[1] == 1
    return Picture(rgb=colour.expand(-1, 3, -1, -1) if grey else colour, alpha=alpha, grey=grey)


def _stack(pictures: Sequence[Picture]) -> Picture:
    if not pictures:
        raise ImageError("the list of images is empty")
    first = pictures[0]
    for other in pictures[1:]:
        if other.size != first.size:
            raise ImageError(f"images of one call must have one size, got {tuple(first.size)} and {tuple(other.size)}")
        if other.grey != first.grey or (other.alpha is None) != (first.alpha is None):
            raise ImageError("images of one call must all be grey or colour, and all with or without alpha")
    alphas = [picture.alpha for picture in pictures if picture.alpha is not None]
    rgb = torch.cat([picture.rgb for picture in pictures])
    return Picture(rgb=rgb, alpha=torch.cat(alphas) if alphas else None, grey=first.grey)


def scaled_size(size: Size, scale: float) -> Size:
    """Height and width times `scale`, rounded to whole pixels.

    Raises:
        SettingError: a scale below 1 or not finite.
    """
    if not 1 <= scale < float("inf"):
        raise SettingError(f"scale must be a finite number of at least 1, got {scale}; to shrink, resize beforehand")
    return Size(round(size.height * scale), round(size.width * scale))
