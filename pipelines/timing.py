"""Where the time of a call goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from latent_tiles.denoiser import Denoiser
from latent_tiles.families import ModelCall
from latent_tiles.patches import patched


class Stopwatch:
    """Seconds of each phase of a call, measured on a device that has finished its work.

    Args:
        device: where the models run; an accelerator is synchronised before the clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self.now()
        self._denoise: tuple[float, float] | None = None
        self.seconds: dict[str, float] = {"encode": 0.0, "decode": 0.0}

    def now(self) -> float:
        """The time in seconds, once everything asked of the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def denoising(self) -> None:
        """The denoiser starts; only the first of a call counts."""
        if self._denoise is None:
            moment = self.now()
            self._denoise = (moment, moment)

    def stepped(self) -> None:
        """The sampler has finished a step; the last of a call counts."""
        if self._denoise is not None:
            self._denoise = (self._denoise[0], self.now())

    def finish(self) -> dict[str, float]:
        """Seconds of "encode", "denoise", "decode" and "total"."""
        start, stop = self._denoise or (0.0, 0.0)
        return {
            "encode": self.seconds["encode"],
            "denoise": stop - start,
            "decode": self.seconds["decode"],
            "total": self.now() - self._start,
        }

    @contextmanager
    def watching(self, target: Any, name: str) -> Generator[None, None, None]:
        """Within the block, calls of a method are counted in the phase of the same name."""
        original = getattr(target, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = original(*args, **kwargs)
            self.seconds[name] += self.now() - start
            return result

        with patched(target, name, timed):
            yield


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A denoiser whose first call starts the watch's denoising phase."""

    denoiser: Denoiser
    watch: Stopwatch

    def predict(self, call: ModelCall) -> Any:
        """The denoiser's own answer."""
        self.watch.denoising()
        return self.denoiser.predict(call)
