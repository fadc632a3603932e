"""Replace an attribute of an object for a while, and put everything back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def patched(target: Any, name: str, value: Any) -> Generator[None, None, None]:
    """Set an instance attribute inside a `with` block.

    On leaving, the attribute is what it was; one that the instance did not have itself is deleted. Where somebody else
    has set it meanwhile, as model offload does with `forward` at the end of a host's call, theirs is left alone.

    Args:
        target: object with an instance dictionary.
        name: name of the attribute.
        value: what it is meanwhile.
    """
    before = vars(target).get(name, _MISSING)
    setattr(target, name, value)
    try:
        yield
    finally:
        if vars(target).get(name, _MISSING) is value:
            if before is _MISSING:
                delattr(target, name)
            else:
                setattr(target, name, before)
