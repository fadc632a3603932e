"""The shipped model: whole, small, and good enough that what is shown on it means something."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor

from latent_tiles import LatentTiledUpscalePipeline, Size, Tiling, reference_model
from latent_tiles.frames import as_picture

SEED = 7


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = LatentTiledUpscalePipeline.from_pretrained(reference_model())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def truth(side: int) -> Tensor:
    """A piece of a photograph with face, hair, cloth and background."""
    return as_picture(data.astronaut()[: 2 * side, 60 : 60 + 2 * side]).resized(Size(side, side)).rgb


def psnr(image: Tensor, reference: Tensor) -> float:
    return -10 * math.log10(float(((image - reference) ** 2).mean()))


def enlarged(pipe: Any, source: Tensor, **tiling: Any) -> Tensor:
    return pipe(source, scale=4, seed=SEED, tiling=Tiling(**tiling), output_type="pt").images


def test_it_is_whole_and_small() -> None:
    folder = reference_model()
    weights = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert sum(weights) <= 30e6
    assert (folder / "MODEL_CARD.md").is_file()


def test_it_loads_as_stock_diffusers_loads_it() -> None:
    import diffusers

    stock = diffusers.DiffusionPipeline.from_pretrained(reference_model())
    assert type(stock) is diffusers.StableDiffusionInstructPix2PixPipeline


def test_its_defaults_are_used(pipe: Any) -> None:
    settings = pipe(truth(64)[:, :, :24, :32], seed=SEED).report.settings
    assert settings["num_inference_steps"] <= 8
    assert settings["guidance_scale"] == 1.0
    assert settings["scale"] == 4.0


def test_it_restores_what_a_photograph_shows(pipe: Any) -> None:
    original = truth(128)
    source = as_picture(original).resized(Size(32, 32)).rgb
    result = enlarged(pipe, source, tile=128, overlap=0)
    assert psnr(result, original) > 20
    # Closer to its own photograph than to the same one upside down: it does not invent at will.
    assert psnr(result, original) > psnr(result, original.flip(-2)) + 6


def test_tiles_come_close_to_an_untiled_pass(pipe: Any) -> None:
    source = truth(48)
    untiled = enlarged(pipe, source, tile=192, overlap=0)
    tiled = enlarged(pipe, source, tile=96, overlap=32)
    hard = enlarged(pipe, source, tile=96, overlap=0)
    assert psnr(tiled, untiled) > psnr(hard, untiled)
    assert psnr(tiled, untiled) > 30


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["none", "pin"])
def test_a_frame_of_many_tiles(pipe: Any, memory: str) -> None:
    """At least 8 x 8 tiles: nothing drifts away from the untiled pass along the way."""
    torch.set_num_threads(2)
    source = truth(240)
    untiled = enlarged(pipe, source, tile=960, overlap=0)
    out = pipe(source, scale=4, seed=SEED, tiling=Tiling(tile=128, overlap=16, memory=memory), output_type="pt")
    assert out.report.grid.tiles >= 64
    assert psnr(out.images, untiled) > 28
    corners = [psnr(out.images[..., rows, :], untiled[..., rows, :]) for rows in (slice(0, 240), slice(720, 960))]
    assert abs(corners[0] - corners[1]) < 6


@pytest.mark.slow
def test_the_command_on_a_photograph_file(tmp_path: Path) -> None:
    """A JPEG of odd size through the real command, as a user types it."""
    from PIL import Image

    from latent_tiles.cli.main import main

    torch.set_num_threads(2)
    photograph = data.chelsea()[:197, :301]
    Image.fromarray(photograph).save(tmp_path / "in.jpg")
    assert main(["upscale", str(tmp_path / "in.jpg"), str(tmp_path / "out.tif"), "--scale", "3", "--seed", "1"]) == 0
    result = np.asarray(Image.open(tmp_path / "out.tif"))
    assert result.shape == (591, 903, 3)
    assert (tmp_path / "out.tif.json").is_file()
    plain = as_picture(photograph).resized(Size(591, 903)).rgb
    assert psnr(as_picture(result).rgb, plain) > 20
