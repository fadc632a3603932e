"""The pipeline, end to end, on every host, with tiny real components."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from latent_tiles import LatentTiledUpscalePipeline, Tiling, VaeOptions
from latent_tiles.denoiser import TiledDenoiser
from latent_tiles.errors import (
    BudgetError,
    ImageError,
    MemoryStrategyError,
    ModelFolderError,
    NoiseError,
    ParameterisationError,
    SettingError,
    TilingError,
    UnsupportedHostError,
)
from latent_tiles.frames import as_picture
from latent_tiles.noise import NoiseField
from latent_tiles.pipelines.report import Progress

TILED = Tiling(tile=64, overlap=16)
ONE_TILE = Tiling(tile=512, overlap=0)
STEPS = 3

# What differs between hosts: how much they enlarge on their own, and arguments that a plain call needs.
FACTOR = dict.fromkeys(tiny.HOSTS, 1) | {"StableDiffusionUpscalePipeline": 4}
OWN = {
    "StableDiffusionImg2ImgPipeline": {"strength": 0.7},
    "StableDiffusionXLImg2ImgPipeline": {"strength": 0.7},
    "StableDiffusionUpscalePipeline": {"noise_level": 10},
    "StableDiffusionInstructPix2PixPipeline": {"image_guidance_scale": 1.5},
}


def tiled(host: str) -> Any:
    pipe = LatentTiledUpscalePipeline.from_pipe(tiny.host_pipeline(host))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(height: int = 64, width: int = 96, seed: int = 1) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def source_for(host: str) -> Tensor:
    """A source whose result is 128 x 192 px at the host's smallest scale of 1 or 4."""
    factor = FACTOR[host]
    return picture(128 // factor, 192 // factor)


def run(pipe: Any, image: Any, **changes: Any) -> Any:
    host = pipe._host.name
    arguments = {
        "prompt": "a b",
        "scale": FACTOR[host],
        "tiling": TILED,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "pt",
        **OWN[host],
    }
    if "generator" not in changes:
        arguments["seed"] = 5
    return pipe(image, **{**arguments, **changes})


@pytest.fixture(params=tiny.HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(host: str) -> Any:
    return tiled(host)


IP2P = "StableDiffusionInstructPix2PixPipeline"
SD = "StableDiffusionImg2ImgPipeline"
X4 = "StableDiffusionUpscalePipeline"


# ---- equal to the host ----


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["tensor", "PIL"])
def test_one_tile_is_bit_equal_to_the_unhooked_host(host: str, guidance: float, kind: str) -> None:
    stock, image = tiny.host_pipeline(host), source_for(host)
    if kind == "PIL":
        image = as_picture(image).export("pil")[0]
    same = {"prompt": "a b", "num_inference_steps": STEPS, "guidance_scale": guidance, **OWN[host]}
    expected = stock(image=image, generator=torch.Generator().manual_seed(3), output_type="pt", **same).images
    pipe, given = tiled(host), {"scale": FACTOR[host], "tiling": Tiling(tile=512, overlap=0, noise="host"), **same}
    results = {
        mode: pipe(
            image,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
            vae_options=VaeOptions(mode=mode),
            **given,
        )
        for mode in ("stock", "exact")
    }
    assert results["stock"].report.grid.tiles == 1
    assert torch.equal(results["stock"].images, expected)
    # By windows, sums are taken in another order.
    assert float((results["exact"].images - expected).abs().max()) < 1e-4
    assert results["stock"].report.vae == ()
    directions = [entry.plan.direction for entry in results["exact"].report.vae]
    assert directions == (["decode"] if host == "StableDiffusionUpscalePipeline" else ["encode", "decode"])


def test_a_budget_that_cannot_be_met_is_refused_before_any_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiled("StableDiffusionImg2ImgPipeline")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr(pipe, "encode_prompt", never)
    with pytest.raises(BudgetError, match=r"give device_budget_mib >= \d+"):
        pipe(source_for("StableDiffusionImg2ImgPipeline"), scale=1, vae_options=VaeOptions(device_budget_mib=0.01))


def test_one_tile_with_field_noise_does_not_depend_on_the_hooks_window_or_batch(pipe: Any) -> None:
    image = source_for(pipe._host.name)
    first = run(pipe, image, tiling=ONE_TILE).images
    other = run(pipe, image, tiling=Tiling(tile=256, overlap=64, window="linear", tile_batch=4)).images
    assert torch.equal(first, other)


def test_two_calls_in_a_row_are_equal_for_one_seed_and_differ_for_another(pipe: Any) -> None:
    image = source_for(pipe._host.name)
    first, again, other = run(pipe, image).images, run(pipe, image).images, run(pipe, image, seed=6).images
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_torch_seed_fixes_the_result_where_no_seed_is_given(host: str) -> None:
    pipe, image = tiled(host), source_for(host)
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(run(pipe, image, seed=None))
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(run(pipe, image, seed=results[0].report.seeds[0]).images, results[0].images)


def test_a_generator_goes_on_from_call_to_call() -> None:
    pipe, image = tiled(IP2P), source_for(IP2P)
    generator = torch.Generator().manual_seed(2)
    first, second = (run(pipe, image, generator=generator).images for _ in range(2))
    repeated = run(pipe, image, generator=torch.Generator().manual_seed(2)).images
    assert torch.equal(first, repeated)
    assert not torch.equal(first, second)


# ---- no trace ----


def state(pipe: Any) -> dict[str, dict[str, Any]]:
    """Instance attributes of everything that a call patches."""
    parts = {"pipe": pipe, "unet": pipe.unet, "vae": pipe.vae, "scheduler": pipe.scheduler}
    if hasattr(pipe, "low_res_scheduler"):
        parts["low_res_scheduler"] = pipe.low_res_scheduler
    return {
        name: {key: id(value) for key, value in vars(part).items() if callable(value)} for name, part in parts.items()
    }


def test_the_hook_leaves_no_trace(pipe: Any) -> None:
    before, module_before = state(pipe), dict(vars(pipe.unet))
    run(pipe, source_for(pipe._host.name))
    assert state(pipe) == before
    assert vars(pipe.unet).keys() == module_before.keys()
    assert "forward" not in vars(pipe.unet)


def test_an_exception_inside_leaves_the_pipeline_clean(pipe: Any) -> None:
    image = source_for(pipe._host.name)
    expected, before = run(pipe, image).images, state(pipe)

    def stop(progress: Progress) -> None:
        if progress.tiles > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, image, progress=stop)
    assert state(pipe) == before
    assert torch.equal(run(pipe, image).images, expected)


