"""The float32 canvas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latent_tiles.canvas import TileCanvas
from latent_tiles.errors import CanvasError
from latent_tiles.geometry import Box, Size


def canvas(height: int = 4, width: int = 6) -> TileCanvas:
    return TileCanvas(rows=1, channels=2, size=Size(height, width))


def test_the_mean_is_weighted() -> None:
    fused = canvas(1, 3)
    fused.add(Box(0, 0, 1, 2), torch.full((1, 2, 1, 2), 1.0), torch.tensor([[1.0, 3.0]]))
    fused.add(Box(0, 1, 1, 2), torch.full((1, 2, 1, 2), 5.0), torch.tensor([[1.0, 0.25]]))
    expected = torch.tensor([1.0, 2.0, 5.0]).expand(1, 2, 1, 3)
    assert torch.equal(fused.finish(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tiles_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Two thousand tiles of 1 with a weight of 1: a sum in half precision stops at 2048 (float16) or 256 (bfloat16)."""
    fused = TileCanvas(rows=1, channels=1, size=Size(1, 1))
    tile, weight = torch.full((1, 1, 1, 1), 1.5, dtype=dtype), torch.full((1, 1), 1.0, dtype=dtype)
    for _ in range(3000):
        fused.add(Box(0, 0, 1, 1), tile, weight)
    result = fused.finish()
    assert result.dtype == torch.float32
    assert float(result) == 1.5
    assert float(fused.read(Box(0, 0, 1, 1))[1]) == 3000


def test_products_of_half_precision_tiles_keep_their_last_bits() -> None:
    fused = TileCanvas(rows=1, channels=1, size=Size(1, 2))
    tile = torch.tensor([[[[1 + 2**-10, 1.0]]]], dtype=torch.float16)
    weight = torch.tensor([[1 + 2**-10, 1 / 3]], dtype=torch.float32)
    fused.add(Box(0, 0, 1, 2), tile, weight)
    assert torch.equal(fused.finish(), tile.float())


def test_float64_tiles_are_accepted() -> None:
    fused = canvas(1, 1)
    fused.add(Box(0, 0, 1, 1), torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.ones(1, 1))
    assert fused.finish().dtype == torch.float32


def test_adding_changes_neither_tile_nor_weights() -> None:
    tile, weights = torch.rand(1, 2, 4, 6), torch.rand(4, 6) + 0.1
    copies = tile.clone(), weights.clone()
    fused = canvas()
    for _ in range(2):
        fused.add(Box(0, 0, 4, 6), tile, weights)
    fused.finish()
    assert torch.equal(tile, copies[0])
    assert torch.equal(weights, copies[1])


def test_unwritten_positions_are_counted_and_the_first_is_named() -> None:
    fused = canvas()
    fused.add(Box(0, 0, 2, 6), torch.ones(1, 2, 2, 6), torch.ones(2, 6))
    fused.add(Box(2, 0, 2, 3), torch.ones(1, 2, 2, 3), torch.ones(2, 3))
    with pytest.raises(CanvasError, match=r"6 of 24 positions were never written, the first at \(2, 3\)"):
        fused.finish()


def test_an_empty_canvas_is_not_zero() -> None:
    with pytest.raises(CanvasError, match=r"24 of 24 positions were never written, the first at \(0, 0\)"):
        canvas().finish()


def test_a_weight_of_zero_does_not_count_as_written() -> None:
    fused = canvas(1, 1)
    fused.add(Box(0, 0, 1, 1), torch.ones(1, 2, 1, 1), torch.zeros(1, 1))
    with pytest.raises(CanvasError, match="1 of 1 positions"):
        fused.finish()


@pytest.mark.parametrize("box", [Box(-1, 0, 2, 2), Box(0, -1, 2, 2), Box(3, 0, 2, 2), Box(0, 5, 2, 2)])
def test_a_box_that_leaves_the_canvas_is_refused(box: Box) -> None:
    with pytest.raises(CanvasError, match=r"Box\(.*\) leaves the canvas of 4 x 6"):
        canvas().add(box, torch.ones(1, 2, 2, 2), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("tile", "weights"),
    [
        ((1, 2, 3, 3), (3, 3)),
        ((1, 3, 2, 2), (2, 2)),
        ((2, 2, 2, 2), (2, 2)),
        ((1, 2, 2, 2), (2, 3)),
        ((1, 2, 2, 2), (1, 2)),
    ],
)
def test_shapes_that_do_not_fit_the_box_are_refused(tile: tuple[int, ...], weights: tuple[int, ...]) -> None:
    add: Any = TileCanvas.add
    # Past the run-time shape check of the test suite, which a user does not have.
    add = getattr(add, "__wrapped__", add)
    with pytest.raises(CanvasError, match=r"tile \(.*\) with weights \(.*\) does not fit \(1, 2, 2, 2\)"):
        add(canvas(), Box(0, 0, 2, 2), torch.ones(tile), torch.ones(weights))


def test_reading_gives_the_mean_so_far_and_zero_where_nothing_is() -> None:
    fused = canvas()
    fused.add(Box(0, 0, 2, 2), torch.full((1, 2, 2, 2), 3.0), torch.full((2, 2), 0.25))
    fused.add(Box(0, 0, 2, 2), torch.full((1, 2, 2, 2), 7.0), torch.full((2, 2), 0.75))
    mean, weight = fused.read(Box(1, 1, 2, 2))
    assert torch.equal(mean, torch.tensor([[6.0, 0.0], [0.0, 0.0]]).expand(1, 2, 2, 2))
    assert torch.equal(weight, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_reading_everything_equals_finishing() -> None:
    fused = canvas()
    fused.add(Box(0, 0, 4, 6), torch.rand(1, 2, 4, 6), torch.rand(4, 6) + 0.1)
    fused.add(Box(1, 2, 3, 4), torch.rand(1, 2, 3, 4), torch.rand(3, 4) + 0.1)
    assert torch.equal(fused.read(Box(0, 0, 4, 6))[0], fused.finish())


@pytest.mark.gpu
def test_sums_live_on_the_canvas_device() -> None:
    fused = TileCanvas(rows=1, channels=1, size=Size(2, 2), device="cuda")
    fused.add(Box(0, 0, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(2, 2))
    assert fused.finish().device.type == "cuda"
