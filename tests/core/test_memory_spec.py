"""Memory strategies by name."""

from __future__ import annotations

import pytest

from latent_tiles.errors import MemoryStrategyError
from latent_tiles.geometry import plan_grid
from latent_tiles.memory import TileMemory, build_memory
from latent_tiles.memory.none import NoMemory
from latent_tiles.memory.pin import Pin


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("none", NoMemory),
        ("pin", Pin),
        ("pin:", Pin),
        ("pin:lambda=0", Pin),
        ("pin:lambda=1", Pin),
        ("pin: lambda = 0.25 ,", Pin),
    ],
)
def test_names_give_strategies(spec: str, kind: type[TileMemory]) -> None:
    memory = build_memory(spec)
    assert isinstance(memory, kind)
    assert isinstance(memory, TileMemory)


def test_settings_reach_the_strategy() -> None:
    strengths = [getattr(build_memory(spec), "_strength") for spec in ("pin", "pin:lambda=0.25")]  # noqa: B009
    assert strengths == [1.0, 0.25]


def test_every_call_builds_a_fresh_one() -> None:
    assert build_memory("pin") is not build_memory("pin")


def test_whether_order_matters_is_stated() -> None:
    assert build_memory("none").order_free
    assert not build_memory("pin").order_free


@pytest.mark.parametrize("spec", ["none", "pin"])
def test_every_tile_has_its_tick_once(spec: str) -> None:
    grid = plan_grid((100, 140), tile=32, overlap=8)
    ticks = build_memory(spec).ticks(grid)
    assert sorted(index for tick in ticks for index in tick) == list(range(len(grid)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown memory ''; use one of none, pin"),
        ("Pin", "unknown memory 'Pin'; use one of none, pin"),
        ("scan:lambda=1", "unknown memory 'scan:lambda=1'; use one of none, pin"),
        ("pin:0.5", "pin: expected key=value, got '0.5'"),
        ("pin:strength=1", "pin: unknown setting 'strength'; it takes lambda"),
        ("none:lambda=1", "none: unknown setting 'lambda'; it takes no settings"),
        ("pin:lambda=much", "pin: lambda must be a number, got 'much'"),
        ("pin:lambda=", "pin: lambda must be a number, got ''"),
        ("pin:lambda=1,lambda=1", "pin: lambda is given twice"),
        ("pin:lambda=1.01", "pin: lambda must be between 0 and 1, got 1.01"),
        ("pin:lambda=-0.1", "pin: lambda must be between 0 and 1, got -0.1"),
        ("pin:lambda=nan", "pin: lambda must be between 0 and 1, got nan"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(MemoryStrategyError, match=message):
        build_memory(spec)
