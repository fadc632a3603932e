"""Whatever a caller passes as an image."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from latent_tiles.errors import ImageError
from latent_tiles.frames.convert import from_array, from_pil, from_tensor, stack
from latent_tiles.frames.files import read_frame
from latent_tiles.frames.picture import Picture


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
        return stack([as_picture(item) for item in cast("Sequence[Any]", image)])
    if isinstance(image, Tensor):
        return from_tensor(image)
    if isinstance(image, np.ndarray):
        return from_array(image)
    if isinstance(image, str | PathLike):
        return read_frame(image).picture
    if isinstance(image, Image.Image):
        return from_pil(image)
    raise ImageError(f"expected a PIL image, numpy array, tensor, path or list of these, got {type(image).__name__}")
