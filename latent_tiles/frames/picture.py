"""Pictures as the pipelines see them: float32 RGB in [0, 1], alpha and greyscale remembered apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latent_tiles.errors import ImageError, SettingError
from latent_tiles.geometry import Size

OutputType = Literal["pil", "np", "pt"]

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
            # Weights that sum to 1 may still round a white pixel above it.
            colour = (colour * luma).sum(dim=1, keepdim=True).clamp(0, 1)
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
    """Repeat the last row and column until `size` is reached.

    Raises:
        ImageError: the size is below the picture's.
    """
    bottom, right = size.height - values.shape[-2], size.width - values.shape[-1]
    if bottom < 0 or right < 0:
        raise ImageError(f"cannot pad {tuple(values.shape[-2:])} to the smaller {tuple(size)}")
    return F.pad(values, (0, right, 0, bottom), mode="replicate") if bottom or right else values


def scaled_size(size: Size, scale: float) -> Size:
    """Height and width times `scale`, rounded to whole pixels.

    Raises:
        SettingError: a scale below 1 or not finite.
    """
    if not 1 <= scale < float("inf"):
        raise SettingError(f"scale must be a finite number of at least 1, got {scale}; to shrink, resize beforehand")
    return Size(round(size.height * scale), round(size.width * scale))
