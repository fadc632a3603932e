"""A picture for people: source, bicubic and result at 100 % side by side, and the tiles drawn over the whole frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latent_tiles.errors import ImageError
from latent_tiles.frames.picture import Picture, resize
from latent_tiles.geometry import Box, Size

_BACKGROUND = (24, 25, 28)
_TEXT = (236, 237, 240)
_FAINT = (156, 160, 168)
_TINTS = ((72, 190, 255), (255, 205, 80))
"""Colours of neighbouring tiles, in a chequerboard."""
_BAND = (255, 90, 120)
_CROP = (255, 255, 255)
_MARGIN, _GAP = 32, 12
_HEADLINE, _BODY = 24, 16
_OVERVIEW_HEIGHT = 760
_LEGEND_WIDTH = 330
_SMALLEST_NUMBERED = 40
"""Tiles with a shorter side than this on the overview carry no number."""
_DETAIL_WINDOW = 5
_ALPHA_BACKDROP = 0.5


@dataclass(frozen=True, kw_only=True)
class TileLayout:
    """Where the tiles lay; pixels of the result.

    Args:
        rows: top of each row of tiles.
        columns: left of each column of tiles.
        tile: height and width of a tile.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tile: tuple[int, int]

    def spans(self, frame: Size) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Start and stop of every row and column, cut at the frame's border (tiles may reach into its padding)."""
        heights = [(top, min(top + self.tile[0], frame.height)) for top in self.rows if top < frame.height]
        widths = [(left, min(left + self.tile[1], frame.width)) for left in self.columns if left < frame.width]
        return heights, widths


