"""Memory strategies by name: `"none"`, `"pin"`, `"pin:lambda=0.5"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latent_tiles.errors import MemoryStrategyError
from latent_tiles.memory.base import TileMemory
from latent_tiles.memory.none import NoMemory
from latent_tiles.memory.pin import Pin


def _none(settings: Mapping[str, str]) -> TileMemory:
    _only("none", settings)
    return NoMemory()


def _pin(settings: Mapping[str, str]) -> TileMemory:
    _only("pin", settings, "lambda")
    return Pin(strength=_number("pin", "lambda", settings.get("lambda", "1")))


_STRATEGIES: dict[str, Callable[[Mapping[str, str]], TileMemory]] = {"none": _none, "pin": _pin}


def build_memory(spec: str) -> TileMemory:
    """A fresh strategy for one pipeline call.

    Args:
        spec: `name` or `name:key=value,key=value`.

    Raises:
        MemoryStrategyError: unknown name (lists the known ones), unknown key, or a value out of range.

    Example:
        >>> build_memory("pin:lambda=0.5").order_free
        False
    """
    name, _, rest = spec.partition(":")
    if name not in _STRATEGIES:
        raise MemoryStrategyError(f"unknown memory {spec!r}; use one of {', '.join(_STRATEGIES)}")
    settings: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, separator, value = item.partition("=")
        if not separator:
            raise MemoryStrategyError(f"{name}: expected key=value, got {item!r}")
        if key.strip() in settings:
            raise MemoryStrategyError(f"{name}: {key.strip()} is given twice")
        settings[key.strip()] = value.strip()
    return _STRATEGIES[name](settings)


def _only(name: str, settings: Mapping[str, str], *known: str) -> None:
    for key in settings:
        if key not in known:
            fix = f"it takes {', '.join(known)}" if known else "it takes no settings"
            raise MemoryStrategyError(f"{name}: unknown setting {key!r}; {fix}")


def _number(name: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise MemoryStrategyError(f"{name}: {key} must be a number, got {value!r}") from None
