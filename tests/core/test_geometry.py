"""Boxes, the tile planner and its order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latent_tiles.errors import GeometryError
from latent_tiles.geometry import Box, Size, Span, TileGrid, as_size, nearest, plan_grid, wavefront

Pair = tuple[int, int]
Request = tuple[Pair, Pair, Pair, int]

MULTIPLES = st.sampled_from([1, 2, 4, 8])


@st.composite
def requests(draw: st.DrawFn, longest: int = 3000) -> Request:
    """Frame, tile, overlap and multiple of which a grid can be made."""
    multiple = draw(MULTIPLES)
    frame = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    # Not below 1/40 of the frame, so that no grid has more than some ten thousand tiles.
    tile = tuple(multiple * draw(st.integers(max(1, math.ceil(length / 40 / multiple)), 128)) for length in frame)
    tile = tuple(max(length, 2 * multiple) for length in tile)
    overlap = tuple(draw(st.integers(0, (length - multiple) * 3 // 4)) for length in tile)
    return frame, tile, overlap, multiple


PHOTOS: list[Request] = [
    ((1, 1), (8, 8), (2, 2), 1),
    ((2999, 1999), (512, 512), (64, 64), 8),
    ((513, 512), (512, 512), (64, 64), 8),
    ((4000 // 8, 6000 // 8), (128, 128), (16, 16), 8),
    ((97, 101), (16, 24), (15, 0), 1),
    ((17, 33), (16, 16), (8, 8), 8),
]


def with_photos(test: Callable[..., Any]) -> Callable[..., Any]:
    for photo in PHOTOS:
        test = example(photo)(test)
    return test


@with_photos
@given(requests())
def test_the_planner_keeps_all_its_promises(request_: Request) -> None:
    frame, tile, overlap, multiple = request_
    grid = plan_grid(frame, tile, overlap, multiple_of=multiple)
    assert grid.frame == frame
    assert isinstance(grid.frame, Size)
    for spans, length, asked, least in zip((grid.rows, grid.columns), frame, tile, overlap, strict=True):
        assert spans[0].start == 0
        assert spans[-1].stop == length
        for span in spans:
            assert 0 <= span.start < span.stop <= length
            assert span.start % multiple == 0
            assert span.length <= asked
            # No slivers.
            assert span.length > asked - multiple or len(spans) == 1
        if len(spans) == 1:
            assert spans[0].length == length <= asked
        else:
            assert length > asked
        for before, after in itertools.pairwise(spans):
            assert before.start < after.start
            assert before.stop - after.start >= least
        strides = [after.start - before.start for before, after in itertools.pairwise(spans)]
        if strides:
            assert max(strides) - min(strides) <= multiple, "overlaps are spread evenly"
        # Everything but the last tile is whole.
        assert all(span.length == asked for span in spans[:-1])


@with_photos
@given(requests())
def test_no_fewer_tiles_would_do(request_: Request) -> None:
    frame, tile, overlap, multiple = request_
    grid = plan_grid(frame, tile, overlap, multiple_of=multiple)
    for spans, length, asked, least in zip((grid.rows, grid.columns), frame, tile, overlap, strict=True):
        if len(spans) > 1:
            reach = asked + (len(spans) - 2) * ((asked - least) // multiple * multiple)
            assert reach < length


@with_photos
@given(requests())
def test_boxes_are_rows_times_columns_row_by_row(request_: Request) -> None:
    frame, tile, overlap, multiple = request_
    grid = plan_grid(frame, tile, overlap, multiple_of=multiple)
    assert len(grid) == len(grid.boxes) == len(list(grid)) == len(grid.rows) * len(grid.columns)
    assert list(grid.boxes) == sorted(grid.boxes)
    for index in {0, len(grid) // 2, len(grid) - 1}:
        row, column = grid.place(index)
        assert grid[index] == Box(
            grid.rows[row].start, grid.columns[column].start, grid.rows[row].length, grid.columns[column].length
        )
    assert grid.tile == grid[0].size == Size(min(tile[0], frame[0]), min(tile[1], frame[1]))
    assert grid.cost == pytest.approx(sum(box.area for box in grid) / (frame[0] * frame[1]))
    assert grid.cost >= 1


@given(requests(longest=120))
def test_every_position_is_covered(request_: Request) -> None:
    frame, tile, overlap, multiple = request_
    grid = plan_grid(frame, tile, overlap, multiple_of=multiple)
    for spans, length in ((grid.rows, frame[0]), (grid.columns, frame[1])):
        covered = {position for span in spans for position in range(span.start, span.stop)}
        assert covered == set(range(length))


@with_photos
@given(requests())
def test_ramps_are_the_real_overlaps(request_: Request) -> None:
    frame, tile, overlap, multiple = request_
    grid = plan_grid(frame, tile, overlap, multiple_of=multiple)
    for index in {0, len(grid) // 3, len(grid) // 2, len(grid) - 1}:
        row, column = grid.place(index)
        box = grid[index]
        (above, below), (left, right) = grid.ramps(index)
        width = len(grid.columns)
        for ramp, exists, other, height in (
            (above, row > 0, index - width, True),
            (below, row + 1 < len(grid.rows), index + width, True),
            (left, column > 0, index - 1, False),
            (right, column + 1 < width, index + 1, False),
        ):
            common = box.intersection(grid[other]) if exists else None
            expected = 0 if common is None else (common.height if height else common.width)
            assert ramp == expected


def test_every_frame_length_up_to_3000() -> None:
    """All of them, primes and one pixel over among them, on the axis planner's own terms."""
    for length in range(1, 3001):
        for tile, overlap, multiple in ((512, 64, 8), (96, 95 // 2, 1), (64, 16, 8)):
            spans = plan_grid((1, length), (1, tile) if multiple == 1 else (multiple, tile), (0, overlap),
                              multiple_of=multiple).columns  # fmt: skip
            assert spans[0].start == 0
            assert spans[-1].stop == length
            assert all(span.start % multiple == 0 for span in spans)
            assert all(b.start < a.stop and a.stop - b.start >= overlap for a, b in itertools.pairwise(spans))
            assert len(spans) == 1 or min(span.length for span in spans) > tile - multiple


def test_the_docstrings_example_of_a_photo() -> None:
    grid = plan_grid((1000, 1500), tile=512, overlap=64)
    assert [row.start for row in grid.rows] == [0, 244, 488]
    assert [column.start for column in grid.columns] == [0, 329, 658, 988]
    assert (len(grid), grid[0], grid[-1]) == (12, Box(0, 0, 512, 512), Box(488, 988, 512, 512))


def test_without_overlap_and_remainder_the_cost_is_one() -> None:
    assert plan_grid((64, 96), tile=32, overlap=0).cost == 1.0


def test_a_frame_smaller_than_the_tile_is_one_tile_whatever_the_multiple() -> None:
    grid = plan_grid((13, 7), tile=100, overlap=10, multiple_of=8)
    assert grid.boxes == (Box(0, 0, 13, 7),)
    assert wavefront(grid) == ((0,),)


def test_equal_tiles_where_the_frame_is_a_multiple() -> None:
    grid = plan_grid((200, 304), tile=64, overlap=16, multiple_of=8)
    assert {box.size for box in grid} == {Size(64, 64)}


def test_border_tiles_are_shorter_by_less_than_the_multiple() -> None:
    grid = plan_grid((101, 64), tile=64, overlap=16, multiple_of=8)
    assert [row.length for row in grid.rows] == [64, 61]


@pytest.mark.parametrize(
    ("frame", "tile", "overlap", "multiple", "message"),
    [
        ((0, 5), 8, 2, 1, "frame height must be at least 1, got 0"),
        ((5, -1), 8, 2, 1, "frame width must be at least 1, got -1"),
        ((5, 5), 0, 0, 1, "tile height must be at least 1, got 0"),
        ((5, 5), (8, 0), 0, 1, "tile width must be at least 1, got 0"),
        ((5, 5), 8, -1, 1, "overlap height must not be negative, got -1"),
        ((5, 5), 8, (0, -2), 1, "overlap width must not be negative, got -2"),
        ((5, 5), 8, 8, 1, "overlap 8 is not below the tile's height 8; use at most 7"),
        ((50, 50), (8, 4), (2, 9), 1, "overlap 9 is not below the tile's width 4; use at most 3"),
        ((50, 50), 12, 4, 8, "tile height 12 is not a multiple of 8; use 8 or 16"),
        ((50, 50), 5, 4, 8, "tile height 5 is not a multiple of 8; use 8$"),
        ((50, 50), 16, 9, 8, "overlap 9 leaves less than 8 of the tile's height 16 to advance by; use at most 8"),
        ((5, 5), 8, 2, 0, "multiple_of must be at least 1, got 0"),
    ],
)
def test_impossible_requests_are_refused(frame: Pair, tile: Any, overlap: Any, multiple: int, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        plan_grid(frame, tile, overlap, multiple_of=multiple)


def test_the_largest_overlap_that_a_refusal_names_is_accepted() -> None:
    assert len(plan_grid((50, 50), 16, 8, multiple_of=8)) > 1
    assert len(plan_grid((50, 50), 8, 7)) == 43**2


@given(st.integers(1, 25), st.integers(1, 25))
def test_wavefront_order(rows: int, columns: int) -> None:
    grid = TileGrid(
        frame=Size(rows, columns),
        rows=tuple(Span(k, 1) for k in range(rows)),
        columns=tuple(Span(k, 1) for k in range(columns)),
    )
    ticks = wavefront(grid)
    assert sorted(index for tick in ticks for index in tick) == list(range(len(grid)))
    assert all(ticks)
    assert len(ticks) == rows + columns - 1
    tick_of = {grid.place(index): number for number, tick in enumerate(ticks) for index in tick}
    for (row, column), number in tick_of.items():
        for earlier in ((row, column - 1), (row - 1, column), (row - 1, column - 1)):
            assert tick_of.get(earlier, -1) < number
        # Corner neighbours on the anti-diagonal share a tick: neither can wait for the other.
        assert tick_of.get((row - 1, column + 1), number) == number


def test_wavefront_of_16_by_11_tiles_takes_26_ticks() -> None:
    grid = plan_grid((16 * 48 + 16, 11 * 48 + 16), tile=64, overlap=16, multiple_of=8)
    assert (len(grid.rows), len(grid.columns), len(grid)) == (16, 11, 176)
    assert len(wavefront(grid)) == 26


def test_box_arithmetic() -> None:
    box = Box(3, 5, 7, 11)
    assert (box.bottom, box.right, box.area, box.size) == (10, 16, 77, Size(7, 11))
    assert box.size.area == 77
    assert Span(3, 7).stop == 10
    assert box.to_slices() == (slice(3, 10), slice(5, 16))
    assert box.scaled(8) == Box(24, 40, 56, 88)
    assert box.scaled(8).shrunk(8) == box


def test_shrinking_rounds_odd_ends_outwards() -> None:
    assert Box(4, 8, 5, 7).shrunk(2) == Box(2, 4, 3, 4)


@given(st.builds(Box, *[st.integers(0, 40)] * 2, *[st.integers(1, 40)] * 2), st.sampled_from([1, 2, 4]))
def test_a_shrunk_box_covers_the_box(box: Box, factor: int) -> None:
    aligned = Box(box.top * factor, box.left * factor, box.height, box.width)
    back = aligned.shrunk(factor).scaled(factor)
    assert back.intersection(aligned) == aligned
    assert back.bottom - aligned.bottom < factor
    assert back.right - aligned.right < factor


@pytest.mark.parametrize("box", [Box(3, 4, 8, 8), Box(4, 3, 8, 8)])
def test_shrinking_an_origin_off_the_grid_is_refused(box: Box) -> None:
    with pytest.raises(GeometryError, match="is not a multiple of 2; plan the grid with multiple_of=2"):
        box.shrunk(2)


@given(*[st.builds(Box, *[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2)] * 2)
def test_intersection_is_the_common_rectangle(one: Box, other: Box) -> None:
    def positions(box: Box) -> set[tuple[int, int]]:
        return set(itertools.product(range(box.top, box.bottom), range(box.left, box.right)))

    common = one.intersection(other)
    assert (positions(common) if common else set()) == positions(one) & positions(other)
    assert common == other.intersection(one)


@pytest.mark.parametrize(("value", "expected"), [(3, Size(3, 3)), ((3, 4), Size(3, 4)), (Size(5, 6), Size(5, 6))])
def test_one_number_stands_for_both_axes(value: int | tuple[int, int], expected: Size) -> None:
    assert as_size(value) == expected


@pytest.mark.parametrize(("value", "text"), [(70, "use 64 or 128"), (5, "use 64")])
def test_the_nearest_multiples_are_named(value: int, text: str) -> None:
    assert nearest(value, 64) == text
