"""The benchmark of autoencoders runs, and its measures say what they should."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from latent_tiles.geometry import Box, Size

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_vae.py"
LEVELS = 127.5


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_vae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Its processes of their own import it by name.
        patch.syspath_prepend(str(SCRIPT.parent))
        sys.modules["bench_vae"] = module
        spec.loader.exec_module(module)
        yield module


TINY = {
    "--parts": ["compare", "half"],
    "--models": ["reference"],
    "--device": ["cpu"],
    "--side": ["128"],
    "--half-side": ["32"],
    "--tile": ["64"],
    "--repeats": ["1"],
    "--beyond": ["0.01"],
    "--tiles": ["64", "48"],
}
OPTIONS = [word for option, values in TINY.items() for word in (option, *values)]


@pytest.fixture(scope="module")
def figures(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run at tiny size writes."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        # It speaks for its own process only, which this is not.
        patch.setattr(bench, "quiet", lambda: None)
        bench.main([*OPTIONS, "--same-process", "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_what_it_measured(figures: dict[str, Any]) -> None:
    assert {"environment", "settings", "compare", "half", "frame", "beyond", "bars"} == set(figures)
    assert [entry["direction"] for entry in figures["compare"]] == ["encode", "decode"]
    for entry in figures["compare"]:
        for way in entry["ways"].values():
            assert way["seconds"] > 0
            assert way["time_ratio"] > 0
            assert way["peak_mib"] is None or way["peak_mib"] >= 0


def test_exact_is_exact_and_plain_tiling_is_not(figures: dict[str, Any]) -> None:
    for entry in figures["compare"]:
        exact, stock = entry["ways"]["exact"]["error"], entry["ways"]["enable_tiling, 64 px"]["error"]
        assert exact["max_of_range"] <= 1e-4
        assert stock["max"] > 100 * exact["max"]
        assert stock["tone_deviation"] > 10 * exact["tone_deviation"]
    (beyond,) = figures["beyond"]
    assert beyond["sizes"][-1]["encode_difference"] <= 1e-4
    assert beyond["sizes"][-1]["decode_difference"] <= 1e-4
    for entry in figures["half"]:
        assert 0.8 < entry["ratio"]["rms"] < 1.25
    assert all(bar["met"] for bar in figures["bars"] if "of range" in bar["what"])


def test_tables_hold_every_way(bench: ModuleType, figures: dict[str, Any]) -> None:
    text = bench.render(figures)
    assert "| exact |" in text
    assert "| enable_tiling, 64 px |" in text
    assert "| bfloat16 |" in text


def test_an_error_has_its_size_and_its_tone(bench: ModuleType) -> None:
    reference = torch.linspace(-1, 1, 256 * 256).view(1, 1, 256, 256)
    shifted = reference.clone()
    shifted[:, :, :64, :64] += 2 / 255
    found = bench.errors(shifted, reference, "decode", 8)
    assert found["max"] == pytest.approx(1, abs=1e-3)
    assert found["mean"] == pytest.approx(1 / 16, abs=1e-3)
    assert found["tone_peak_to_peak"] == pytest.approx(1, abs=1e-3)
    noise = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)) / LEVELS
    found = bench.errors(reference + noise, reference, "decode", 8)
    assert found["mean"] > 0.5
    assert found["tone_deviation"] < 0.05


def test_a_mosaic_is_the_same_however_it_is_read(bench: ModuleType) -> None:
    size = Size(700, 1300)
    whole = bench.photograph(size)
    assert whole.shape == (1, 3, *size)
    source = bench.Mosaic(size)
    for box in (Box(0, 0, 1, 1), Box(500, 1000, 200, 300), Box(300, 400, 400, 800)):
        rows, columns = box.to_slices()
        assert torch.equal(source.read(box), whole[:, :, rows, columns])


def test_memory_that_a_block_takes_is_seen(bench: ModuleType) -> None:
    with bench.Meter(torch.device("cpu"), memory=True) as meter:
        values = torch.ones(64, 2**20)
        del values
    assert meter.host_mib is None or meter.host_mib > 200


@pytest.mark.slow
def test_each_way_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    subprocess.run([sys.executable, SCRIPT, *OPTIONS, "--json", path], check=True, capture_output=True)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert all("error" in entry["ways"]["exact"] for entry in found["compare"])
    assert found["beyond"][0]["sizes"][0]["decode"]["seconds"] > 0
