from itertools import pairwise

import numpy as np
import pytest
import torch

from latent_tiles.errors import ImageError
from latent_tiles.frames import Picture, as_picture
from latent_tiles.frames.comparison import TileLayout, comparison, detailed_crops
from latent_tiles.geometry import Size, plan_grid

LEFT, TOP, GAP = 32, 120, 12


def layout(frame: Size, tile: int = 128, overlap: int = 32) -> TileLayout:
    grid = plan_grid(frame, tile, overlap)
    return TileLayout(
        rows=tuple(span.start for span in grid.rows),
        columns=tuple(span.start for span in grid.columns),
        tile=tuple(grid.tile),
    )


def noise(height: int, width: int, channels: int = 3) -> Picture:
    return as_picture(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


def one_tile(frame: Size) -> TileLayout:
    return TileLayout(rows=(0,), columns=(0,), tile=tuple(frame))


def test_panels_show_source_bicubic_and_result_pixel_for_pixel() -> None:
    source = noise(20, 30)
    result = noise(80, 120)
    sheet = np.asarray(comparison(source, result, one_tile(result.size), title="t", crop_px=64))
    box = detailed_crops(source.rgb, result.size, one_tile(result.size), 64)[0]
    expected = (
        source.rgb.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3),
        source.resized(result.size).rgb,
        result.rgb,
    )
    for index, whole in enumerate(expected):
        left = LEFT + index * (64 + GAP)
        panel = sheet[TOP : TOP + 64, left : left + 64]
        rows, columns = box.to_slices()
        want = (whole[0, :, rows, columns].permute(1, 2, 0) * 255).round().byte().numpy()
        # The badge with the crop's letter covers the corner.
        assert np.array_equal(panel[40:], want[40:])


def test_crops_lie_where_the_detail_is() -> None:
    calm = torch.full((1, 3, 64, 96), 0.5)
    calm[:, :, 40:56, 64:80] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    frame = Size(256, 384)
    (box,) = detailed_crops(calm, frame, one_tile(frame), 64)
    assert abs(box.top - 160) <= 8
    assert abs(box.left - 256) <= 8


def test_the_second_crop_crosses_overlaps() -> None:
    frame = Size(400, 640)
    placed = layout(frame)
    crops = detailed_crops(noise(100, 160).rgb, frame, placed, 100)
    assert len(crops) == 2
    box = crops[1]
    for spans, start, stop in zip(placed.spans(frame), box[:2], (box.bottom, box.right), strict=True):
        middles = [(after[0] + before[1]) / 2 for before, after in pairwise(spans)]
        assert any(start < middle < stop for middle in middles)


@pytest.mark.parametrize(
    ("source", "frame"), [((1, 1), (4, 4)), ((7, 300), (21, 900)), ((300, 7), (900, 21)), ((50, 50), (75, 75))]
)
def test_any_shape_is_drawn_and_crops_stay_inside(source: tuple[int, int], frame: tuple[int, int]) -> None:
    before, after = noise(*source), noise(*frame)
    placed = layout(Size(*frame))
    for box in detailed_crops(before.rgb, Size(*frame), placed, 420):
        assert 0 <= box.top <= box.bottom <= frame[0]
        assert 0 <= box.left <= box.right <= frame[1]
    assert comparison(before, after, placed, title="à", notes=("déjà vu",)).mode == "RGB"


def test_tiles_may_reach_into_the_padding() -> None:
    placed = TileLayout(rows=(0, 60, 128), columns=(0,), tile=(64, 64))
    assert placed.spans(Size(100, 50)) == ([(0, 64), (60, 100)], [(0, 50)])


def test_grey_and_alpha_are_drawn() -> None:
    for channels in (1, 2, 4):
        sheet = comparison(noise(16, 16, channels), noise(64, 64, channels), layout(Size(64, 64), 32, 8), title="t")
        assert sheet.mode == "RGB"


def test_overlap_is_tinted_and_tiles_are_outlined() -> None:
    grey = as_picture(np.full((320, 320), 128, np.uint8))
    sheet = np.asarray(comparison(grey, grey, layout(Size(320, 320), 192, 64), title="t", crop_px=32))
    # The overview is at 100 %: its tile borders and bands are the only colours beside the legend's.
    overview = sheet[-400:, LEFT : LEFT + 320].astype(int)
    red = overview[..., 0] - overview[..., 1] > 20
    assert 0.2 < red.mean() < 0.6


def test_a_batch_is_refused() -> None:
    pair = as_picture([np.zeros((8, 8, 3), np.uint8)] * 2)
    with pytest.raises(ImageError, match="2 sources and 2 results"):
        comparison(pair, pair, one_tile(Size(8, 8)), title="t")