def test_the_host_made_from_ours_is_stock_again(host: str) -> None:
    stock = tiny.host_pipeline(host)
    ours = LatentTiledUpscalePipeline.from_pipe(stock)
    run(ours, source_for(host))
    image = source_for(host)
    same = {"image": image, "prompt": "a", "num_inference_steps": STEPS, "output_type": "pt", **OWN[host]}
    back = getattr(diffusers, host).from_pipe(ours)
    back.set_progress_bar_config(disable=True)
    assert not isinstance(back, LatentTiledUpscalePipeline)
    expected = stock(generator=torch.Generator().manual_seed(0), **same).images
    assert torch.equal(back(generator=torch.Generator().manual_seed(0), **same).images, expected)


# ---- tiles do not change what they should not ----


@pytest.mark.parametrize("memory", ["none", "pin"])
def test_results_do_not_depend_on_the_tile_batch(pipe: Any, memory: str) -> None:
    image = source_for(pipe._host.name)
    results = [
        run(pipe, image, tiling=Tiling(tile=64, overlap=16, memory=memory, tile_batch=batch)).images
        for batch in (1, 3, 64)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-4)


def test_a_batch_of_images_equals_one_by_one(pipe: Any) -> None:
    host = pipe._host.name
    images = torch.cat([source_for(host), source_for(host).flip(-1)])
    negative = {"negative_prompt": "c"}
    both = run(pipe, images, seed=[5, 9], **negative).images
    for index, seed in enumerate((5, 9)):
        alone = run(pipe, images[index : index + 1], seed=seed, **negative).images
        torch.testing.assert_close(both[index : index + 1], alone, rtol=0, atol=2e-4)


