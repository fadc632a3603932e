"""Where tiles lie: sizes, boxes, the tile grid and its order.

Pure Python, unit-free: the same planner serves pixels and latents. Order is always (height, width) and (top, left).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from latent_tiles.errors import GeometryError


class Size(NamedTuple):
    """Height and width of a frame or tile, in whatever unit the caller works."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Height times width."""
        return self.height * self.width


class Span(NamedTuple):
    """A half-open interval [start, start + length) on one axis."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """First position after the span."""
        return self.start + self.length


class Box(NamedTuple):
    """A rectangle, half-open on both axes."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """First row below the box."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """First column to the right of the box."""
        return self.left + self.width

    @property
    def size(self) -> Size:
        """Height and width."""
        return Size(self.height, self.width)

    @property
    def area(self) -> int:
        """Height times width."""
        return self.height * self.width

    def to_slices(self) -> tuple[slice, slice]:
        """Row and column slices, to index the last two axes of an array or tensor."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def scaled(self, factor: int) -> Box:
        """The same rectangle on a grid that is `factor` times finer, e.g. a latent box in pixels."""
        return Box(self.top * factor, self.left * factor, self.height * factor, self.width * factor)

    def shrunk(self, factor: int) -> Box:
        """The same rectangle on a grid that is `factor` times coarser; odd ends round outwards.

        Raises:
            GeometryError: the origin is not a multiple of `factor`.
        """
        if self.top % factor or self.left % factor:
            msg = f"origin ({self.top}, {self.left}) is not a multiple of {factor}; "
            raise GeometryError(msg + f"plan the grid with multiple_of={factor}")
        return Box(self.top // factor, self.left // factor, -(-self.height // factor), -(-self.width // factor))

    def intersection(self, other: Box) -> Box | None:
        """The rectangle common to both, or None where they do not touch."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        if bottom <= top or right <= left:
            return None
        return Box(top, left, bottom - top, right - left)


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Overlapping tiles that cover a frame: the product of one layout of rows and one of columns.

    Tiles are numbered row by row. All tiles have one shape unless the frame is not a multiple of `multiple_of`; then
    those at the lower and right border are shorter by less than `multiple_of`.
    """

    frame: Size
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[Box]:
        return iter(self.boxes)

    def __getitem__(self, index: int) -> Box:
        return self.boxes[index]

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """All tiles, row by row."""
        return tuple(
            Box(row.start, column.start, row.length, column.length) for row in self.rows for column in self.columns
        )

    @property
    def tile(self) -> Size:
        """Size of the largest (first) tile."""
        return self.boxes[0].size

    @property
    def cost(self) -> float:
        """Pixels that go through the model over pixels of the frame; 1.0 without overlap."""
        return sum(box.area for box in self.boxes) / self.frame.area

    def place(self, index: int) -> tuple[int, int]:
        """Row and column of a tile in the grid."""
        return divmod(index, len(self.columns))

    def ramps(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Overlap with the neighbours: ((above, below), (left, right)); 0 at the frame's border."""
        row, column = self.place(index)
        return _ramps(self.rows, row), _ramps(self.columns, column)


def _ramps(spans: Sequence[Span], index: int) -> tuple[int, int]:
    before = spans[index - 1].stop - spans[index].start if index > 0 else 0
    after = spans[index].stop - spans[index + 1].start if index + 1 < len(spans) else 0
    return before, after


def plan_grid(
    frame: tuple[int, int],
    tile: int | tuple[int, int],
    overlap: int | tuple[int, int],
    *,
    multiple_of: int = 1,
) -> TileGrid:
    """Cover a frame with tiles of one size whose overlaps are spread evenly.

    No tile is a sliver: where the frame is not a whole number of strides long, the overlaps grow instead of the last
    tile shrinking. Neighbouring tiles overlap by at least `overlap`.

    Args:
        frame: height and width of the frame.
        tile: height and width of a tile, or one number for both; clipped to the frame.
        overlap: least overlap of neighbours, (vertical, horizontal) or one number for both; below the tile.
        multiple_of: every origin is a multiple of this (a U-Net with n levels needs 2 ** (n - 1) latents).

    Returns:
        The grid; every position of the frame lies in at least one tile.

    Raises:
        GeometryError: a size below 1, an overlap that is negative or not below the tile, a tile that is not a multiple
            of `multiple_of` or leaves no room to advance by it.

    Example:
        >>> grid = plan_grid((1000, 1500), tile=512, overlap=64)
        >>> len(grid), grid[0], grid[-1]
        (12, Box(top=0, left=0, height=512, width=512), Box(top=488, left=988, height=512, width=512))
    """
    frame_size, tile_size, overlap_size = Size(*frame), as_size(tile), as_size(overlap)
    if multiple_of < 1:
        raise GeometryError(f"multiple_of must be at least 1, got {multiple_of}")
    axes = zip(("height", "width"), frame_size, tile_size, overlap_size, strict=True)
    rows, columns = (_plan_axis(*axis, multiple_of) for axis in axes)
    return TileGrid(frame=frame_size, rows=rows, columns=columns)


def as_size(value: int | tuple[int, int]) -> Size:
    """One number for both axes, or a (height, width) pair, as a `Size`."""
    return Size(value, value) if isinstance(value, int) else Size(*value)


def _plan_axis(name: str, frame: int, tile: int, overlap: int, multiple_of: int) -> tuple[Span, ...]:
    if frame < 1:
        raise GeometryError(f"frame {name} must be at least 1, got {frame}")
    if tile < 1:
        raise GeometryError(f"tile {name} must be at least 1, got {tile}")
    if overlap < 0:
        raise GeometryError(f"overlap {name} must not be negative, got {overlap}")
    if overlap >= tile:
        raise GeometryError(f"overlap {overlap} is not below the tile's {name} {tile}; use at most {tile - 1}")
    if frame <= tile:
        return (Span(0, frame),)
    if tile % multiple_of:
        raise GeometryError(f"tile {name} {tile} is not a multiple of {multiple_of}; {nearest(tile, multiple_of)}")
    # Work in units of `multiple_of`, so that rounding never eats into the overlap.
    stride = (tile - overlap) // multiple_of
    if stride == 0:
        limit = tile - multiple_of
        msg = f"overlap {overlap} leaves less than {multiple_of} of the tile's {name} {tile} to advance by; "
        raise GeometryError(msg + f"use at most {limit}")
    last = -(-(frame - tile) // multiple_of)
    steps = -(-last // stride)
    starts = [index * last // steps * multiple_of for index in range(steps + 1)]
    return tuple(Span(start, min(tile, frame - start)) for start in starts)


def nearest(value: int, multiple_of: int) -> str:
    """The fix for a value that is not a multiple: `use 64` or `use 64 or 128`."""
    below = value // multiple_of * multiple_of
    return f"use {below} or {below + multiple_of}" if below else f"use {multiple_of}"


def wavefront(grid: TileGrid) -> tuple[tuple[int, ...], ...]:
    """Order tiles so that left, upper and upper-left neighbours come first; the tiles of one tick are independent.

    A tick is an anti-diagonal of the grid: 16 x 11 tiles take 26 ticks instead of 176 serial calls.
    """
    ticks: list[list[int]] = [[] for _ in range(len(grid.rows) + len(grid.columns) - 1)]
    for index in range(len(grid)):
        ticks[sum(grid.place(index))].append(index)
    return tuple(tuple(tick) for tick in ticks)
