"""The measures of the reference benchmark say what they should."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from training_tiny import make_pictures

from training.data import Pixels

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_reference.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_reference"] = module
    spec.loader.exec_module(module)
    return module


def _rough_pictures() -> list[Pixels]:
    rng = np.random.default_rng(0)
    return [
        np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        for picture in make_pictures(2, side=128)
    ]


class Echo:
    """Stands for a model that returns what it is given."""

    class Pipe:
        """Holds the factor of the autoencoder."""

        vae_scale_factor = 2

    pipe = Pipe()

    def restore(self, frame: Pixels) -> Pixels:
        """The frame itself."""
        return frame

    def round_trip(self, pixels: Pixels) -> Pixels:
        """The picture itself."""
        return pixels


def test_a_perfect_method_scores_perfectly_and_a_soft_one_does_not(bench: ModuleType) -> None:
    """The round trip of a lossless autoencoder has ratio 1 and distance 0; bicubic loses the top octave."""
    pictures = [(str(index), picture) for index, picture in enumerate(_rough_pictures())]
    methods = bench.measure(pictures, Echo(), 4, None)["methods"]
    perfect, soft = methods["round trip"], methods["bicubic"]
    assert perfect["psnr_db"] > 100
    assert perfect["top_octave_energy"] == pytest.approx(1)
    assert perfect["top_octave_amplitude"] == pytest.approx(1)
    assert perfect["swd"] == pytest.approx(0)
    assert soft["psnr_db"] < 40
    assert soft["top_octave_energy"] < 0.2
    assert soft["swd"] > 0.3
    assert methods["ours"] == soft


def test_sizes_are_compared_on_the_same_pixels(bench: ModuleType) -> None:
    """A pixelwise model scores the same in blocks of any size; sizes that do not fit are left out."""
    pictures = [(str(index), picture) for index, picture in enumerate(_rough_pictures())]
    results = bench.measure_sizes(pictures, [(64, 64), (32, 64), (999, 999)], Echo(), 4)
    assert list(results) == ["64x64", "32x64"]
    for measures in results.values():
        assert measures["psnr_db"] == measures["psnr_db_at_32"]
        assert measures["pictures"] == 2


def test_steps_are_the_models_own(bench: ModuleType, tmp_path: Path) -> None:
    """The folder's default is taken; a folder that has none is run in 8."""
    assert bench.default_steps(tmp_path) == 8
    (tmp_path / "latent_tiles.json").write_text('{"num_inference_steps": 4}')
    assert bench.default_steps(tmp_path) == 4


def test_tables_hold_every_method(bench: ModuleType) -> None:
    """A report becomes Markdown."""
    pictures = [("0", _rough_pictures()[0])]
    report = {"scale": 4, "steps": 8, "val": bench.measure(pictures, Echo(), 4, None)}
    report["sizes"] = bench.measure_sizes(pictures, [(64, 64)], Echo(), 4)
    table = bench.as_table(report)
    assert "| lanczos |" in table
    assert "| 64x64 |" in table
