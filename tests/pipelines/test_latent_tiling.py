"""`latent_tiling` around stock pipelines that we have no class of our own for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from latent_tiles import LatentTiledUpscalePipeline, Tiling, VaeOptions, latent_tiling
from latent_tiles.errors import FamilyError, NoiseError, SettingError, TilingError, UnsupportedHostError

STOCK = VaeOptions(mode="stock")
TILES = Tiling(tile=64, overlap=16)


def components(**changes: Any) -> dict[str, Any]:
    return {**tiny.components("StableDiffusionImg2ImgPipeline"), **changes}


def pipeline(name: str = "StableDiffusionPipeline", **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tiny scheduler's age
        pipe = getattr(diffusers, name)(**components(**changes), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inpainting() -> Any:
    return pipeline("StableDiffusionInpaintPipeline", unet=tiny.unet(in_channels=2 * tiny.LATENT_CHANNELS + 1))


def draw(pipe: Any, height: int = 96, width: int = 160, **settings: Any) -> Tensor:
    given: dict[str, Any] = {"prompt": "a b", "num_inference_steps": 3, "output_type": "pt", **settings}
    return pipe(height=height, width=width, **given).images


def test_one_tile_is_bit_equal_to_the_pipeline() -> None:
    pipe = pipeline()
    expected = draw(pipe, 96, 160, generator=torch.Generator().manual_seed(3))
    with latent_tiling(pipe, Tiling(tile=256, overlap=0, noise="host"), vae_options=STOCK) as session:
        found = draw(pipe, 96, 160, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)
    report = session.reports[0]
    assert report.grid is not None
    assert (report.grid.tiles, report.model_calls, report.tiles_run, report.seeds) == (1, 3, 3, None)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (160, 96), (72, 136)])
@pytest.mark.parametrize("memory", ["none", "pin"])
def test_canvases_of_text_are_tiled(height: int, width: int, memory: str) -> None:
    pipe = pipeline()
    with latent_tiling(pipe, Tiling(tile=64, overlap=16, memory=memory)) as session:
        found = draw(pipe, height, width, generator=torch.Generator().manual_seed(3))
    assert found.shape == (1, 3, height, width)
    assert bool(found.isfinite().all())
    report = session.reports[0]
    assert report.grid is not None
    assert report.grid.tiles > 1
    assert report.tiles_run == 3 * report.grid.tiles
    assert [entry.plan.direction for entry in report.vae] == ["decode"]
    json.dumps(report.to_dict())


def test_inpainting_is_tiled() -> None:
    pipe = inpainting()
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (96, 160, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((32, 48), 255, np.uint8), ((40, 24), (70, 42))))
    given = {"image": image, "mask_image": mask, "strength": 1.0}
    with latent_tiling(pipe, TILES, seed=5) as session:
        found = draw(pipe, **given)
    assert found.shape == (1, 3, 96, 160)
    report = session.reports[0]
    assert report.grid is not None
    assert report.grid.tiles == 6
    assert "encode" in [entry.plan.direction for entry in report.vae]


def test_it_is_what_the_upscale_pipeline_does() -> None:
    image = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    host = tiny.host_pipeline("StableDiffusionImg2ImgPipeline")
    same: dict[str, Any] = {"num_inference_steps": 4, "strength": 1.0, "guidance_scale": 3.0, "output_type": "pt"}
    ours = LatentTiledUpscalePipeline.from_pipe(host)
    ours.set_progress_bar_config(disable=True)
    expected = ours(image, prompt="a b", scale=1, tiling=TILES, seed=7, **same).images
    with latent_tiling(host, TILES, seed=7):
        found = host(image=image, prompt="a b", **same).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_pipeline_is_put_back_also_after_an_error(tmp_path: Path) -> None:
    pipe = pipeline()
    kind, before = type(pipe), draw(pipe, generator=torch.Generator().manual_seed(1))
    forward = vars(pipe.unet).get("forward")
    with latent_tiling(pipe, TILES):
        assert isinstance(pipe, kind)
        pipe.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="inside"), latent_tiling(pipe, TILES):
        raise RuntimeError("inside")
    assert type(pipe) is kind
    assert vars(pipe.unet).get("forward") is forward
    assert torch.equal(draw(pipe, generator=torch.Generator().manual_seed(1)), before)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_every_call_is_tiled_also_with_offload() -> None:
    pipe = pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    with latent_tiling(pipe, TILES) as session:
        first = draw(pipe, generator=torch.Generator().manual_seed(2))
        second = draw(pipe, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, second)
    assert [report.tiles_run for report in session.reports] == [18, 18]


def test_seeds_come_from_the_argument_or_the_generator() -> None:
    pipe = pipeline()
    with latent_tiling(pipe, TILES, seed=4) as session:
        first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second)
    assert session.reports[0].seeds == (4,)
    generator = torch.Generator().manual_seed(4)
    with latent_tiling(pipe, TILES) as session:
        third, fourth = draw(pipe, generator=generator), draw(pipe, generator=generator)
    assert not torch.equal(third, fourth)
    assert session.reports[0].seeds != session.reports[1].seeds
    with latent_tiling(pipe, TILES, seed=[1, 2]):
        batch = draw(pipe, num_images_per_prompt=2)
    with latent_tiling(pipe, TILES, seed=2):
        alone = draw(pipe)
    torch.testing.assert_close(batch[1:], alone, rtol=0, atol=1e-5)


def test_callbacks_see_the_whole_canvas() -> None:
    pipe, shapes = pipeline(), list[tuple[int, ...]]()

    def seen(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(tuple(values["latents"].shape))
        return values

    with latent_tiling(pipe, TILES):
        draw(pipe, callback_on_step_end=seen)
    assert shapes == [(1, 4, 12, 20)] * 3


def test_what_cannot_be_tiled_is_refused() -> None:
    pipe = pipeline()
    ours = LatentTiledUpscalePipeline.from_pipe(tiny.host_pipeline("StableDiffusionImg2ImgPipeline"))
    for target, error, message in (
        (ours, UnsupportedHostError, "tiles by itself; pass tiling= to its call"),
        (InPixels(), UnsupportedHostError, "InPixels has no autoencoder; only latent canvases are tiled"),
        (Transformer(), FamilyError, "Conv2d cannot be tiled; supported are UNet2DConditionModel"),
        (object(), UnsupportedHostError, "object has neither a U-Net nor a transformer to tile"),
    ):
        with pytest.raises(error, match=message), latent_tiling(target, TILES):
            pass
    with latent_tiling(pipe, Tiling(tile=68)), pytest.raises(TilingError, match="not a multiple of the 16 px"):
        draw(pipe)
    with pytest.raises(TilingError, match="origin"), latent_tiling(pipe, Tiling(tile=64, overlap=0, origin=(3, 0))):
        pass
    with pytest.raises(NoiseError, match="seed"), latent_tiling(pipe, TILES, seed=-1):
        pass


def test_a_memory_that_needs_the_field_is_refused_without_it() -> None:
    pipe = pipeline()
    with (
        latent_tiling(pipe, Tiling(tile=64, overlap=16, memory="pin", noise="host")),
        pytest.raises(SettingError, match="'pin' needs the shared noise field"),
    ):
        draw(pipe)
    with (
        latent_tiling(pipe, Tiling(tile=64, overlap=16, memory="pin")),
        pytest.raises(SettingError, match="'pin' needs the noise that the run starts from; leave out latents"),
    ):
        draw(pipe, latents=torch.zeros(1, 4, 12, 20))


class InPixels:
    """A pipeline without latents."""

    unet = tiny.unet()


class Transformer:
    """A pipeline with a denoiser that is none of ours."""

    unet = None
    transformer = torch.nn.Conv2d(1, 1, 1)


def test_a_controlnet_guides_every_tile() -> None:
    torch.manual_seed(0)
    unet = tiny.unet()
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3)  # fresh ones are zero
    pipe = pipeline("StableDiffusionControlNetPipeline", unet=unet, controlnet=controlnet.eval())
    control = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    with latent_tiling(pipe, TILES, seed=5) as session:
        guided = draw(pipe, image=control)
        free = draw(pipe, image=control, controlnet_conditioning_scale=0.0)
    assert session.reports[0].tiles_run == 18
    assert bool(guided.isfinite().all())
    change = (guided - free).abs().mean(dim=(0, 1))
    assert float(change.unfold(0, 32, 32).unfold(1, 32, 32).mean(dim=(-1, -2)).min()) > 1e-3
