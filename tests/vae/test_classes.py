"""Every class of autoencoders, run window by window, against diffusers' own untiled pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vae.tiny_vaes import MAKERS, VIDEO, scene, sizes, tiny_vae

from latent_tiles.errors import ProgramError, VaeError
from latent_tiles.executor import plan as planning
from latent_tiles.executor.attention import KeyValues
from latent_tiles.executor.maps import Map
from latent_tiles.executor.plan import Budget, Plan, Speed, Work
from latent_tiles.executor.program import Program, ProgramBuilder
from latent_tiles.executor.run import Run
from latent_tiles.executor.spill import MapStore
from latent_tiles.executor.statistics import MomentPool, SumPool
from latent_tiles.geometry import Box, Size
from latent_tiles.vae import blocks
from latent_tiles.vae.classes import vq
from latent_tiles.vae.registry import supported_vaes, vae_family

TOLERANCE = 1e-4
"""Of the range of the output: the bar for exactness."""
SMALL, MEDIUM, LARGE = 2**11, 2**12, 2**22
"""Values of a window: dozens of windows a map, a few, one."""
DIRECTIONS = ("encode", "decode")
POOLED = [name for name in MAKERS if name not in VIDEO and not name.startswith("tiny")]
ONE_OF_A_CLASS = [
    "sd",
    "flux2",
    "tiny-relu",
    "dc",
    "dc-strided",
    "qwen",
    "wan2.2",
    "hunyuan",
    "vq",
    "movq",
    "asymmetric",
]
ATTENDING = [name for name in MAKERS if not name.startswith(("tiny", "dc"))]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def program_of(vae: Any, direction: str, **arguments: Any) -> Program:
    family = vae_family(vae)
    return family.encoder(vae) if direction == "encode" else family.decoder(vae, arguments).program


def work_of(program: Program, inputs: Sequence[Tensor]) -> Work:
    given = {node: Size(*values.shape[2:]) for node, values in zip(program.inputs, inputs, strict=True)}
    return Work(program=program, sizes=program.sizes(given), rows=inputs[0].shape[0], itemsize=inputs[0].dtype.itemsize)


def plan_of(work: Work, window_values: int, kept: tuple[str, frozenset[int]] | None = None) -> Plan:
    budget = Budget(window_bytes=2**27, device_bytes=0, host_bytes=2**30, disk_bytes=0, window_values=window_values)
    speed = Speed(flops=1e11, attention_flops=1e11, host_bytes=5e9, disk_bytes=5e8)
    first = next(planning.choices(work)) if kept is None else kept
    with patch.object(planning, "choices", lambda work: iter([first])):
        return planning.plan(work, budget, speed)


def run(
    program: Program, inputs: Sequence[Tensor], window_values: int, kept: tuple[str, frozenset[int]] | None = None
) -> Tensor:
    work = work_of(program, inputs)
    plan = plan_of(work, window_values, kept)
    shape = (work.rows, program.nodes[program.output].channels, *work.sizes[program.output])
    # What is never written stays NaN and fails every comparison.
    output = Map(torch.full(shape, torch.nan, dtype=inputs[0].dtype))
    with MapStore("cpu") as store:
        Run(
            program=program,
            plan=plan,
            inputs={node: Map(values) for node, values in zip(program.inputs, inputs, strict=True)},
            sink=output,
            store=store,
            dtype=inputs[0].dtype,
            rows=work.rows,
        )()
    return output.values


def stock(vae: Any, direction: str, values: Tensor, **arguments: Any) -> Tensor:
    video = vae_family(vae).video
    output = getattr(vae, direction)(values.unsqueeze(2) if video else values, **arguments)
    return raw(output).squeeze(2) if video else raw(output)


def raw(output: Any) -> Tensor:
    """The tensor in what `encode` or `decode` returns."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.parameters
    return next(getattr(output, name) for name in ("sample", "latents", "latent") if hasattr(output, name))


def input_of(program: Program, name: str, direction: str) -> Tensor:
    image, latents = sizes(name)
    return scene(program.nodes[program.inputs[0]].channels, image if direction == "encode" else latents)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the range."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ONE_OF_A_CLASS)
