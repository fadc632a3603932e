from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from latent_tiles.errors import CanvasError, SpillError
from latent_tiles.executor.maps import Map
from latent_tiles.executor.spill import MapStore, place_maps
from latent_tiles.geometry import Box


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_map_on_disk_gives_back_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 9, 11).to(dtype)
    with MapStore("cpu", tmp_path) as store:
        kept = store.make((2, 3, 9, 11), dtype, "disk")
        kept.write(Box(0, 0, 9, 6), values[..., :6])
        kept.write(Box(0, 6, 9, 5), values[..., 6:])
        assert torch.equal(kept.read(Box(2, 3, 5, 7)), values[:, :, 2:7, 3:10])
        store.drop(kept)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file has a name until it is closed")
def test_a_spill_file_has_no_name(tmp_path: Path) -> None:
    with MapStore("cpu", tmp_path) as store:
        kept = store.make((1, 1, 64, 64), torch.float32, "disk")
        kept.write(Box(0, 0, 64, 64), torch.ones(1, 1, 64, 64))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows ends processes otherwise")
def test_a_killed_process_leaves_no_spill_file(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from pathlib import Path; from latent_tiles.executor.spill import MapStore\n"
        "kept = MapStore('cpu', Path(sys.argv[1])).make((1, 4, 256, 256), torch.float32, 'disk')\n"
        "kept.values.fill_(1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**30, 2**30 - 2**20, 2**20))
    with MapStore("cpu", tmp_path) as store, pytest.raises(SpillError, match=r"4 MiB does not fit into the 1 MiB free"):
        store.make((1, 1, 1024, 1024), torch.float32, "disk")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system does not claim space")
def test_a_disk_that_fills_up_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with MapStore("cpu", tmp_path) as store, pytest.raises(SpillError, match="No space left on device"):
        store.make((1, 1, 64, 64), torch.float32, "disk")
    assert list(tmp_path.iterdir()) == []


def test_maps_go_to_the_first_place_with_room() -> None:
    sizes = {0: 40, 1: 40, 2: 40, 3: 10}
    order: list[tuple[int | None, tuple[int, ...]]] = [(0, ()), (1, ()), (None, (0,)), (2, ()), (3, (1, 2))]
    placed = place_maps(sizes, order, {"host": 50, "disk": 100})
    assert placed == ({0: "host", 1: "disk", 2: "host", 3: "host"}, {"host": 50, "disk": 40})
    assert place_maps(sizes, order, {"host": 50, "disk": 30}) is None


def test_reading_outside_a_map_is_an_error() -> None:
    with pytest.raises(CanvasError, match="leaves the map of 4 x 5"):
        Map(torch.zeros(1, 1, 4, 5)).read(Box(2, 0, 3, 5))


def test_what_is_read_is_a_copy() -> None:
    values = torch.zeros(1, 2, 4, 5)
    Map(values).read(Box(0, 0, 4, 5)).fill_(1.0)
    assert torch.equal(values, torch.zeros(1, 2, 4, 5))
