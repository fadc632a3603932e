"""The canvas on which overlapping tiles are fused."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.errors import CanvasError
from latent_tiles.geometry import Box, Size


class TileCanvas:
    """A weighted mean of overlapping tiles, summed in float32 whatever the tiles' dtype.

    Args:
        rows: size of the batch axis.
        channels: size of the channel axis.
        size: height and width.
        device: where the sums live; tiles and weights are moved there.

    Example:
        >>> import torch
        >>> canvas = TileCanvas(rows=1, channels=4, size=Size(8, 8))
        >>> canvas.add(Box(0, 0, 8, 8), torch.ones(1, 4, 8, 8), torch.full((8, 8), 0.5))
        >>> float(canvas.finish().max())
        1.0
    """

    def __init__(self, *, rows: int, channels: int, size: Size, device: torch.device | str = "cpu") -> None:
        self.size = size
        self._sum = torch.zeros(rows, channels, *size, dtype=torch.float32, device=device)
        self._weight = torch.zeros(*size, dtype=torch.float32, device=device)

    def add(
        self,
        box: Box,
        values: Float[Tensor, "rows channels height width"],
        weights: Float[Tensor, "height width"],
    ) -> None:
        """Add one tile with its weights.

        Raises:
            CanvasError: the box leaves the canvas, or a shape does not fit the box.
        """
        inside = box.top >= 0 and box.left >= 0 and box.bottom <= self.size.height and box.right <= self.size.width
        if not inside:
            raise CanvasError(f"{box} leaves the canvas of {self.size.height} x {self.size.width}")
        expected = (*self._sum.shape[:2], *box.size)
        if values.shape != expected or weights.shape != box.size:
            msg = f"tile {tuple(values.shape)} with weights {tuple(weights.shape)} does not fit {expected}"
            raise CanvasError(msg)
        rows, columns = box.to_slices()
        weights = weights.to(self._weight)
        self._sum[:, :, rows, columns].addcmul_(values.to(self._sum), weights)
        self._weight[rows, columns] += weights

    def read(self, box: Box) -> tuple[Float[Tensor, "rows channels height width"], Float[Tensor, "height width"]]:
        """The mean written so far inside a box (0 where nothing is), and the weight behind it."""
        rows, columns = box.to_slices()
        weight = self._weight[rows, columns]
        mean = torch.where(weight > 0, self._sum[:, :, rows, columns] / weight, 0.0)
        return mean, weight

    def finish(self) -> Float[Tensor, "rows channels height width"]:
        """The weighted mean over the whole canvas, float32.

        Raises:
            CanvasError: some position was never written.
        """
        empty = self._weight <= 0
        if bool(empty.any()):
            row, column = (int(axis[0]) for axis in torch.nonzero(empty, as_tuple=True))
            msg = f"{int(empty.sum())} of {self.size.area} positions were never written, the first at ({row}, {column})"
            raise CanvasError(msg)
        return self._sum / self._weight