def test_equals_an_untiled_pass_whatever_is_kept(name: str, direction: str) -> None:
    vae = tiny_vae(name)
    program = program_of(vae, direction)
    values = input_of(program, name, direction)
    expected = stock(vae, direction, values)
    for kept in planning.choices(work_of(program, [values])):
        assert error(run(program, [values], MEDIUM, kept), expected) <= TOLERANCE, kept[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_equals_an_untiled_pass_whatever_the_window(name: str, direction: str) -> None:
    vae = tiny_vae(name)
    program = program_of(vae, direction)
    values = input_of(program, name, direction)
    expected = stock(vae, direction, values)
    windows = [plan_of(work_of(program, [values]), size).windows for size in (SMALL, MEDIUM, LARGE)]
    assert windows[0] >= windows[1] > windows[2]
    for size in (SMALL, LARGE):
        assert error(run(program, [values], size), expected) <= TOLERANCE, size


@settings(max_examples=10)
@given(
    name=st.sampled_from(["sd", "tiny-relu", "qwen", "vq"]),
    height=st.integers(9, 28),
    width=st.integers(9, 28),
    window=st.integers(2**10, 2**13),
    rows=st.integers(1, 2),
)
def test_encodes_any_size_in_any_window(name: str, height: int, width: int, window: int, rows: int) -> None:
    vae = tiny_vae(name)
    program = program_of(vae, "encode")
    values = scene(3, Size(height, width), rows=rows, seed=height)
    assert error(run(program, [values], window), stock(vae, "encode", values)) <= TOLERANCE


@pytest.mark.parametrize("name", ["sd", "dc", "qwen", "wan2.2", "hunyuan", "movq", "asymmetric"])
def test_half_precision_is_no_farther_from_single_than_stock(name: str) -> None:
    vae = tiny_vae(name)
    values = input_of(program_of(vae, "decode"), name, "decode")
    # Numbers of the codebook may differ between precisions; that is not what is asked here.
    arguments = {"force_not_quantize": True} if name == "movq" else {}
    exact = stock(vae, "decode", values, **arguments)
    vae.to(torch.bfloat16)
    low = values.bfloat16()
    theirs = (stock(vae, "decode", low, **arguments).float() - exact).norm()
    ours = (run(program_of(vae, "decode", **arguments), [low], SMALL).float() - exact).norm()
    assert ours <= 1.1 * theirs


def keep_first(pool: Any, values: Tensor) -> None:
    """A planted bug: the statistics of one window in place of the whole map's."""
    if not pool.__dict__.get("full"):
        pool.__dict__["full"] = True
        _ADD[type(pool)](pool, values)


_ADD = {MomentPool: MomentPool.add, SumPool: SumPool.add}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", POOLED)
def test_statistics_of_one_window_are_noticed(name: str, direction: str) -> None:
    vae = tiny_vae(name)
    program = program_of(vae, direction)
    values = input_of(program, name, direction)
    with patch.object(MomentPool, "add", keep_first), patch.object(SumPool, "add", keep_first):
        found = run(program, [values], SMALL)
    assert error(found, stock(vae, direction, values)) > 100 * TOLERANCE


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ATTENDING)
def test_attention_to_a_part_of_the_map_is_noticed(name: str, direction: str) -> None:
    vae = tiny_vae(name)
    program = program_of(vae, direction)
    values = input_of(program, name, direction)

    def upper_half(key_values: KeyValues) -> tuple[Tensor, Tensor]:
        height, width = key_values.keys.size
        some = Box(0, 0, max(1, height // 2), width)
        return tuple(part.read(some).flatten(2).transpose(1, 2) for part in (key_values.keys, key_values.values))

    with patch.object(KeyValues, "whole", property(upper_half)):
        found = run(program, [values], SMALL)
    assert error(found, stock(vae, direction, values)) > 10 * TOLERANCE


@pytest.mark.parametrize("size", [Size(1, 1), Size(2, 4), Size(1, 8)])
def test_linear_attention_equals_the_quadratic_one_of_small_maps(size: Size) -> None:
    vae = tiny_vae("dc")
    program = program_of(vae, "decode")
    assert size.area <= vae.config.attention_head_dim
    values = scene(8, size)
    # A range of so few positions is small itself.
    assert error(run(program, [values], SMALL), stock(vae, "decode", values)) <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen", "dc"])
def test_a_map_that_several_passes_go_on_from_is_computed_once(name: str) -> None:
    program = program_of(tiny_vae(name), "encode")
    work = work_of(program, [scene(3, Size(64, 64), rows=1)])
    once = sum(
        work.sizes[index].area
        * node.op.flops(tuple(program.nodes[entry].channels for entry in node.inputs), node.channels)
        for index, node in enumerate(program.nodes)
        if node.op is not None
    )
    # Beside the projections of an attention, which its passes over queries, keys and values all make.
    assert plan_of(work, LARGE).flops < 1.25 * once


# AsymmetricAutoencoderKL: image and mask.


def hole(size: Size, rows: int) -> Tensor:
    mask = torch.zeros(rows, 1, *size)
    mask[:, :, size.height // 5 : size.height // 2, size.width // 3 :] = 1
    return mask


@pytest.mark.parametrize("mask_rows", [1, 2])
def test_a_decoder_is_shown_what_surrounds_a_hole(mask_rows: int) -> None:
    vae = tiny_vae("asymmetric")
    latents = scene(4, Size(4, 3))
    image, mask = scene(3, Size(32, 24), seed=1), hole(Size(32, 24), mask_rows)
    expected = stock(vae, "decode", latents, image=image, mask=mask)
    assert error(stock(vae, "decode", latents), expected) > 0.01
    decoder = vae_family(vae).decoder(vae, {"image": image, "mask": mask, "generator": None})
    inputs = [latents, *decoder.extras]
    for kept in planning.choices(work_of(decoder.program, inputs)):
        assert error(run(decoder.program, inputs, MEDIUM, kept), expected) <= TOLERANCE, kept[0]


@pytest.mark.parametrize("shown", ["image", "mask"])
def test_an_image_without_a_mask_is_ignored_as_diffusers_does(shown: str) -> None:
    decoder = vae_family(vae := tiny_vae("asymmetric")).decoder(vae, {shown: scene(3, Size(32, 24))})
    assert decoder.extras == ()
    assert len(decoder.program.inputs) == 1


@pytest.mark.parametrize("shape", [(2, 3, 32, 24), (2, 1, 32, 25), (3, 1, 32, 24)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    vae = tiny_vae("asymmetric")
    with pytest.raises(VaeError, match=r"does not fit the image; give it as \(2, 1, 32, 24\)"):
        vae_family(vae).decoder(vae, {"image": scene(3, Size(32, 24)), "mask": torch.zeros(shape)})


def test_an_image_of_another_size_than_the_output_is_refused() -> None:
    vae = tiny_vae("asymmetric")
    image, mask = scene(3, Size(33, 25)), hole(Size(33, 25), 2)
    decoder = vae_family(vae).decoder(vae, {"image": image, "mask": mask})
    with pytest.raises(ProgramError, match="inputs of one layer differ in height"):
        run(decoder.program, [scene(4, Size(4, 3)), *decoder.extras], SMALL)


def test_a_condition_encoder_that_does_not_reach_the_decoder_is_refused() -> None:
    vae = diffusers.AsymmetricAutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(16, 8), norm_num_groups=4
    )
    with pytest.raises(VaeError, match="16 channels at 1/1 of the resolution"):
        vae_family(vae).decoder(vae, {"image": scene(3, Size(32, 24)), "mask": hole(Size(32, 24), 2)})


# VQModel: the codebook.


@pytest.mark.parametrize("name", ["vq", "movq"])
def test_latents_may_be_left_as_they_are(name: str) -> None:
    vae = tiny_vae(name)
    program = program_of(vae, "decode", force_not_quantize=True)
    values = input_of(program, name, "decode")
    expected = stock(vae, "decode", values, force_not_quantize=True)
    assert error(stock(vae, "decode", values), expected) > 0.01
    assert error(run(program, [values], SMALL), expected) <= TOLERANCE


def test_a_codebook_is_searched_a_band_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, values = tiny_vae("vq"), scene(3, Size(23, 17))
    expected = vae.quantize(values)[0]
    monkeypatch.setattr(vq, "_DISTANCES", 5 * 32 * 2 * 17)
    with patch.object(type(vae.quantize), "forward", autospec=True, side_effect=type(vae.quantize).forward) as calls:
        found = vq.quantise(vae.quantize, values)
    torch.testing.assert_close(found, expected)
    assert [call.args[1].shape[2] for call in calls.call_args_list] == [5, 5, 5, 5, 3]


def test_numbers_of_the_codebook_are_refused_and_entries_taken() -> None:
    vae = tiny_vae("vq")
    vae.register_to_config(lookup_from_codebook=True)
    numbers = torch.randint(32, (2, 9 * 7), generator=torch.Generator().manual_seed(0))
    shape = (2, 9, 7, 3)
    with pytest.raises(VaeError, match="look them up first"):
        program_of(vae, "decode", force_not_quantize=True, shape=shape)
    expected = vae.decode(numbers, force_not_quantize=True, shape=shape).sample
    entries = vae.quantize.get_codebook_entry(numbers, shape)
    assert error(run(program_of(vae, "decode"), [entries], SMALL), expected) <= TOLERANCE


def test_a_commit_loss_is_left_out() -> None:
    assert vae_family(tiny_vae("vq")).decoded(torch.zeros(2, 3, 8, 8)).commit_loss is None


# What a class returns.


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_returns_what_diffusers_returns(name: str, direction: str) -> None:
    vae = tiny_vae(name)
    family = vae_family(vae)
    size = Size(16, 16) if direction == "encode" else Size(4, 4)
    values = scene(program_of(vae, direction).nodes[0].channels, size)
    expected = getattr(vae, direction)(values.unsqueeze(2) if family.video else values)
    found = (family.encoded if direction == "encode" else family.decoded)(raw(expected))
    assert type(found) is type(expected)
    assert torch.equal(raw(found), raw(expected))


# Refusals: what a program does not cover is an error, not another result.


def test_a_class_that_is_not_supported_is_refused_with_those_that_are() -> None:
    assert len(supported_vaes()) == 9
    with pytest.raises(VaeError, match=r"Linear cannot be run exactly in tiles; supported are AsymmetricAuto.*VQModel"):
        vae_family(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("dc", Size(45, 36)), ("dc", Size(44, 38)), ("hunyuan", Size(28, 34)), ("wan2.2", Size(41, 56))],
)
def test_sizes_that_diffusers_cannot_take_are_refused(name: str, size: Size) -> None:
    vae = tiny_vae(name)
    values = scene(3, size)
    with pytest.raises((RuntimeError, ValueError)):
        stock(vae, "encode", values)
    with pytest.raises(ProgramError, match=r"is not a multiple of 2; pad or crop it, e\.g\. to"):
        run(program_of(vae, "encode"), [values], SMALL)


def swap(vae: Any, path: str, value: Any) -> None:
    """Set an attribute somewhere inside a module."""
    parent, _, name = path.rpartition(".")
    owner = vae.get_submodule(parent)
    if isinstance(value, nn.Module) or name not in owner._modules:
        setattr(owner, name, value)
    else:
        owner._modules[name] = value


class Unknown(nn.Module):
    """A module of a class that nobody knows."""

    training = False


@pytest.mark.parametrize(
    ("name", "direction", "path", "value", "match"),
    [
        # AutoencoderKL and what is built of its blocks
        ("sd", "encode", "encoder", Unknown(), "Unknown where a Encoder was expected"),
        ("sd", "decode", "decoder", Unknown(), "Unknown where a Decoder was expected"),
        ("sd", "encode", "encoder.down_blocks.0", Unknown(), "Unknown where a DownEncoderBlock2D or AttnDown"),
        ("sd", "decode", "decoder.up_blocks.0", Unknown(), "Unknown where a UpDecoderBlock2D or AttnUpDecoder"),
        ("sd", "encode", "encoder.mid_block", Unknown(), "Unknown where a UNetMidBlock2D"),
        ("sd", "encode", "encoder.down_blocks.0.resnets.0", Unknown(), "Unknown where a ResnetBlock2D"),
        ("sd", "encode", "encoder.mid_block.resnets.0.time_emb_proj", nn.Identity(), "a time embedding"),
        ("sd", "encode", "encoder.mid_block.resnets.0.upsample", nn.Identity(), "resampling inside"),
        ("sd", "encode", "encoder.down_blocks.0.downsamplers.0", Unknown(), "Unknown where a Downsample2D"),
        ("sd", "encode", "encoder.down_blocks.0.downsamplers.0.norm", nn.Identity(), "Downsample2D with a norm"),
        ("sd", "decode", "decoder.up_blocks.0.upsamplers.0", Unknown(), "Unknown where a Upsample2D"),
        ("sd", "decode", "decoder.up_blocks.0.upsamplers.0.norm", nn.Identity(), "Upsample2D with a norm"),
        ("sd", "decode", "decoder.up_blocks.0.upsamplers.0.use_conv_transpose", True, "a transposed convolution"),
        ("sd", "encode", "encoder.mid_block.attentions.0", Unknown(), "Unknown where a Attention"),
        ("sd", "encode", "encoder.mid_block.attentions.0.processor", Unknown(), "Unknown where a AttnProcessor"),
        ("sd", "encode", "encoder.mid_block.attentions.0.norm_q", nn.Identity(), "normalised queries and keys"),
        ("sd", "encode", "encoder.mid_block.attentions.0.only_cross_attention", True, "cross-attention"),
        ("sd", "encode", "encoder.mid_block.attentions.0.scale", 1.0, r"scale 1\.0"),
        # AutoencoderDC
        ("dc", "encode", "encoder", Unknown(), "Unknown where a Encoder"),
        ("dc", "decode", "decoder", Unknown(), "Unknown where a Decoder"),
        ("dc", "encode", "encoder.down_blocks.0.0", Unknown(), "Unknown where a ResBlock or EfficientViTBlock"),
        ("dc", "encode", "encoder.down_blocks.0.0.norm", nn.LayerNorm(8), "LayerNorm where a RMSNorm or BatchNorm2d"),
        ("dc", "encode", "encoder.down_blocks.0.0.norm", nn.BatchNorm2d(8), "statistics of the batch"),
        ("dc", "encode", "encoder.down_blocks.0.0.nonlinearity", nn.GLU(1), "GLU where a ReLU or"),
        ("dc", "encode", "encoder.down_blocks.1.0.attn", Unknown(), "Unknown where a SanaMultiscaleLinearAttention"),
        ("dc", "encode", "encoder.down_blocks.1.0.attn.processor", Unknown(), "SanaMultiscaleAttnProcessor2_0"),
        ("dc", "encode", "encoder.down_blocks.1.0.attn.nonlinearity", nn.GELU(), "GELU where a ReLU"),
        ("dc", "encode", "encoder.down_blocks.1.0.attn.to_qkv_multiscale.0", Unknown(), "AttentionProjection"),
        ("dc", "encode", "encoder.down_blocks.1.0.conv_out", Unknown(), "Unknown where a GLUMBConv"),
        ("dc", "encode", "encoder.down_blocks.1.0.conv_out.nonlinearity", nn.ReLU(), "ReLU where a SiLU"),
        ("dc-strided", "decode", "decoder.up_blocks.1.0.interpolation_mode", "bilinear", "interpolation_mode='bilin"),
        ("dc", "decode", "decoder.conv_act", nn.GLU(1), "GLU where a ReLU or"),
        # AutoencoderKLQwenImage, AutoencoderKLWan
        ("wan", "encode", "encoder", Unknown(), "Unknown where a QwenImageEncoder3d or WanEncoder3d"),
        ("wan", "decode", "decoder", Unknown(), "Unknown where a QwenImageDecoder3d or WanDecoder3d"),
        ("wan", "encode", "encoder.conv_in", nn.Conv3d(3, 8, 3), "Conv3d where a QwenImageCausalConv3d"),
        ("wan", "encode", "encoder.conv_in._padding", (1, 1, 1, 1, 1, 1), "1 frames before and 1 after 3 taps"),
        ("wan", "encode", "encoder.conv_in.stride", (2, 1, 1), "a stride or dilation in time"),
        ("wan", "encode", "encoder.norm_out", nn.Identity(), "Identity where a QwenImageRMS_norm"),
        ("wan", "encode", "encoder.norm_out.channel_first", False, "channels last"),
        ("wan", "encode", "encoder.nonlinearity", nn.GLU(1), "GLU where a SiLU"),
        ("wan", "encode", "encoder.down_blocks.0", Unknown(), "Unknown where a QwenImageResample or WanResample"),
        ("wan", "encode", "encoder.down_blocks.0.nonlinearity", nn.GLU(1), "GLU where a SiLU"),
        ("wan", "encode", "encoder.down_blocks.1.mode", "none", "mode='none'"),
        ("wan", "encode", "encoder.down_blocks.1.resample.0", nn.Identity(), "Identity where a ZeroPad2d"),
        ("wan", "encode", "encoder.mid_block", Unknown(), "Unknown where a QwenImageMidBlock or WanMidBlock"),
        ("wan", "encode", "encoder.mid_block.resnets.1", Unknown(), "Unknown where a QwenImageResidualBlock"),
        ("wan", "encode", "encoder.mid_block.attentions.0", Unknown(), "Unknown where a QwenImageAttentionBlock"),
        ("wan", "decode", "decoder.up_blocks.0", Unknown(), "Unknown where a QwenImageUpBlock or WanUpBlock"),
        ("wan", "decode", "decoder.up_blocks.0.upsamplers.0.resample.0", nn.Upsample(), "QwenImageUpsample or Wan"),
        ("wan", "decode", "decoder.up_blocks.0.upsamplers.0.resample.0.scale_factor", (4.0, 4.0), "scale_factor="),
        ("wan", "decode", "decoder.up_blocks.0.upsamplers.0.resample.0.mode", "bilinear", "mode='bilinear'"),
        ("wan2.2", "encode", "encoder.down_blocks.0.avg_shortcut", Unknown(), "Unknown where a AvgDown3D"),
        ("wan2.2", "decode", "decoder.up_blocks.0.avg_shortcut", Unknown(), "Unknown where a DupUp3D"),
        # AutoencoderKLHunyuanImage
        ("hunyuan", "encode", "encoder", Unknown(), "Unknown where a HunyuanImageEncoder2D"),
        ("hunyuan", "decode", "decoder", Unknown(), "Unknown where a HunyuanImageDecoder2D"),
        ("hunyuan", "encode", "encoder.down_blocks.0", Unknown(), "HunyuanImageResnetBlock or HunyuanImageDownsample"),
        ("hunyuan", "encode", "encoder.down_blocks.0.conv_shortcut", nn.Identity(), "different numbers of channels"),
        ("hunyuan", "encode", "encoder.down_blocks.0.nonlinearity", nn.GLU(1), "GLU where a SiLU"),
        ("hunyuan", "encode", "encoder.mid_block", Unknown(), "Unknown where a HunyuanImageMidBlock"),
        ("hunyuan", "encode", "encoder.mid_block.attentions.0", Unknown(), "Unknown where a HunyuanImageAttention"),
        ("hunyuan", "decode", "decoder.nonlinearity", nn.GLU(1), "GLU where a SiLU"),
        # VQModel, AsymmetricAutoencoderKL
        ("vq", "decode", "quantize", Unknown(), "Unknown where a VectorQuantizer"),
        ("movq", "decode", "decoder.conv_norm_out.conv_y", nn.Conv2d(4, 32, 3, padding=1), r"kernel_size=\(3, 3\)"),
        ("asymmetric", "decode", "decoder", Unknown(), "Unknown where a MaskConditionDecoder"),
        ("asymmetric", "decode", "decoder.up_blocks.0", Unknown(), "Unknown where a UpDecoderBlock2D"),
        ("asymmetric", "decode", "decoder.conv_norm_out", Unknown(), "a norm conditioned on latents"),
    ],
)  # fmt: skip
def test_what_a_program_does_not_cover_is_refused(name: str, direction: str, path: str, value: Any, match: str) -> None:
    vae = tiny_vae(name)
    swap(vae, path, value)
    with pytest.raises(VaeError, match=match):
        program_of(vae, direction)


def test_dropout_in_training_is_refused() -> None:
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], dropout=0.1
    )
    with pytest.raises(VaeError, match=r"dropout of 0\.1 in training mode"):
        program_of(vae, "encode")
    program_of(vae.eval(), "encode")


def test_a_condition_encoder_of_another_class_is_refused() -> None:
    vae = tiny_vae("asymmetric")
    vae.decoder.condition_encoder = Unknown()
    with pytest.raises(VaeError, match="Unknown where a MaskConditionEncoder"):
        program_of(vae, "decode", image=scene(3, Size(32, 24)), mask=hole(Size(32, 24), 2))


def test_a_norm_without_what_it_is_conditioned_on_is_refused() -> None:
    vae = tiny_vae("movq")
    build = ProgramBuilder()
    with pytest.raises(VaeError, match="no latents to be conditioned on"):
        blocks.norm(build, build.input(32), vae.decoder.conv_norm_out)
