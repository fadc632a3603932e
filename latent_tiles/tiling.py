"""`Tiling`: the one public description of how a frame is cut into tiles, and its conversion to latents."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from latent_tiles.errors import TilingError
from latent_tiles.geometry import Size, TileGrid, as_size, nearest, plan_grid
from latent_tiles.windows import Window, resolve_window

NoiseSource = Literal["field", "host"]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a frame is cut into tiles. Lengths are pixels of the **output** frame.

    A host that enlarges by a factor of its own (the x4 upscaler) is an exception at other scales: there they are pixels
    of what it makes, before that is reduced to the output.

    Args:
        tile: height and width of a tile, or one number for both. None: the model's own (its training size).
        overlap: least overlap of neighbouring tiles. None: the model's own.
        window: weights of a tile in the fusion: "cosine", "linear", "gaussian", "uniform", or a callable
            (length, ramp_before, ramp_after) -> weights.
        memory: what a tile sees of its neighbours, e.g. "none" or "pin:lambda=0.5". None: the model's own.
        tile_batch: tiles that go through the model at once. More is faster on a GPU and needs more memory; the result
            is the same up to float rounding.
        noise: "field" draws all noise as a function of seed and world position, so that grid, batch and crop do not
            change it; "host" leaves the draws to the host pipeline.
        origin: world position (top, left) of the frame's first pixel. A crop rendered with its origin in the frame gets
            the frame's noise.

    Raises:
        TilingError: a value out of range or an unknown name.

    Example:
        >>> Tiling(tile=1024, overlap=128, memory="pin").tile
        1024
    """

    tile: int | tuple[int, int] | None = None
    overlap: int | tuple[int, int] | None = None
    window: str | Window = "cosine"
    memory: str | None = None
    tile_batch: int = 1
    noise: NoiseSource = "field"
    origin: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, read in (("tile", _side), ("overlap", _side), ("origin", _pair), ("tile_batch", _whole)):
            object.__setattr__(self, name, read(name, getattr(self, name)))
        if self.tile is not None and min(as_size(self.tile)) < 1:
            raise TilingError(f"tile must be at least 1 px, got {self.tile}")
        if self.overlap is not None and min(as_size(self.overlap)) < 0:
            raise TilingError(f"overlap must not be negative, got {self.overlap} px")
        if self.tile is not None and self.overlap is not None:
            for name, tile, overlap in zip(("height", "width"), as_size(self.tile), as_size(self.overlap), strict=True):
                if overlap >= tile:
                    raise TilingError(f"overlap {overlap} px is not below the tile's {name} {tile} px")
        if self.tile_batch < 1:
            raise TilingError(f"tile_batch must be at least 1, got {self.tile_batch}")
        if self.noise not in get_args(NoiseSource):
            raise TilingError(f"unknown noise {self.noise!r}; use one of {', '.join(get_args(NoiseSource))}")
        resolve_window(self.window)


def _whole(name: str, value: Any, *, expected: str = "a whole number") -> int:
    """A plain integer of whatever kind of integer was given.

    Raises:
        TilingError: something else.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TilingError(f"{name} must be {expected}; got {value!r}") from None


def _pair(name: str, value: Any, *, expected: str = "a pair (height, width) of whole numbers") -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(cast("Sequence[Any]", value)) != 2:
        raise TilingError(f"{name} must be {expected}; got {value!r}")
    height, width = (_whole(name, side, expected=expected) for side in cast("Sequence[Any]", value))
    return height, width


def _side(name: str, value: Any) -> int | tuple[int, int] | None:
    expected = "a whole number, or a pair (height, width) of them"
    if value is None:
        return None
    return (_pair if isinstance(value, tuple | list) else _whole)(name, value, expected=expected)


@dataclass(frozen=True, kw_only=True)
class LatentUnits:
    """What a model needs of its latents: the one home of the pixel-to-latent conversion.

    Args:
        pixels_per_latent: output pixels on the side of one latent (the VAE's factor).
        multiple_of: origins and sizes of tiles are multiples of this many latents.
        canvas_multiple_of: the padded frame is a multiple of this many latents too.
    """

    pixels_per_latent: int
    multiple_of: int
    canvas_multiple_of: int = 1

    @property
    def multiple_px(self) -> int:
        """Pixels of which a tile is a multiple."""
        return self.pixels_per_latent * self.multiple_of

    def resolve(self, tiling: Tiling, *, tile: int, overlap: int, memory: str) -> Tiling:
        """The tiling with a model's values where the caller gave none.

        A default overlap that leaves a small tile no room to advance shrinks to an eighth of that tile, or less.
        """
        chosen = tiling.tile if tiling.tile is not None else tile
        if tiling.overlap is not None:
            return replace(tiling, tile=chosen, memory=tiling.memory or memory)
        height, width = (self._fitting(overlap, side) for side in as_size(chosen))
        fitting = height if height == width else (height, width)
        return replace(tiling, tile=chosen, overlap=fitting, memory=tiling.memory or memory)

    def _fitting(self, overlap: int, side: int) -> int:
        room = side - self.multiple_px
        return overlap if overlap <= room else max(0, min(room, side // 8))

    def grid(self, canvas: Size, tiling: Tiling) -> TileGrid:
        """The grid over a canvas of latents.

        Raises:
            TilingError: `tile` or `overlap` is not set, the tile is below the model's minimum or not a multiple of it,
                or the overlap leaves no room to advance.
            GeometryError: the canvas is empty.
        """
        if tiling.tile is None or tiling.overlap is None:
            raise TilingError("tile and overlap are not set; give them, or fill in a model's with `resolve`")
        tile_px, overlap_px = as_size(tiling.tile), as_size(tiling.overlap)
        for name, tile, overlap in zip(("height", "width"), tile_px, overlap_px, strict=True):
            if tile < self.multiple_px:
                msg = f"tile {name} {tile} px is below this model's minimum of {self.multiple_px} px"
                raise TilingError(msg)
            if tile % self.multiple_px:
                msg = f"tile {name} {tile} px is not a multiple of the {self.multiple_px} px this model needs; "
                raise TilingError(msg + nearest(tile, self.multiple_px))
            if self._latents(overlap) > tile // self.pixels_per_latent - self.multiple_of:
                msg = f"overlap {overlap} px leaves no room to advance a tile of {tile} px by {self.multiple_px} px; "
                raise TilingError(msg + f"use at most {tile - self.multiple_px} px")
        return plan_grid(
            canvas,
            tile=(self._latents(tile_px.height), self._latents(tile_px.width)),
            overlap=(self._latents(overlap_px.height), self._latents(overlap_px.width)),
            multiple_of=self.multiple_of,
        )

    def origin(self, tiling: Tiling) -> tuple[int, int]:
        """The tiling's world origin in latents.

        Raises:
            TilingError: the origin is not a multiple of a latent's side.
        """
        for px in tiling.origin:
            if px % self.pixels_per_latent:
                msg = f"origin {tiling.origin} px is not a multiple of {self.pixels_per_latent} px, one latent's side"
                raise TilingError(msg)
        return tiling.origin[0] // self.pixels_per_latent, tiling.origin[1] // self.pixels_per_latent

    def padded(self, frame: Size) -> Size:
        """The frame grown at the lower right to whole multiples of what the model needs, in pixels."""
        multiple = math.lcm(self.multiple_of, self.canvas_multiple_of) * self.pixels_per_latent
        return Size(*(-(-length // multiple) * multiple for length in frame))

    def _latents(self, px: int) -> int:
        return -(-px // self.pixels_per_latent)
