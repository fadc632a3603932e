"""Where whole maps are kept: on the device, in memory, or on disk in a file that cannot be left behind."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from latent_tiles.errors import SpillError
from latent_tiles.executor.maps import Map

Place = Literal["device", "host", "disk"]


class MapStore:
    """Makes and drops whole maps; a context manager that leaves nothing behind.

    Maps are laid out channels last, so that the rows of a window are dense. A spill file has no name where the system
    allows that (Linux, macOS), and is opened to be deleted on closing elsewhere: it goes with the process, also when
    that is killed. Its whole size is claimed at once, so that a full disk is an error here and not a crash later.

    Args:
        device: the "device" place, and where windows are read to.
        folder: where spill files are made; the system's temporary folder if None.
    """

    def __init__(self, device: torch.device | str, folder: Path | None = None) -> None:
        self._device, self._folder = torch.device(device), folder
        self._files: dict[int, ExitStack] = {}

    def __enter__(self) -> MapStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for files in self._files.values():
            files.close()
        self._files.clear()

    def make(self, shape: tuple[int, int, int, int], dtype: torch.dtype, place: Place) -> Map:
        """A map of a shape (rows, channels, height, width), not initialised.

        Raises:
            SpillError: the spill folder cannot take it.
        """
        if place == "disk":
            rows, channels, height, width = shape
            with ExitStack() as opened:
                flat = self._on_disk(math.prod(shape) * dtype.itemsize, opened)
                files = opened.pop_all()
            values = flat.view(dtype).view(rows, height, width, channels).permute(0, 3, 1, 2)
            made = Map(values, self._device)
            self._files[id(made)] = files
            return made
        where = self._device if place == "device" else torch.device("cpu")
        values = torch.empty(shape, dtype=dtype, device=where, memory_format=torch.channels_last)
        return Map(values, self._device)

    def drop(self, gone: Map) -> None:
        """Give a map's memory or disk space back."""
        files = self._files.pop(id(gone), None)
        gone.values = torch.empty(0, 0, 0, 0)
        if files is not None:
            files.close()

    def _on_disk(self, size: int, files: ExitStack) -> torch.Tensor:
        folder = str(self._folder) if self._folder is not None else tempfile.gettempdir()
        try:
            free = shutil.disk_usage(folder).free
            if size > free:
                msg = f"a map of {size / 2**20:.0f} MiB does not fit into the {free / 2**20:.0f} MiB free in {folder}; "
                raise SpillError(msg + "choose another spill_dir or a smaller spill budget")
            file = files.enter_context(tempfile.TemporaryFile(dir=folder, prefix="latent-tiles-"))  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)))
        except OSError as error:
            if isinstance(error, SpillError):
                raise
            msg = f"cannot spill {size / 2**20:.0f} MiB to {folder}: {error}; choose another spill_dir"
            raise SpillError(msg) from error


def place_maps(
    sizes: Mapping[int, int], order: list[tuple[int | None, tuple[int, ...]]], room: Mapping[Place, int]
) -> tuple[dict[int, Place], dict[Place, int]] | None:
    """Decide for each map, in the order in which they are made, on the first place with room for it.

    Args:
        sizes: bytes of each map.
        order: for each pass the map it makes (None if none), and the maps that are dropped after it.
        room: bytes of each place, best place first.

    Returns:
        The place of each map and the most bytes held in each place, or None where they do not fit.
    """
    used, peak = Counter[Place](), Counter[Place]()
    places: dict[int, Place] = {}
    for made, dropped in order:
        if made is not None:
            place: Place | None = next((entry for entry in room if used[entry] + sizes[made] <= room[entry]), None)
            if place is None:
                return None
            places[made] = place
            used[place] += sizes[made]
            peak[place] = max(peak[place], used[place])
        for gone in dropped:
            if gone in places:
                used[places[gone]] -= sizes[gone]
    return places, {place: peak[place] for place in room}
