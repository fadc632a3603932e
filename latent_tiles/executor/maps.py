"""Whole maps that windows are read from and written to: in memory, on a device, or in a spill file."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.errors import CanvasError
from latent_tiles.geometry import Box, Size


@runtime_checkable
class Source(Protocol):
    """Something that regions can be read from: a tensor, a file, a decoder of its own."""

    @property
    def size(self) -> Size:
        """Height and width of the whole."""
        ...

    def read(self, box: Box) -> Float[Tensor, "rows channels height width"]:
        """The values in a box."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Something that takes finished regions, each position once, in bands from top to bottom."""

    def write(self, box: Box, values: Float[Tensor, "rows channels height width"]) -> None:
        """Take the values of a box; they are the sink's to keep."""
        ...


class Map:
    """A whole map as a tensor, wherever it lies; read onto the device that works on it.

    Args:
        values: the map, (rows, channels, height, width).
        device: where windows are wanted.
    """

    def __init__(self, values: Float[Tensor, "rows channels height width"], device: torch.device | str = "cpu") -> None:
        self.values, self._device = values, torch.device(device)

    @property
    def size(self) -> Size:
        """Height and width."""
        return Size(*self.values.shape[2:])

    def read(self, box: Box) -> Float[Tensor, "rows channels height width"]:
        """The values in a box, dense, channels last; never a view that could be written through.

        Raises:
            CanvasError: the box leaves the map.
        """
        if box.top < 0 or box.left < 0 or box.bottom > self.size.height or box.right > self.size.width:
            raise CanvasError(f"{box} leaves the map of {self.size.height} x {self.size.width}")
        rows, columns = box.to_slices()
        part = self.values[:, :, rows, columns]
        if part.device == self._device:
            return part.clone(memory_format=torch.channels_last)
        return part.to(self._device).contiguous(memory_format=torch.channels_last)

    def write(self, box: Box, values: Float[Tensor, "rows channels height width"]) -> None:
        """Put values into a box."""
        rows, columns = box.to_slices()
        self.values[:, :, rows, columns] = values
