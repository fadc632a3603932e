"""Fusion weights, and what they do on a canvas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latent_tiles.canvas import TileCanvas
from latent_tiles.errors import TilingError
from latent_tiles.geometry import plan_grid
from latent_tiles.windows import WINDOWS, Window, cosine, gaussian, linear, resolve_window, tile_weights, uniform

TWO_WAY = (cosine, linear)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `plan_grid`, for at most some 200 tiles."""
    multiple = draw(st.sampled_from([1, 2, 4]))
    frame = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    tile = tuple(multiple * draw(st.integers(max(2, -(-length // (8 * multiple))), 24)) for length in frame)
    overlap = tuple(draw(st.integers(0, min(length * 3 // 4, length - multiple))) for length in tile)
    return {"frame": frame, "tile": tile, "overlap": overlap, "multiple_of": multiple}


def stepped(length: int, before: int, after: int) -> Tensor:
    """A window of a user's own, in float64."""
    del before, after
    return torch.arange(1, length + 1, dtype=torch.float64)


@given(requests(), st.sampled_from([*WINDOWS, "own"]), st.floats(-100, 100))
def test_constant_in_constant_out(request_: dict[str, Any], name: str, value: float) -> None:
    grid = plan_grid(**request_)
    window = stepped if name == "own" else resolve_window(name)
    canvas = TileCanvas(rows=1, channels=2, size=grid.frame)
    for index, box in enumerate(grid):
        weights = tile_weights(grid, index, window)
        assert weights.dtype == torch.float32
        assert weights.shape == box.size
        assert float(weights.min()) > 0
        canvas.add(box, torch.full((1, 2, *box.size), value), weights)
    torch.testing.assert_close(canvas.finish(), torch.full((1, 2, *grid.frame), value), rtol=1e-6, atol=1e-30)


@given(requests(), st.sampled_from(sorted(WINDOWS)))
def test_an_untouched_picture_comes_back(request_: dict[str, Any], name: str) -> None:
    grid = plan_grid(**request_)
    picture = torch.arange(grid.frame.area, dtype=torch.float32).view(1, 1, *grid.frame).sin()
    canvas = TileCanvas(rows=1, channels=1, size=grid.frame)
    for index, box in enumerate(grid):
        rows, columns = box.to_slices()
        canvas.add(box, picture[..., rows, columns], tile_weights(grid, index, WINDOWS[name]))
    torch.testing.assert_close(canvas.finish(), picture, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", TWO_WAY)
@given(length=st.integers(2, 200), data=st.data())
def test_neighbours_sum_to_one_where_two_overlap(window: Window, length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length // 2))
    stride = length - overlap
    total = torch.zeros(stride + length)
    total[:length] += window(length, 0, overlap)
    total[stride:] += window(length, overlap, 0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", TWO_WAY)
def test_a_grid_with_two_way_overlaps_sums_to_one_everywhere(window: Window) -> None:
    grid = plan_grid((3 * 24 + 8, 2 * 24 + 8), tile=32, overlap=8)
    canvas = torch.zeros(grid.frame)
    for index, box in enumerate(grid):
        canvas[box.to_slices()] += tile_weights(grid, index, window)
    torch.testing.assert_close(canvas, torch.ones_like(canvas), rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", TWO_WAY)
@given(length=st.integers(1, 100), data=st.data())
def test_ramped_windows_are_one_at_the_frames_border_and_in_the_core(
    window: Window, length: int, data: st.DataObject
) -> None:
    ramp = data.draw(st.integers(0, length - 1))
    assert torch.equal(window(length, 0, 0), torch.ones(length))
    assert torch.equal(window(length, ramp, 0)[ramp:], torch.ones(length - ramp))
    assert torch.equal(window(length, 0, ramp)[: length - ramp], torch.ones(length - ramp))
    rising = window(length, ramp, 0)
    assert bool((rising.diff() >= 0).all())
    torch.testing.assert_close(window(length, 0, ramp), rising.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WINDOWS))
@given(length=st.integers(1, 300), data=st.data())
def test_every_window_counts_every_position(name: str, length: int, data: st.DataObject) -> None:
    before, after = (data.draw(st.integers(0, length)) for _ in range(2))
    weights = WINDOWS[name](length, before, after)
    assert weights.shape == (length,)
    assert weights.dtype == torch.float32
    assert bool((weights > 0).all())
    assert float(weights.max()) <= 1


@pytest.mark.parametrize("length", [16, 64, 128])
def test_the_bell_falls_to_about_a_hundredth_at_the_border_and_ignores_overlaps(length: int) -> None:
    weights = gaussian(length, 0, 0)
    assert torch.equal(weights, gaussian(length, 5, 7))
    torch.testing.assert_close(weights, weights.flip(0))
    assert 0.01 < float(weights[0] / weights.max()) < 0.021
    if length == 128:
        assert float(weights[0]) == pytest.approx(0.0111, abs=0.002)


def test_uniform_counts_all_alike() -> None:
    assert torch.equal(uniform(5, 2, 2), torch.ones(5))


def test_weights_are_the_outer_product_of_the_two_axes() -> None:
    grid = plan_grid((40, 60), tile=(24, 32), overlap=(8, 4))
    for index in range(len(grid)):
        (above, below), (left, right) = grid.ramps(index)
        box = grid[index]
        expected = cosine(box.height, above, below)[:, None] * cosine(box.width, left, right)[None]
        assert torch.equal(tile_weights(grid, index, cosine), expected)


def test_names_and_callables() -> None:
    assert resolve_window("cosine") is cosine
    assert resolve_window(stepped) is stepped


def test_an_unknown_window_lists_those_that_exist() -> None:
    with pytest.raises(TilingError, match="unknown window 'hann'; use one of cosine, linear, gaussian, uniform, or a"):
        resolve_window("hann")


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (lambda length, before, after: torch.ones(length + 1), r"shape \(9,\), not \(8,\)"),
        (lambda length, before, after: torch.ones(length, 1), r"shape \(8, 1\), not \(8,\)"),
        (lambda length, before, after: torch.zeros(length), "not above zero and finite"),
        (lambda length, before, after: -torch.ones(length), "not above zero and finite"),
        (lambda length, before, after: torch.full((length,), float("nan")), "not above zero and finite"),
        (lambda length, before, after: torch.full((length,), float("inf")), "not above zero and finite"),
    ],
)
def test_bad_callables_are_refused(window: Any, message: str) -> None:
    with pytest.raises(TilingError, match=message):
        tile_weights(plan_grid((8, 8), tile=8, overlap=0), 0, window)
