"""Attributes are put back."""

from __future__ import annotations

import pytest

from latent_tiles.patches import patched


class Thing:
    def act(self) -> str:
        return "class"


def test_an_attribute_of_the_class_is_uncovered_again() -> None:
    thing = Thing()
    with patched(thing, "act", lambda: "patch"):
        assert thing.act() == "patch"
    assert thing.act() == "class"
    assert vars(thing) == {}


def test_an_attribute_of_the_instance_is_restored_also_on_errors() -> None:
    thing = Thing()
    thing.act = lambda: "mine"  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"), patched(thing, "act", lambda: "patch"):
        raise RuntimeError("stop")
    assert thing.act() == "mine"


def test_what_somebody_else_set_meanwhile_is_left_alone() -> None:
    thing = Thing()
    with patched(thing, "act", lambda: "patch"):
        thing.act = lambda: "theirs"  # type: ignore[method-assign]
    assert thing.act() == "theirs"


def test_patches_nest() -> None:
    thing = Thing()
    with patched(thing, "act", lambda: "outer"):
        with patched(thing, "act", lambda: "inner"):
            assert thing.act() == "inner"
        assert thing.act() == "outer"
    assert thing.act() == "class"
