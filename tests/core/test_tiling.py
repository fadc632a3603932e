"""The public `Tiling` and its conversion to latents."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_tiles.errors import GeometryError, TilingError
from latent_tiles.geometry import Size, as_size
from latent_tiles.tiling import LatentUnits, Tiling

SD = LatentUnits(pixels_per_latent=8, multiple_of=8)


def test_defaults_leave_the_models_own_values_open() -> None:
    tiling = Tiling()
    assert (tiling.tile, tiling.overlap, tiling.memory) == (None, None, None)
    assert (tiling.window, tiling.tile_batch, tiling.noise, tiling.origin) == ("cosine", 1, "field", (0, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 0}, "tile must be at least 1 px, got 0"),
        ({"tile": (64, -1)}, r"tile must be at least 1 px, got \(64, -1\)"),
        ({"overlap": -1}, "overlap must not be negative, got -1 px"),
        ({"tile": 64, "overlap": 64}, "overlap 64 px is not below the tile's height 64 px"),
        ({"tile": (128, 64), "overlap": (64, 65)}, "overlap 65 px is not below the tile's width 64 px"),
        ({"tile_batch": 0}, "tile_batch must be at least 1, got 0"),
        ({"window": "hann"}, "unknown window 'hann'; use one of cosine, linear, gaussian, uniform"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TilingError, match=message):
        Tiling(**settings)


def test_an_unknown_noise_lists_the_known() -> None:
    tiling = Tiling()  # changed past the run-time type check of the test suite, which a user does not have
    object.__setattr__(tiling, "noise", "fresh")
    with pytest.raises(TilingError, match="unknown noise 'fresh'; use one of field, host"):
        tiling.__post_init__()


def test_a_callable_window_is_accepted() -> None:
    def own(length: int, before: int, after: int) -> Any:
        raise NotImplementedError

    assert Tiling(window=own).window is own


def test_resolve_fills_in_what_was_left_open_and_nothing_else() -> None:
    filled = SD.resolve(Tiling(window="linear", origin=(8, 8)), tile=512, overlap=64, memory="pin")
    assert filled == Tiling(tile=512, overlap=64, memory="pin", window="linear", origin=(8, 8))
    given_ = Tiling(tile=256, overlap=0, memory="none")
    assert SD.resolve(given_, tile=512, overlap=64, memory="pin") == given_
    assert SD.resolve(Tiling(overlap=(8, 16)), tile=512, overlap=64, memory="pin").overlap == (8, 16)


@pytest.mark.parametrize(
    ("tile", "expected"),
    [(512, 64), (128, 64), (64, 0), ((512, 64), (64, 0)), (96, 12), ((96, 512), (12, 64)), (32, 0)],
)
def test_a_default_overlap_shrinks_with_a_small_tile(tile: Any, expected: Any) -> None:
    assert SD.resolve(Tiling(tile=tile), tile=512, overlap=64, memory="none").overlap == expected


@given(
    tile=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    overlap=st.integers(0, 600),
    units=st.builds(
        LatentUnits, pixels_per_latent=st.sampled_from([1, 4, 8]), multiple_of=st.sampled_from([1, 2, 4, 8])
    ),
)
def test_a_default_overlap_always_makes_a_grid(tile: tuple[int, int], overlap: int, units: LatentUnits) -> None:
    size = (tile[0] * units.multiple_px, tile[1] * units.multiple_px)
    tiling = units.resolve(Tiling(tile=size), tile=512, overlap=overlap, memory="none")
    assert tiling.overlap is not None
    assert max(as_size(tiling.overlap)) <= overlap
    grid = units.grid(Size(70, 55), tiling)
    assert grid.tile <= Size(size[0], size[1])


def test_the_grid_is_in_latents() -> None:
    grid = SD.grid(Size(128, 192), Tiling(tile=(512, 768), overlap=64))
    assert grid.frame == Size(128, 192)
    assert grid.tile == Size(64, 96)
    assert [row.start for row in grid.rows] == [0, 32, 64]
    assert all(span.start % 8 == 0 for span in (*grid.rows, *grid.columns))


def test_an_overlap_between_two_latents_rounds_up() -> None:
    units = LatentUnits(pixels_per_latent=8, multiple_of=1)
    grid = units.grid(Size(100, 100), Tiling(tile=128, overlap=33))
    assert grid.rows[0].stop - grid.rows[1].start >= 5


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(), "tile and overlap are not set; give them, or fill in a model's with `resolve`"),
        (Tiling(tile=512), "tile and overlap are not set"),
        (Tiling(overlap=8), "tile and overlap are not set"),
        (Tiling(tile=56, overlap=0), "tile height 56 px is below this model's minimum of 64 px"),
        (Tiling(tile=(64, 32), overlap=0), "tile width 32 px is below this model's minimum of 64 px"),
        (Tiling(tile=500, overlap=0), "tile height 500 px is not a multiple of the 64 px this model needs; use 448 or"),
        (
            Tiling(tile=128, overlap=65),
            "overlap 65 px leaves no room to advance a tile of 128 px by 64 px; use at most 64 px",
        ),
    ],
)
def test_tilings_that_do_not_fit_the_model_are_refused(tiling: Tiling, message: str) -> None:
    with pytest.raises(TilingError, match=message):
        SD.grid(Size(128, 128), tiling)


def test_the_overlap_that_the_refusal_names_is_accepted() -> None:
    assert len(SD.grid(Size(128, 128), Tiling(tile=128, overlap=64))) > 1


def test_a_bad_tile_is_refused_also_where_the_frame_is_smaller() -> None:
    with pytest.raises(TilingError, match="is not a multiple of"):
        SD.grid(Size(8, 8), Tiling(tile=500, overlap=0))


def test_an_empty_canvas_is_refused() -> None:
    with pytest.raises(GeometryError, match="frame height must be at least 1, got 0"):
        SD.grid(Size(0, 8), Tiling(tile=64, overlap=0))


def test_the_origin_is_in_latents() -> None:
    assert SD.origin(Tiling()) == (0, 0)
    assert SD.origin(Tiling(origin=(64, -8))) == (8, -1)


@pytest.mark.parametrize("origin", [(4, 0), (0, -1)])
def test_an_origin_between_latents_is_refused(origin: tuple[int, int]) -> None:
    with pytest.raises(TilingError, match=r"origin \(.*\) px is not a multiple of 8 px, one latent's side"):
        SD.origin(Tiling(origin=origin))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_padding_is_the_least_that_the_model_needs(height: int, width: int) -> None:
    assert SD.multiple_px == 64
    padded = SD.padded(Size(height, width))
    for length, grown in zip((height, width), padded, strict=True):
        assert grown % 64 == 0
        assert 0 <= grown - length < 64