def comparison(
    source: Picture,
    result: Picture,
    layout: TileLayout,
    *,
    title: str,
    notes: Sequence[str] = (),
    crop_px: int = 420,
) -> Image.Image:
    """Draw source, bicubic and result side by side, and the tiles over the result.

    The first row of crops lies where the source has most detail. With several tiles the second one lies where it has
    most detail among the places where tiles meet, so that a seam would be seen.

    Args:
        source: the picture before.
        result: the picture after.
        layout: where the tiles lay.
        title: headline.
        notes: lines beside the overview, e.g. model and seed.
        crop_px: side of a crop, pixels of the result, shown 1:1.

    Returns:
        An RGB image.

    Raises:
        ImageError: more than one picture in a batch.
    """
    if source.items != 1 or result.items != 1:
        raise ImageError(f"a comparison is of one picture, got {source.items} sources and {result.items} results")
    before, after = _flat(source), _flat(result)
    plain = resize(before, result.size)
    crops = detailed_crops(before, result.size, layout, crop_px)
    panel = crops[0].size
    content = max(3 * panel.width + 2 * _GAP, 900)
    overview = _overview_size(result.size, content)
    rows_top = _MARGIN + _HEADLINE + 3 * _GAP + _BODY + _GAP
    overview_top = rows_top + len(crops) * (panel.height + _GAP) + 2 * _GAP + _BODY + _GAP
    legend_height = (sum(len(_wrapped(note)) for note in notes) + 8) * (_BODY + 10)
    height = overview_top + max(overview.height, legend_height) + _MARGIN
    sheet = Image.new("RGB", (content + 2 * _MARGIN, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    _write(draw, (_MARGIN, _MARGIN), title, size=_HEADLINE)
    scale = f"{result.size.height / source.size.height:.3g}"
    captions = (f"source, its pixels enlarged x{scale}", f"bicubic x{scale}", f"result x{scale}")
    for index, caption in enumerate(captions):
        _write(draw, (_column(index, panel), rows_top - _BODY - _GAP), caption, colour=_FAINT)
    for row, box in enumerate(crops):
        top = rows_top + row * (panel.height + _GAP)
        for index, pixels in enumerate((_nearest(before, result.size, box), _cut(plain, box), _cut(after, box))):
            sheet.paste(_image(pixels), (_column(index, panel), top))
        _badge(draw, (_MARGIN + 8, top + 8), _letter(row))

    heading = f"whole frame at {100 * overview.width / result.size.width:.0f} %, with its tiles"
    _write(draw, (_MARGIN, overview_top - _BODY - _GAP), heading, colour=_FAINT)
    sheet.paste(_overview(after, overview, layout, crops), (_MARGIN, overview_top))
    _legend(draw, (_MARGIN + overview.width + 2 * _GAP, overview_top), layout, source.size, result.size, crops, notes)
    return sheet


def detailed_crops(
    source: Float[Tensor, "1 3 height width"], frame: Size, layout: TileLayout, crop_px: int
) -> list[Box]:
    """Boxes of the result where its source has most detail: anywhere, and where tiles meet if there are several.

    Detail is the mean local standard deviation of luma. It is read off the source, so that what a model invents does
    not attract the eye, and not squared, so that one hard edge does not outweigh a texture. The second crop keeps clear
    of the first where it can.
    """
    side = Size(min(crop_px, frame.height), min(crop_px, frame.width))
    scale = (frame.height / source.shape[-2], frame.width / source.shape[-1])
    window = Size(
        *(
            max(1, min(round(px / factor), limit))
            for px, factor, limit in zip(side, scale, source.shape[-2:], strict=True)
        )
    )
    luma = source.mean(dim=1, keepdim=True)
    mean, square = (_blurred(values) for values in (luma, luma * luma))
    detail = (square - mean * mean).clamp(min=0).sqrt()
    scores = F.avg_pool2d(detail, tuple(window), stride=1)[0, 0]

    def box_at(place: int) -> Box:
        top, left = divmod(place, scores.shape[1])
        origin = (round(top * scale[0]), round(left * scale[1]))
        corner = [min(start, whole - part) for start, whole, part in zip(origin, frame, side, strict=True)]
        return Box(corner[0], corner[1], side.height, side.width)

    best = int(scores.argmax())
    first = box_at(best)
    meeting = _meeting(Size(*scores.shape), layout, frame, side, scale)
    if not bool(meeting.any()):
        return [first]
    apart = meeting & ~_near(Size(*scores.shape), divmod(best, scores.shape[1]), window)
    second = box_at(int(scores.masked_fill(~(apart if bool(apart.any()) else meeting), -1).argmax()))
    return [first] if second == first else [first, second]


def _near(places: Size, place: tuple[int, int], window: Size) -> Bool[Tensor, "rows columns"]:
    """Which corners give a window that shares more than a sliver with the window at `place`."""
    rows, columns = (
        (torch.arange(count) - start).abs() < 0.9 * length
        for count, start, length in zip(places, place, window, strict=True)
    )
    return rows[:, None] & columns[None, :]


def _blurred(values: Float[Tensor, "1 1 height width"]) -> Float[Tensor, "1 1 height width"]:
    pad = _DETAIL_WINDOW // 2
    return F.avg_pool2d(F.pad(values, (pad, pad, pad, pad), mode="replicate"), _DETAIL_WINDOW, stride=1)


def _meeting(
    places: Size, layout: TileLayout, frame: Size, side: Size, scale: tuple[float, float]
) -> Bool[Tensor, "rows columns"]:
    """Which upper left corners of a crop, in source pixels, keep the middle of an overlap well inside it."""
    axes: list[Tensor] = []
    any_band = False
    for spans, count, length, factor in zip(layout.spans(frame), places, side, scale, strict=True):
        starts = torch.arange(count) * factor
        inside = torch.zeros(count, dtype=torch.bool)
        for (_, stop), (start, _) in pairwise(spans):
            middle = (start + stop) / 2
            inside |= (starts + length / 4 <= middle) & (middle <= starts + 3 * length / 4)
        # Tiles side by side on one axis only: any place on the other will do.
        axes.append(inside if len(spans) > 1 else torch.ones(count, dtype=torch.bool))
        any_band |= len(spans) > 1
    both = axes[0][:, None] & axes[1][None, :]
    return both if any_band else torch.zeros_like(both)


def _flat(picture: Picture) -> Float[Tensor, "1 3 height width"]:
    """Colour over mid grey where it is transparent."""
    rgb = picture.rgb.float().cpu()
    if picture.alpha is None:
        return rgb
    alpha = picture.alpha.float().cpu()
    return rgb * alpha + _ALPHA_BACKDROP * (1 - alpha)


def _nearest(source: Float[Tensor, "1 3 height width"], frame: Size, box: Box) -> Float[Tensor, "1 3 rows columns"]:
    axes = zip((box.top, box.left), box.size, source.shape[-2:], frame, strict=True)
    rows, columns = (
        ((torch.arange(start, start + length) + 0.5) * have / want).long() for start, length, have, want in axes
    )
    return source[:, :, rows[:, None], columns[None, :]]


def _cut(values: Float[Tensor, "1 3 height width"], box: Box) -> Float[Tensor, "1 3 rows columns"]:
    rows, columns = box.to_slices()
    return values[:, :, rows, columns]


def _image(values: Float[Tensor, "1 3 height width"]) -> Image.Image:
    return Image.fromarray((values[0].permute(1, 2, 0) * 255).round().byte().numpy())


def _column(index: int, panel: Size) -> int:
    return _MARGIN + index * (panel.width + _GAP)


def _overview_size(frame: Size, content: int) -> Size:
    """The overview leaves room for the legend at its right and is never enlarged."""
    factor = min((content - _LEGEND_WIDTH) / frame.width, _OVERVIEW_HEIGHT / frame.height, 1.0)
    return Size(max(1, round(frame.height * factor)), max(1, round(frame.width * factor)))


def _overview(
    picture: Float[Tensor, "1 3 height width"], size: Size, layout: TileLayout, crops: Sequence[Box]
) -> Image.Image:
    frame = Size(*picture.shape[-2:])
    factor = size.width / frame.width
    image = _image(resize(picture, size)).convert("RGBA")
    veil = Image.new("RGBA", image.size)
    paint = ImageDraw.Draw(veil)
    tops, lefts = (
        [(round(start * factor), round(stop * factor) - 1) for start, stop in spans] for spans in layout.spans(frame)
    )
    if len(tops) * len(lefts) > 1:
        _paint_tiles(paint, tops, lefts)
    for index, box in enumerate(crops):
        scaled = [round(edge * factor) for edge in (box.left, box.top, box.right - 1, box.bottom - 1)]
        paint.rectangle([scaled[0] - 1, scaled[1] - 1, scaled[2] + 1, scaled[3] + 1], outline=(0, 0, 0, 255), width=1)
        paint.rectangle(scaled, outline=(*_CROP, 255), width=2)
        _badge(paint, (scaled[0] + 6, scaled[1] + 6), _letter(index))
    return Image.alpha_composite(image, veil).convert("RGB")


def _paint_tiles(paint: ImageDraw.ImageDraw, tops: list[tuple[int, int]], lefts: list[tuple[int, int]]) -> None:
    for row, (top, bottom) in enumerate(tops):
        for column, (left, right) in enumerate(lefts):
            paint.rectangle((left, top, right, bottom), fill=(*_TINTS[(row + column) % 2], 34))
    # Bands over the tints, not blended with them: where two tiles meet and where four do look the same.
    width, height = lefts[-1][1], tops[-1][1]
    for (_, stop), (start, _) in pairwise(tops):
        paint.rectangle((0, start, width, stop), fill=(*_BAND, 84))
    for (_, stop), (start, _) in pairwise(lefts):
        paint.rectangle((start, 0, stop, height), fill=(*_BAND, 84))
    for row, (top, bottom) in enumerate(tops):
        for column, (left, right) in enumerate(lefts):
            colour = (*_TINTS[(row + column) % 2], 255)
            paint.rectangle((left, top, right, bottom), outline=colour, width=1)
            if min(bottom - top, right - left) >= _SMALLEST_NUMBERED:
                centre = ((left + right) // 2, (top + bottom) // 2)
                _number(paint, centre, str(row * len(lefts) + column + 1))


def _number(paint: ImageDraw.ImageDraw, centre: tuple[int, int], number: str) -> None:
    black = (0, 0, 0, 255)
    paint.text(centre, number, fill=(*_TEXT, 255), font=_font(_BODY), anchor="mm", stroke_width=2, stroke_fill=black)


def _legend(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    layout: TileLayout,
    source: Size,
    result: Size,
    crops: Sequence[Box],
    notes: Sequence[str],
) -> None:
    left, top = corner
    tops, lefts = layout.spans(result)
    lines: list[tuple[str, tuple[int, int, int] | None]] = [
        (f"source {source.height} x {source.width} px", None),
        (f"result {result.height} x {result.width} px", None),
        ("", None),
    ]
    if len(tops) * len(lefts) > 1:
        tile = f"{tops[0][1] - tops[0][0]} x {lefts[0][1] - lefts[0][0]} px"
        lines.append((f"{len(tops) * len(lefts)} tiles of {tile}", _TINTS[0]))
        lines.append((f"overlap {_overlap(tops)} x {_overlap(lefts)} px", _BAND))
    else:
        lines.append(("one tile", None))
    where = ("crop A: most detail", "crop B: most detail where tiles meet")
    lines.extend((text, _CROP) for text, _ in zip(where, crops, strict=False))
    lines.append(("", None))
    lines.extend((line, None) for note in notes for line in _wrapped(note))
    for text, colour in lines:
        if colour is not None:
            draw.rectangle((left, top + 3, left + 12, top + 15), outline=colour, width=2, fill=_swatch(colour))
        _write(draw, (left + (22 if colour is not None else 0), top), text, colour=_TEXT if colour else _FAINT)
        top += _BODY + 10


def _wrapped(text: str) -> list[str]:
    """The text in lines that fit beside the overview."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(_BODY).getlength(longer) <= _LEGEND_WIDTH:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _swatch(colour: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Crops are outlines; tiles and bands are areas."""
    if colour == _CROP:
        return None
    red, green, blue = ((part + 2 * ground) // 3 for part, ground in zip(colour, _BACKGROUND, strict=True))
    return red, green, blue


def _overlap(spans: list[tuple[int, int]]) -> str:
    overlaps = [stop - start for (_, stop), (start, _) in pairwise(spans)]
    if not overlaps:
        return "0"
    return str(overlaps[0]) if min(overlaps) == max(overlaps) else f"{min(overlaps)}-{max(overlaps)}"


def _badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], letter: str) -> None:
    left, top = corner
    draw.rounded_rectangle((left, top, left + 22, top + 22), radius=5, fill=(0, 0, 0, 255), outline=_CROP)
    draw.text((left + 11, top + 11), letter, fill=_CROP, font=_font(14), anchor="mm")


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    *,
    size: int = _BODY,
    colour: tuple[int, int, int] = _TEXT,
) -> None:
    # Pillow's own font, which is there on every machine, has no more than ASCII.
    draw.text(corner, text.encode("ascii", "replace").decode(), fill=colour, font=_font(size))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