def test_several_results_per_prompt(pipe: Any) -> None:
    out = run(pipe, source_for(pipe._host.name), num_images_per_prompt=2, seed=[5, 9]).images
    assert out.shape[0] == 2
    # The x4 host noises its low-resolution image once for all results, so only the first equals a call of its own.
    for index, seed in enumerate((5,) if FACTOR[pipe._host.name] == 4 else (5, 9)):
        alone = run(pipe, source_for(pipe._host.name), seed=seed).images
        torch.testing.assert_close(out[index : index + 1], alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", [SD, IP2P])
def test_several_images_with_several_results_each(name: str) -> None:
    pipe, images = tiled(name), torch.cat([source_for(name), source_for(name).flip(-1)])
    out = run(pipe, images, prompt=["a", "b"], num_images_per_prompt=2, seed=[1, 2, 3, 4]).images
    for index in range(4):
        image, prompt = images[index // 2 : index // 2 + 1], "ab"[index // 2]
        alone = run(pipe, image, prompt=prompt, seed=index + 1).images
        torch.testing.assert_close(out[index : index + 1], alone, rtol=0, atol=2e-4)


def test_one_seed_gives_the_results_of_a_batch_different_noise() -> None:
    out = run(tiled(SD), source_for(SD), num_images_per_prompt=2).images
    assert not torch.allclose(out[0], out[1], atol=1e-2)


class Pointwise(nn.Module):
    """A denoiser that works position by position, non-linear, in the place of a U-Net."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (unet.config.out_channels, unet.config.in_channels, 1, 1)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
        self.text = nn.Parameter(torch.randn(1, generator=generator))

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        mixed = nn.functional.conv2d(sample, self.weight)
        return torch.tanh(mixed + self.text * encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1))


def make_pointwise(pipe: Any) -> Any:
    """Give the pipeline's U-Net a pointwise body, with its class, configuration and argument handling kept."""
    body = Pointwise(pipe.unet)

    class PointwiseUNet(type(pipe.unet)):
        def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **rest: Any) -> Any:
            assert rest["return_dict"] is False
            return (body(sample, encoder_hidden_states),)

    PointwiseUNet.forward.__signature__ = inspect.signature(type(pipe.unet).forward)
    pipe.unet.__class__ = PointwiseUNet
    return pipe


def test_a_crop_with_the_frames_noise_equals_the_crop_of_the_frame(host: str) -> None:
    """No context crosses a pointwise denoiser, and the encoder's reach is known; latents, to leave the decoder out."""
    pipe = make_pointwise(tiled(host))
    reach = 0
    if FACTOR[host] == 1:
        pipe.register_modules(vae=tiny.convolutional_vae())
        reach = 10  # latents: one 3 x 3 block and a convolution at each of four levels
    factor = FACTOR[host]
    image = picture(384 // factor, 416 // factor)
    settings = {"output_type": "latent", "num_inference_steps": 4, "eta": 1.0}
    whole = run(pipe, image, **settings).images
    top, left, side = 64, 128, 256
    part = image[..., top // factor : (top + side) // factor, left // factor : (left + side) // factor]
    crop = run(pipe, part, tiling=Tiling(tile=64, overlap=16, origin=(top, left)), **settings).images
    elsewhere = run(pipe, part, **settings).images
    latents = crop.shape[-1]
    inner = slice(reach, latents - reach)
    same = whole[..., top * latents // side :, left * latents // side :][..., inner, inner]
    torch.testing.assert_close(crop[..., inner, inner], same, rtol=0, atol=2e-5)
    assert not torch.allclose(elsewhere[..., inner, inner], same, atol=1e-2)


def schedulers() -> dict[str, Any]:
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    d = diffusers
    return {
        "DDIM": d.DDIMScheduler(**base, clip_sample=False),
        "Euler": d.EulerDiscreteScheduler(**base),
        "Euler ancestral": d.EulerAncestralDiscreteScheduler(**base),
        "Heun": d.HeunDiscreteScheduler(**base),
        "DPM++ 2M": d.DPMSolverMultistepScheduler(**base),
        "DPM++ SDE": d.DPMSolverMultistepScheduler(**base, algorithm_type="sde-dpmsolver++"),
        "UniPC": d.UniPCMultistepScheduler(**base),
        "LCM": d.LCMScheduler(**base),
        "PNDM": d.PNDMScheduler(**base, skip_prk_steps=True),
    }


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("name", schedulers())
def test_a_pointwise_denoiser_tiled_equals_untiled(name: str, guidance: float) -> None:
    pipe = make_pointwise(tiled(SD))
    pipe.scheduler = schedulers()[name]
    settings = {"num_inference_steps": 6, "guidance_scale": guidance, "output_type": "latent"}
    untiled = run(pipe, source_for(SD), tiling=ONE_TILE, **settings)
    many = run(pipe, source_for(SD), **settings)
    assert many.report.grid.tiles > 4
    assert untiled.report.grid.tiles == 1
    scale = untiled.images.abs().max()
    torch.testing.assert_close(many.images / scale, untiled.images / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_weighted_branches_are_what_the_host_hands_to_its_sampler(pipe: Any, guidance: float) -> None:
    predictions: list[tuple[Tensor, tuple[float, ...]]] = []
    predict, step = TiledDenoiser.predict, pipe.scheduler.step
    distances: list[float] = []

    def recording(self: TiledDenoiser, call: Any) -> Any:
        answer = predict(self, call)
        predictions.append((answer[0].clone(), self.branches()))
        return answer

    @functools.wraps(step)
    def comparing(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        prediction, weights = predictions[-1]
        branches = prediction.chunk(len(weights))
        guided = sum(weight * branch for weight, branch in zip(weights, branches, strict=True))
        distances.append(float((guided - model_output).abs().max()))
        return step(model_output, *args, **kwargs)

    pipe.scheduler.step = comparing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiledDenoiser, "predict", recording)
        run(pipe, source_for(pipe._host.name), guidance_scale=guidance)
    assert len(predictions[-1][1]) == (1 if guidance == 1 else 3 if "Pix2Pix" in pipe._host.name else 2)
    assert max(distances) < 1e-5


def test_the_noise_of_a_step_is_keyed_by_the_step(pipe: Any) -> None:
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    drawn: list[int] = []
    sample = NoiseField.sample

    def recording(self: NoiseField, purpose: Any, *, step: int = 0, **rest: Any) -> Tensor:
        if purpose == "step":
            drawn.append(step)
        return sample(self, purpose, step=step, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseField, "sample", recording)
        calls = run(pipe, source_for(pipe._host.name)).report.model_calls
    assert drawn == list(range(calls))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_lambda_zero_of_pin_is_bit_equal_to_none(pipe: Any, guidance: float) -> None:
    image = source_for(pipe._host.name)
    none = run(pipe, image, guidance_scale=guidance).images
    off = run(pipe, image, guidance_scale=guidance, tiling=Tiling(tile=64, overlap=16, memory="pin:lambda=0")).images
    on = run(pipe, image, guidance_scale=guidance, tiling=Tiling(tile=64, overlap=16, memory="pin")).images
    assert torch.equal(off, none)
    assert not torch.equal(on, none)


# ---- freedoms of the host ----


def test_callbacks_see_the_whole_latent_and_can_change_it() -> None:
    pipe, seen = tiled(SD), []

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tuple(kwargs["latents"].shape)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 1 else kwargs

    changed = run(pipe, source_for(SD), callback_on_step_end=on_step, output_type="latent").images
    assert seen == [(0, (1, 4, 16, 24)), (1, (1, 4, 16, 24))]
    assert torch.equal(changed, torch.zeros_like(changed))


def test_the_old_callback_of_the_x4_host() -> None:
    seen: list[int] = []
    run(tiled(X4), source_for(X4), callback=lambda step, timestep, latents: seen.append(step))
    assert seen == [0, 1, 2]


def test_progress_tells_steps_and_tiles(pipe: Any) -> None:
    seen: list[Progress] = []
    out = run(pipe, source_for(pipe._host.name), progress=seen.append)
    assert seen[-1].tiles == seen[-1].tiles_total == out.report.tiles_run
    assert seen[-1].steps == out.report.model_calls
    assert [entry.tiles for entry in seen] == sorted(entry.tiles for entry in seen)


def test_model_cpu_offload_keeps_tiling_on_the_second_call(pipe: Any) -> None:
    """Real offload hooks, between the CPU and itself; at the end of a call they set every `forward` back."""
    image = source_for(pipe._host.name)
    expected = run(pipe, image)
    pipe.enable_model_cpu_offload(device="cpu")
    onloaded: list[int] = []
    pre_forward = type(pipe._all_hooks[0].hook).pre_forward
    for _ in range(2):
        hook = pipe.unet._hf_hook
        hook.pre_forward = lambda module, *args, hook=hook, **kwargs: (
            onloaded.append(1) or pre_forward(hook, module, *args, **kwargs)
        )
        onloaded.clear()
        out = run(pipe, image)
        assert torch.equal(out.images, expected.images)
        assert out.report.tiles_run == expected.report.tiles_run == len(onloaded)
    # What is installed now is accelerate's, not ours.
    assert "tiled_model" not in vars(pipe.unet)["forward"].__module__


def test_layerwise_casting_and_compiled_models() -> None:
    plain, cast, compiled = tiled(SD), tiled(SD), tiled(SD)
    image = source_for(SD)
    expected = run(plain, image).images
    cast.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert float((run(cast, image).images - expected).abs().max()) < 0.05
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    forward = vars(compiled.unet)["forward"]
    assert torch.equal(run(compiled, image).images, expected)
    assert vars(compiled.unet)["forward"] is forward


@pytest.mark.gpu
def test_model_cpu_offload_on_a_gpu(pipe: Any) -> None:
    image = source_for(pipe._host.name)
    pipe.enable_model_cpu_offload()
    first, second = run(pipe, image), run(pipe, image)
    assert torch.equal(first.images, second.images)
    assert first.report.grid.tiles == second.report.grid.tiles > 1
    assert pipe.unet.device.type == "cpu"


def test_lora_scale_acts_on_every_tile() -> None:
    from peft import LoraConfig

    pipe = tiled(SD)
    torch.manual_seed(4)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    image = source_for(SD)

    def at(scale: float, tiling: Tiling) -> Tensor:
        return run(pipe, image, cross_attention_kwargs={"scale": scale}, tiling=tiling).images

    off, half, full = (at(scale, TILED) for scale in (0.0, 0.5, 1.0))
    assert not torch.equal(half, full)
    assert not torch.equal(half, off)
    stock_half = at(0.5, ONE_TILE)
    assert not torch.equal(stock_half, at(1.0, ONE_TILE))
    pipe.unet.disable_adapters()
    assert torch.equal(run(pipe, image).images, off)


def ip_adapted(pipe: Any) -> Any:
    """Give a pipeline a tiny IP-Adapter with random weights."""
    unet = pipe.unet
    dimension, width = 16, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    layers: dict[str, Tensor] = {}
    key = 1
    for name, processor in unet.attn_processors.items():
        del processor
        if name.endswith("attn1.processor"):
            continue
        block = unet.get_submodule(name.removesuffix(".processor"))
        out = block.to_k.out_features
        layers[f"{key}.to_k_ip.weight"], layers[f"{key}.to_v_ip.weight"] = random(out, width), random(out, width)
        key += 2
    projection = {
        "proj.weight": random(4 * width, dimension),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    pipe.set_ip_adapter_scale(3.0)
    return pipe


def test_ip_adapter_masks_follow_the_tiles() -> None:
    """With a pointwise spread of queries the mask alone decides where the adapter acts."""
    pipe, image = ip_adapted(tiled(SD)), source_for(SD)
    embeds = [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(9))]
    left = torch.zeros(1, 1, 128, 192)
    left[..., :96] = 1

    def masked(mask: Tensor, tiling: Tiling = TILED) -> Tensor:
        return run(
            pipe,
            image,
            ip_adapter_image_embeds=embeds,
            cross_attention_kwargs={"ip_adapter_masks": [mask]},
            tiling=tiling,
            output_type="latent",
            num_inference_steps=2,
        ).images

    none, all_over, half = masked(torch.zeros_like(left)), masked(torch.ones_like(left)), masked(left)
    effect = (all_over - none).abs().mean(dim=1)[0]
    assert float(effect.mean()) > 1e-3
    # Tiles wholly left of the border are as with the full mask, tiles wholly right of it as with none.
    torch.testing.assert_close(half[..., :3], all_over[..., :3], rtol=0, atol=1e-4)
    torch.testing.assert_close(half[..., -3:], none[..., -3:], rtol=0, atol=1e-4)
    # A mask drawn at half the size means the same; batches of tiles with different masks too.
    torch.testing.assert_close(masked(left[..., ::2, ::2])[..., :3], half[..., :3], rtol=0, atol=1e-4)
    batched = masked(left, Tiling(tile=64, overlap=16, tile_batch=5))
    torch.testing.assert_close(batched, half, rtol=0, atol=2e-4)


def test_tiles_of_sdxl_are_shown_the_tiles_size_unless_told_otherwise() -> None:
    pipe, seen = tiled("StableDiffusionXLImg2ImgPipeline"), []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"][-1].tolist()), with_kwargs=True
    )
    run(pipe, source_for(pipe._host.name))
    assert seen[0] == [64, 64, 0, 0, 64, 64]
    run(pipe, source_for(pipe._host.name), original_size=(500, 400))
    assert seen[-1] == [500, 400, 0, 0, 64, 64]
    run(pipe, source_for(pipe._host.name), tiling=ONE_TILE)
    assert seen[-1] == [128, 192, 0, 0, 128, 192]


# ---- images in, images out ----


@pytest.mark.parametrize("size", [(5, 3), (64, 64), (97, 61), (65, 64), (100, 150)])
def test_any_size_comes_back_at_its_scale(pipe: Any, size: tuple[int, int]) -> None:
    out = run(pipe, picture(*size), scale=1.5 if FACTOR[pipe._host.name] == 1 else 4, num_inference_steps=2)
    scale = out.report.settings["scale"]
    assert tuple(out.images.shape[-2:]) == (round(size[0] * scale), round(size[1] * scale)) == out.report.output_size
    assert out.images.isfinite().all()


@pytest.mark.parametrize(("scale", "working"), [(2, (64, 96)), (4, (64, 96)), (6, (96, 144))])
def test_the_x4_host_makes_other_scales_too(scale: float, working: tuple[int, int]) -> None:
    """Below 4 its result is reduced, above 4 its source is enlarged first."""
    out = run(tiled(X4), picture(16, 24), scale=scale, num_inference_steps=2)
    assert tuple(out.images.shape[-2:]) == (16 * scale, 24 * scale)
    assert out.report.grid.content == working
    assert out.report.grid.frame == tuple(-(-side // 16) * 16 for side in working)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_grey_and_alpha_come_back_as_they_went_in(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 4), dtype=np.uint8), "RGBA").convert(
        mode
    )
    out = run(tiled(SD), image, scale=2, output_type="pil", num_inference_steps=2).images[0]
    assert out.size == (96, 64)
    assert out.mode == {"P": "RGB", "1": "L"}.get(mode, mode)


def test_alpha_is_enlarged_apart_and_does_not_touch_the_colour() -> None:
    pipe, image = tiled(SD), picture(32, 48)
    alpha = torch.zeros(1, 1, 32, 48)
    alpha[..., 24:] = 1
    out = run(pipe, torch.cat([image, alpha], dim=1), scale=2, num_inference_steps=2).images
    assert torch.equal(out[:, :3], run(pipe, image, scale=2, num_inference_steps=2).images)
    assert float(out[:, 3, :, :44].max()) == 0
    assert float(out[:, 3, :, -44:].min()) > 1 - 1e-6


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types_show_one_result(output_type: str) -> None:
    pipe, image = tiled(SD), source_for(SD)
    out, tensor = run(pipe, image, output_type=output_type).images, run(pipe, image).images
    if output_type == "pil":
        expected = (tensor[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        assert np.array_equal(np.asarray(out[0]), expected)
    elif output_type == "np":
        assert np.array_equal(out, tensor.permute(0, 2, 3, 1).numpy())
    elif output_type == "latent":
        assert tuple(out.shape) == (1, 4, 16, 24)


def test_a_path_an_array_and_an_image_give_one_result(tmp_path: Any) -> None:
    pipe = tiled(SD)
    array = np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "in.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]
    results = [
        run(pipe, image, num_inference_steps=2).images
        for image in (array, Image.fromarray(array), tmp_path / "in.png", str(tmp_path / "in.png"), tensor, [array])
    ]
    for other in results[1:]:
        # Tensors and arrays have other strides, and convolutions then round differently.
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


def test_dict_and_tuple() -> None:
    out = run(tiled(SD), source_for(SD))
    images, report = run(tiled(SD), source_for(SD), return_dict=False)
    assert torch.equal(images, out.images)
    assert report.grid == out.report.grid
    assert out["images"] is out.images
    assert out.nsfw_content_detected is None


@pytest.mark.parametrize("memory", ["none", "pin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_close(dtype: torch.dtype, memory: str) -> None:
    image, tiling = source_for(SD), Tiling(tile=64, overlap=16, memory=memory)
    exact = run(tiled(SD), image, tiling=tiling).images
    out = run(tiled(SD).to(dtype), image, tiling=tiling).images
    assert out.dtype == torch.float32
    # Another memory, overlap or prompt differs by 0.02 and more.
    assert float((out - exact).abs().mean()) < (0.005 if dtype == torch.bfloat16 else 0.001)


# ---- report ----


def test_the_report_says_what_was_done(pipe: Any) -> None:
    import json

    report = run(pipe, source_for(pipe._host.name)).report
    assert report.host == pipe._host.name
    assert report.grid.tiles == len(report.grid.rows) * len(report.grid.columns)
    assert report.tiles_run == report.grid.tiles * report.model_calls
    assert report.seeds == (5,)
    assert report.settings["guidance_scale"] == 4.0
    assert report.settings["memory"] == "none"
    seconds = report.seconds
    assert seconds["denoise"] > 0
    assert seconds["decode"] > 0
    assert seconds["total"] >= seconds["encode"] + seconds["denoise"] + seconds["decode"]
    assert json.loads(json.dumps(report.to_dict()))["grid"]["tiles"] == report.grid.tiles


# ---- loading ----


def test_load_save_and_load_again(host: str, tmp_path: Any) -> None:
    tiny.host_pipeline(host).save_pretrained(tmp_path / "stock")
    pipe = LatentTiledUpscalePipeline.from_pretrained(tmp_path / "stock")
    assert isinstance(pipe, LatentTiledUpscalePipeline)
    assert isinstance(pipe, getattr(diffusers, host))
    assert type(pipe).__name__ == host
    pipe.set_progress_bar_config(disable=True)
    expected = run(pipe, source_for(host)).images
    pipe.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "latent_tiles.json").exists()
    stock = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(stock) is getattr(diffusers, host)
    again = LatentTiledUpscalePipeline.from_pretrained(str(tmp_path / "ours"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, source_for(host)).images, expected)


def test_a_text_to_image_folder_loads_as_image_to_image(tmp_path: Any) -> None:
    stock = diffusers.StableDiffusionPipeline.from_pipe(tiny.host_pipeline(SD))
    stock.save_pretrained(tmp_path)
    assert type(LatentTiledUpscalePipeline.from_pretrained(tmp_path)).__name__ == SD


def test_from_pipe_leaves_every_models_dtype_alone() -> None:
    """The models are the caller's too; a VAE in float32 beside half-precision models is common."""
    stock = tiny.host_pipeline("StableDiffusionXLImg2ImgPipeline").to(torch.bfloat16)
    stock.vae.to(torch.float32)
    ours = LatentTiledUpscalePipeline.from_pipe(stock)
    for pipe in (stock, ours):
        assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert LatentTiledUpscalePipeline.from_pipe(stock, dtype=torch.float32).unet.dtype == torch.float32
    assert ours.to(torch.float64).vae.dtype == torch.float64


def test_pickled_and_copied_pipelines_work(pipe: Any) -> None:
    # Before the first call: transformers then hangs hooks on text encoders that cannot be pickled.
    copies = pickle.loads(pickle.dumps(pipe)), deepcopy(pipe)
    image = source_for(pipe._host.name)
    expected = run(pipe, image).images
    for copy in copies:
        assert type(copy) is type(pipe)
        assert torch.equal(run(copy, image).images, expected)


def test_auto_pipeline_takes_ours() -> None:
    from diffusers import AutoPipelineForImage2Image

    assert type(AutoPipelineForImage2Image.from_pipe(tiled(SD))).__name__ == SD


def test_the_signature_is_ours_and_the_hosts(pipe: Any) -> None:
    names = list(inspect.signature(pipe.__call__).parameters)
    assert names[:3] == ["image", "prompt", "scale"]
    hosts = inspect.signature(getattr(diffusers, pipe._host.name).__call__).parameters
    assert set(hosts) - {"self", "kwargs"} <= set(names)
    assert "kwargs" not in names


# ---- bad input ----


def refused(error: type[Exception], match: str, image: Any = None, **changes: Any) -> None:
    pipe = tiled(SD)
    called: list[str] = []
    for model in (pipe.unet, pipe.text_encoder, pipe.vae.encoder):
        model.register_forward_pre_hook(lambda module, _: called.append(type(module).__name__))
    with pytest.raises(error, match=match):
        run(pipe, source_for(SD) if image is None else image, **changes)
    assert not called, "bad input must be found before the model runs"


def test_bad_tilings() -> None:
    with pytest.raises(TilingError, match="overlap 64 px is not below the tile's height 64 px"):
        Tiling(tile=64, overlap=64)
    # The tiny U-Net halves once, the VAE three times: tiles are multiples of 16 px.
    refused(TilingError, "below this model's minimum of 16 px", tiling=Tiling(tile=8, overlap=0))
    refused(TilingError, "not a multiple of the 16 px.*use 64 or 80", tiling=Tiling(tile=70, overlap=8))
    refused(TilingError, "leaves no room.*use at most 48 px", tiling=Tiling(tile=64, overlap=60))
    refused(TilingError, "origin .* is not a multiple of 8 px", tiling=Tiling(tile=64, overlap=0, origin=(4, 0)))
    refused(MemoryStrategyError, "unknown memory 'elephant'; use one of none, pin", tiling=Tiling(memory="elephant"))
    with pytest.raises(TilingError, match="unknown window 'round'; use one of cosine, linear, gaussian, uniform"):
        Tiling(window="round")


def test_bad_images() -> None:
    refused(ImageError, "3 NaN or infinite", image=torch.tensor([[[0.1, float("nan"), 0.2]] * 1] * 3).unsqueeze(0))
    refused(ImageError, "empty", image=np.zeros((0, 4, 3), dtype=np.uint8))
    refused(ImageError, "expected 0 to 1", image=torch.full((1, 3, 8, 8), 7.0))
    with pytest.raises(ImageError, match="image is missing"):
        tiled(SD)(prompt="a")


@pytest.mark.parametrize("scale", [0, -1, 0.5, float("nan"), float("inf")])
def test_bad_scales(scale: float) -> None:
    refused(SettingError, "scale must be a finite number of at least 1", scale=scale)


def test_bad_settings() -> None:
    refused(SettingError, "takes no argument 'image_guidance_scale'; it takes", image_guidance_scale=2.0)
    refused(SettingError, "unknown output_type 'tiff'", output_type="tiff")
    refused(SettingError, "either seed or generator", seed=1, generator=torch.Generator())
    refused(SettingError, "3 seeds for 1 results", seed=[1, 2, 3])
    refused(SettingError, "2 entries in prompt for 1 images", prompt=["a", "b"])
    refused(SettingError, "strength must be above 0 and at most 1, got -1", strength=-1)
    refused(SettingError, "strength must be above 0 and at most 1, got 1.5", strength=1.5)
    refused(SettingError, "leaves no step to run; use at least 10 steps", strength=0.1, num_inference_steps=9)
    refused(SettingError, "num_inference_steps must be at least 1, got 0", num_inference_steps=0)
    refused(NoiseError, "seed -1 is out of range", seed=-1)
    refused(NoiseError, "seed -1 is out of range", seed=-1, tiling=Tiling(tile=64, overlap=16, noise="host"))
    refused(SettingError, "2 generators for 1 results", generator=[torch.Generator()] * 2)
    refused(SettingError, "prompt_embeds has 2 rows for 1 images", prompt=None, prompt_embeds=torch.zeros(2, 16, 32))
    refused(SettingError, "num_images_per_prompt must be at least 1, got 0", num_images_per_prompt=0)
    refused(SettingError, "takes no argument 'foo'", foo=1)
    zeros = Tiling(tile=64, overlap=16, window=lambda length, before, after: torch.zeros(length))
    refused(TilingError, "not above zero and finite", tiling=zeros)
    pipe = tiled(X4)
    with pytest.raises(SettingError, match="mixes up several images"):
        run(pipe, torch.cat([source_for(X4)] * 2), num_images_per_prompt=2)


def test_pin_refuses_a_host_that_draws_its_own_noise() -> None:
    host_noise = Tiling(tile=64, overlap=16, memory="pin", noise="host")
    refused(MemoryStrategyError, "memory 'pin' needs the shared noise field; use noise='field'", tiling=host_noise)


def test_pin_refuses_a_start_that_is_not_the_fields() -> None:
    pin = Tiling(tile=64, overlap=16, memory="pin")
    with pytest.raises(MemoryStrategyError, match="which latents replaces; leave one out"):
        run(tiled(IP2P), source_for(IP2P), tiling=pin, latents=torch.zeros(1, 4, 16, 24))
    xl = "StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(MemoryStrategyError, match="which denoising_start replaces"):
        run(tiled(xl), source_for(xl), tiling=pin, denoising_start=0.5)


def test_pin_refuses_schedulers_without_known_levels() -> None:
    pipe = tiled(SD)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ParameterisationError, match="EDMEulerScheduler scales inputs by the data's deviation"):
        run(pipe, source_for(SD), tiling=Tiling(tile=64, overlap=16, memory="pin"))


def test_sdxl_goes_by_denoising_start_instead_of_strength() -> None:
    xl = "StableDiffusionXLImg2ImgPipeline"
    out = run(tiled(xl), source_for(xl), denoising_start=0.5, num_inference_steps=4, strength=0.1)
    assert out.report.model_calls == 2


def test_second_prompts_go_with_the_images() -> None:
    xl = "StableDiffusionXLImg2ImgPipeline"
    images = torch.cat([source_for(xl)] * 2)
    out = run(tiled(xl), images, prompt_2="b", negative_prompt="c", negative_prompt_2="d").images
    assert out.shape[0] == 2


NUMBERS = """
import json
import numpy as np, pytest, tiny, torch
from latent_tiles import LatentTiledUpscalePipeline, Tiling
from latent_tiles.errors import NoiseError, SettingError, TilingError

tiling = Tiling(tile=np.int64(64), overlap=[np.int32(16), 16], tile_batch=np.int8(2))
assert (tiling.tile, tiling.overlap, tiling.tile_batch) == (64, (16, 16), 2)
for bad in (64.0, "64", (64,), (64, 64, 64)):
    with pytest.raises(TilingError, match="tile must be a whole number, or a pair"):
        Tiling(tile=bad)
with pytest.raises(TilingError, match="tile_batch must be a whole number; got 1.5"):
    Tiling(tile_batch=1.5)
with pytest.raises(TilingError, match="tile_batch must be a whole number; got None"):
    Tiling(tile_batch=None)
with pytest.raises(TilingError, match="origin must be a pair .height, width. of whole numbers; got 5"):
    Tiling(origin=5)
pipe = LatentTiledUpscalePipeline.from_pipe(tiny.host_pipeline("StableDiffusionImg2ImgPipeline"))
image = torch.rand(1, 3, 64, 64)
call = dict(num_inference_steps=2, strength=0.7, tiling=tiling)
out = pipe(image, scale=np.float32(1.5), seed=np.int64(5), **call)
assert json.dumps(out.report.to_dict())
assert out.report.seeds == (5,)
with pytest.raises(SettingError, match="scale must be a number, got 'large'"):
    pipe(image, scale="large", **call)
with pytest.raises(NoiseError, match="a seed must be a whole number, got 1.5"):
    pipe(image, scale=1, seed=1.5, **call)
"""


def test_numbers_of_other_kinds_are_taken_or_refused_clearly() -> None:
    """As a user's process runs it: the checker of the suite would stop these at the door."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", NUMBERS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_watermarker_that_is_passed_over_is_named(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiled(X4)
    run(pipe, source_for(X4), num_inference_steps=1)
    assert "watermarker" not in caplog.text
    pipe.watermarker = object()
    run(pipe, source_for(X4), num_inference_steps=1)
    assert "watermarker is not applied" in caplog.text


def test_the_x4_hosts_own_draw_leaves_torchs_generator_alone() -> None:
    pipe = tiled(X4)
    torch.manual_seed(1)
    run(pipe, source_for(X4))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


def test_the_x4_host_is_not_distorted_at_sizes_it_would_cut() -> None:
    """It cuts its small image to multiples of 4; ours is padded to them before, so the U-Net sees all of it."""
    pipe, seen = tiled(X4), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    for size in ((1, 1), (1, 9), (18, 22)):
        out = run(pipe, picture(*size), num_inference_steps=1, tiling=Tiling(tile=512, overlap=0))
        assert tuple(out.images.shape[-2:]) == (4 * size[0], 4 * size[1])
        assert out.report.grid.frame == tuple(4 * -(-side // 4) * 4 for side in size)
        assert seen[-1] == tuple(side // 4 for side in out.report.grid.frame)


def test_brownian_schedulers_are_refused_with_field_noise() -> None:
    pipe = tiled(SD)
    pipe.scheduler = diffusers.DPMSolverSDEScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(NoiseError, match=r"Brownian tree.*noise='host'"):
        run(pipe, source_for(SD))
    out = run(pipe, source_for(SD), tiling=Tiling(tile=64, overlap=16, noise="host"))
    assert out.images.isfinite().all()


def test_unsupported_hosts_are_named_with_the_supported_ones(tmp_path: Any) -> None:
    class Other(DiffusionPipeline):
        pass

    with pytest.raises(UnsupportedHostError, match=r"Other is not supported; supported are .*StableDiffusionUpscale"):
        LatentTiledUpscalePipeline.from_pipe(Other())
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(UnsupportedHostError, match="KandinskyPipeline is not supported"):
        LatentTiledUpscalePipeline.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedHostError, match="no model of its own"):
        LatentTiledUpscalePipeline()


def test_missing_folders(tmp_path: Any) -> None:
    with pytest.raises(ModelFolderError, match="does not exist"):
        LatentTiledUpscalePipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"has no model_index\.json"):
        LatentTiledUpscalePipeline.from_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match="somebody/nothing is neither a folder nor a model that the hub gave"):
        LatentTiledUpscalePipeline.from_pretrained("somebody/nothing")
