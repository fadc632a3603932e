"""Which errors are the user's, which the run's, and what to do about them."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from latent_tiles.errors import CanvasError, FrameFileError, LatentTilesError

RUN_FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130

_ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch's CPU allocators (Unix, Windows) and MPS word it: they raise a bare RuntimeError."""


class RunError(LatentTilesError, RuntimeError):
    """The input was fine, the run was not."""


def status_of(error: LatentTilesError) -> int:
    """Exit status for an error that latent-tiles raised on purpose."""
    return RUN_FAILED if isinstance(error, RunError | CanvasError) else WRONG_USE


@contextmanager
def writing() -> Generator[None, None, None]:
    """All checks are passed: what fails now is the disk, not the user's input.

    Raises:
        RunError: a file could not be written.
    """
    try:
        yield
    except FrameFileError as error:
        raise RunError(str(error)) from error


def explain_out_of_memory(error: BaseException) -> str | None:
    """What to lower where memory ran out; None where something else happened."""
    # A torch that was never imported cannot have raised.
    torch = sys.modules.get("torch")
    known = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    if not known and not any(wording in str(error).lower() for wording in _ALLOCATORS):
        return None
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"out of memory; lower --tile-batch, then --tile, then --scale ({first})"
