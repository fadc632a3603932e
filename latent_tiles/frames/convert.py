"""Pictures from what other libraries hold them in: PIL images, arrays, tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latent_tiles.errors import ImageError
from latent_tiles.frames.picture import Picture

PIL_MODES: dict[str, str] = {
    "1": "L", "L": "L", "LA": "LA", "La": "LA", "P": "RGB", "PA": "RGBA",
    "RGB": "RGB", "RGBX": "RGB", "RGBA": "RGBA", "RGBa": "RGBA",
}  # fmt: skip
"""PIL modes that are taken, and the mode of straight 8-bit channels that each becomes."""

_PLAIN = (np.dtype(np.uint8), np.dtype(np.float32))
_OTHER_FLOATS = (np.dtype(np.float16), np.dtype(np.float64))


def from_pil(image: Image.Image) -> Picture:
    """A PIL image with 8 bits a channel.

    Raises:
        ImageError: it is empty, or of a mode whose meaning in 8-bit RGB is not certain.
    """
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
    return from_array(np.asarray(image if image.mode == mode else image.convert(mode)))


def from_array(array: np.ndarray) -> Picture:
    """An array (height, width[, channels]) or (items, height, width, channels); uint8, uint16 or float in [0, 1].

    Raises:
        ImageError: another shape or dtype, empty, out of range, or with NaN or infinite values.
    """
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
    return _split(_unit_range(torch.from_numpy(array).permute(0, 3, 1, 2), "array"))


def from_tensor(values: Tensor) -> Picture:
    """A tensor ([items,] channels, height, width); uint8 or float in [0, 1].

    Raises:
        ImageError: another shape or dtype, empty, out of range, or with NaN or infinite values.
    """
    values = values.detach()
    return _split(_unit_range(values if values.ndim == 4 else values[None], "tensor"))


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


def stack(pictures: Sequence[Picture]) -> Picture:
    """One batch of several pictures.

    Raises:
        ImageError: none, or pictures of several sizes or kinds of channels.
    """
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
