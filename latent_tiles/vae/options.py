"""How an autoencoder is to be run, and within which budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from latent_tiles.errors import VaeError

Mode = Literal["exact", "sampled", "stock"]
VaeProgress = Callable[[str, int, int], None]
"""Told after every window: "encode" or "decode", windows done, windows in all."""


@dataclass(frozen=True, kw_only=True)
class VaeOptions:
    """How an autoencoder is run.

    Args:
        mode: "exact" equals one untiled pass up to rounding; "sampled" takes the statistics of large maps from patches
            of them, which needs one pass and few maps and is measured in the pass; "stock" changes nothing.
        tile: side of a window in pixels of the image, at least 16; coarser maps, which have more channels, get windows
            of as many values. None: chosen for the device. It does not change the result.
        device_budget_mib: what windows (and on a GPU the maps kept there) may take on the device. None: on a CPU what
            windows need, on a GPU 0.8 of what is free.
        ram_budget_mib: what maps kept between passes may take in memory. None: half of what is free.
        spill_budget_mib: what maps may take on disk where memory does not suffice. 0: nothing is written to disk.
        spill_dir: the folder for that; the system's temporary folder if None. It is empty afterwards, also after a
            crash.
        time_budget_s: refuse beforehand what is predicted to take longer.
        attention_keys: attend to at most so many evenly spread positions instead of all; the error this makes is
            measured on some positions and reported. None: to all, whose cost grows with the square of the frame.
        residual_limit: in mode "sampled", warn where the statistics used and those of the whole map differ by more
            than this part of a standard deviation.
        progress: told after every window.

    Raises:
        VaeError: a value is out of range.
    """

    mode: Mode = "exact"
    tile: int | None = None
    device_budget_mib: float | None = None
    ram_budget_mib: float | None = None
    spill_budget_mib: float = 0.0
    spill_dir: str | Path | None = None
    time_budget_s: float | None = None
    attention_keys: int | None = None
    residual_limit: float = 5e-4
    progress: VaeProgress | None = None

    def __post_init__(self) -> None:
        """Validate."""
        if self.mode not in get_args(Mode):
            raise VaeError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.tile is not None and self.tile < 16:
            raise VaeError(f"tile must be at least 16 pixels, got {self.tile}")
        for name in ("device_budget_mib", "ram_budget_mib", "spill_budget_mib", "time_budget_s", "residual_limit"):
            value: float | None = getattr(self, name)
            if value is not None and (math.isnan(value) or value < 0):
                raise VaeError(f"{name} must not be negative, got {value}")
            if value is not None and name.endswith("_mib") and math.isinf(value):
                raise VaeError(f"{name} must be finite, got {value}; give what the machine has")
        if self.attention_keys is not None and self.attention_keys < 1:
            raise VaeError(f"attention_keys must be at least 1, got {self.attention_keys}")
        if self.spill_dir is not None and not Path(self.spill_dir).is_dir():
            raise VaeError(f"spill_dir {str(self.spill_dir)!r} is not a folder; make it first")
