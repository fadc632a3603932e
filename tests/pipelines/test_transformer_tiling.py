"""`latent_tiling` around stock text-to-image pipelines of the transformer families, with tiny real components."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from latent_tiles import Tiling, VaeOptions, latent_tiling
from latent_tiles.errors import FamilyError, MemoryStrategyError, SettingError
from latent_tiles.families import family_of, supported
from latent_tiles.geometry import Box

STOCK = VaeOptions(mode="stock")
TOKENS, TEXT = 6, 16
STEPS = 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sd3(**scheduler: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=16, pooled_projection_dim=TEXT,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    vae = tiny.vae()
    vae.register_to_config(shift_factor=0.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae,
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )


def sana(**changes: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=16,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT,
        patch_size=1, **changes,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate",
        downsample_block_type="stride_conv", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(), scheduler=scheduler
    )


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=TEXT,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, norm_num_groups=4,
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=tiny.vae(), transformer=transformer.eval(), scheduler=scheduler
    )


MAKERS = {"sd3": sd3, "sana": sana, "pixart": pixart}


def pipeline(family: str, **settings: Any) -> Any:
    pipe = MAKERS[family](**settings)
    # Fresh output layers are zero in these models: without this every prediction would be a constant.
    for parameter in pipe.transformer.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * randn(*parameter.shape, seed=parameter.numel()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(family: str) -> dict[str, Any]:
    given: dict[str, Any] = {
        "prompt_embeds": randn(1, TOKENS, TEXT),
        "negative_prompt_embeds": randn(1, TOKENS, TEXT, seed=1),
    }
    if family == "sd3":
        given |= {
            "pooled_prompt_embeds": randn(1, TEXT, seed=2),
            "negative_pooled_prompt_embeds": randn(1, TEXT, seed=3),
        }
    else:
        mask = torch.ones(1, TOKENS)
        given |= {"prompt": None, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        given |= {"negative_prompt": None}
    return given


def draw(pipe: Any, family: str, height: int, width: int, **settings: Any) -> Tensor:
    given = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0, **settings}
    return pipe(height=height, width=width, **embeddings(family), **given).images


def factor(pipe: Any) -> int:
    return int(pipe.vae_scale_factor)


@pytest.mark.parametrize("family", MAKERS)
def test_one_tile_is_bit_equal_to_the_pipeline(family: str) -> None:
    pipe = pipeline(family)
    side = 16 * factor(pipe)
    own = {} if family == "sd3" else {"use_resolution_binning": False}
    expected = draw(pipe, family, side, side, generator=torch.Generator().manual_seed(3), **own)
    with latent_tiling(pipe, Tiling(tile=side, overlap=0, noise="host"), vae_options=STOCK) as session:
        found = draw(pipe, family, side, side, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)
    assert session.reports[0].tiles_run == STEPS


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 18)])
def test_canvases_larger_than_the_model_are_tiled(family: str, rows: int, columns: int) -> None:
    pipe = pipeline(family)
    unit = factor(pipe)
    if family == "sana":  # whose pipeline takes multiples of 32 pixels only
        rows, columns = -(-rows // 16) * 16, -(-columns // 16) * 16
    with latent_tiling(pipe, Tiling(tile=16 * unit, overlap=4 * unit), seed=3) as session:
        found = draw(pipe, family, rows * unit, columns * unit, output_type="pt")
        again = draw(pipe, family, rows * unit, columns * unit, output_type="pt")
    assert found.shape == (1, 3, rows * unit, columns * unit)
    assert bool(found.isfinite().all())
    assert torch.equal(found, again)
    grid = session.reports[0].grid
    assert grid is not None
    assert session.reports[0].tiles_run == STEPS * grid.tiles > 2 * STEPS
    assert [entry.plan.direction for entry in session.reports[0].vae] == ["decode"]


class Pointwise(nn.Module):
    """A body without context: tiling it can change nothing."""

    def __init__(self, channels: int, predicted: int) -> None:
        super().__init__()
        self.weight = randn(predicted, channels, 1, 1, seed=9) / channels**0.5

    def forward(self, canvas: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv2d(canvas, self.weight) + text.mean((1, 2)).view(-1, 1, 1, 1))


@pytest.mark.parametrize("family", MAKERS)
def test_a_pointwise_denoiser_tiled_equals_untiled(family: str) -> None:
    pipe = pipeline(family)
    config = pipe.transformer.config
    body = Pointwise(config.in_channels, config.out_channels)
    kind = type(pipe.transformer)

    class PointwiseModel(kind):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(kind.forward).bind(self, hidden_states, *args, **kwargs).arguments
            return (body(hidden_states, bound["encoder_hidden_states"]),)

    PointwiseModel.forward.__signature__ = inspect.signature(kind.forward)
    pipe.transformer.__class__ = PointwiseModel
    unit = factor(pipe)
    results = list[Tensor]()
    for tile in (64, 16):
        with latent_tiling(pipe, Tiling(tile=tile * unit, overlap=4 * unit), seed=3):
            # One shift for both: it follows the tile, which is what the last test but two is about.
            results.append(draw(pipe, family, 32 * unit, 48 * unit))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-5)


def test_the_shift_of_a_flow_follows_the_tile_and_not_the_canvas() -> None:
    sigmas = dict[str, Tensor]()
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
    for name, side, tile in (("host", 128, None), ("tile", 128, 128), ("large", 512, 128), ("small", 64, 128)):
        pipe = pipeline("sd3", **settings)
        if tile is None:
            draw(pipe, "sd3", side, side)
        else:
            with latent_tiling(pipe, Tiling(tile=tile, overlap=0)):
                draw(pipe, "sd3", side, side)
            assert "set_timesteps" not in vars(pipe.scheduler)
        sigmas[name] = pipe.scheduler.sigmas
    assert torch.equal(sigmas["host"], sigmas["tile"])
    assert torch.equal(sigmas["host"], sigmas["large"])
    assert not torch.equal(sigmas["host"], sigmas["small"])
    pipe = pipeline("sd3", **settings)
    with latent_tiling(pipe, Tiling(tile=128, overlap=0)):
        draw(pipe, "sd3", 512, 512, mu=0.7)
    own = pipeline("sd3", **settings)
    draw(own, "sd3", 128, 128, mu=0.7)
    assert torch.equal(pipe.scheduler.sigmas, own.scheduler.sigmas)


def test_pin_works_on_a_flow_and_refuses_what_it_cannot_know() -> None:
    pipe = pipeline("sd3")
    tiling = Tiling(tile=128, overlap=32, memory="pin")
    with latent_tiling(pipe, tiling, seed=1):
        assert bool(draw(pipe, "sd3", 192, 192).isfinite().all())
    other = pipeline("pixart")
    with latent_tiling(other, tiling, seed=1), pytest.raises(SettingError, match="weights of the guidance branches"):
        draw(other, "pixart", 192, 192)


def test_a_prediction_with_a_variance_cannot_be_pinned() -> None:
    from latent_tiles.memory.pin import Pin

    memory = Pin()
    with pytest.raises(MemoryStrategyError, match="needs a prediction of 4 channels, this model gives 8"):
        memory.decide(0, noisy=randn(1, 4, 8, 8), seen=randn(1, 4, 8, 8), prediction=randn(1, 8, 8, 8))


def call_of(pipe: Any, forward: Any, **arguments: Any) -> Any:
    return family_of(pipe.transformer)(pipe.transformer, forward, (), arguments)


def test_controlnet_tokens_are_cut_with_the_tiles() -> None:
    pipe, seen = pipeline("sd3"), list[Tensor]()

    def forward(**kwargs: Any) -> tuple[Tensor]:
        seen.extend(kwargs["block_controlnet_hidden_states"])
        return (torch.zeros_like(kwargs["hidden_states"]),)

    tokens = torch.arange(12 * 10.0).view(1, 120, 1)
    call = call_of(
        pipe, forward, hidden_states=randn(2, 4, 24, 20), timestep=torch.tensor([5.0]),
        block_controlnet_hidden_states=[tokens], skip_layers=[1],
    )  # fmt: skip
    call.run_tiles([Box(4, 2, 8, 6), Box(0, 0, 8, 6)], [randn(2, 4, 8, 6)] * 2)
    grid = tokens.view(12, 10)
    expected = [grid[2:6, 1:4].flatten(), grid[:4, :3].flatten()]
    assert torch.equal(seen[0][:, :, 0], torch.stack([expected[0]] * 2 + [expected[1]] * 2))
    wrong = call_of(
        pipe, forward, hidden_states=randn(2, 4, 24, 20), timestep=torch.tensor([5.0]),
        block_controlnet_hidden_states=[tokens[:, :100]],
    )  # fmt: skip
    with pytest.raises(FamilyError, match=r"has not one token for each of the canvas's 12 x 10 patches"):
        wrong.run_tiles([Box(0, 0, 8, 6)], [randn(2, 4, 8, 6)])


def test_arguments_that_are_not_known_are_refused() -> None:
    assert set(supported()) >= {"SD3Transformer2DModel", "SanaTransformer2DModel", "PixArtTransformer2DModel"}
    pipe = pipeline("sd3")
    given: dict[str, Any] = {"hidden_states": randn(1, 4, 16, 16), "timestep": torch.tensor([5.0])}
    call = call_of(pipe, print, **given, joint_attention_kwargs={"mystery": 1})
    with pytest.raises(FamilyError, match=r"joint_attention_kwargs \['mystery'\] are not known"):
        call.run_tiles([Box(0, 0, 8, 8)], [randn(1, 4, 8, 8)])
    other = pipeline("sana")
    call = call_of(
        other, print, **given, encoder_hidden_states=randn(1, TOKENS, TEXT), attention_mask=torch.ones(1, 256)
    )
    with pytest.raises(FamilyError, match="SanaTransformer2DModel argument 'attention_mask' is not known"):
        call.run_tiles([Box(0, 0, 8, 8)], [randn(1, 4, 8, 8)])
    placed = pipeline("sana", interpolation_scale=1)
    with pytest.raises(FamilyError, match="has positions of one canvas"):
        call_of(placed, print, **given, encoder_hidden_states=randn(1, TOKENS, TEXT))


def test_an_image_is_edited_too() -> None:
    text = pipeline("sd3")
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**text.components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 192, 320, generator=torch.Generator().manual_seed(0))
    with latent_tiling(pipe, Tiling(tile=128, overlap=32), seed=3) as session:
        found = draw(pipe, "sd3", 192, 320, image=image, strength=1.0, output_type="pt")
    assert found.shape == (1, 3, 192, 320)
    assert bool(found.isfinite().all())
    assert [entry.plan.direction for entry in session.reports[0].vae] == ["encode", "decode"]
