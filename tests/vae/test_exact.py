"""`exact_vae` as a user meets it, on tiny real autoencoders."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from allocation_spy import AllocationSpy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vae.tiny_vaes import tiny_vae

from latent_tiles import VaeOptions, exact_vae
from latent_tiles.errors import BudgetError, ExecutorError, VaeError
from latent_tiles.executor.speed import measured_speed
from latent_tiles.executor.statistics import Moments
from latent_tiles.geometry import Box, Size
from latent_tiles.vae.exact import ExactVae
from latent_tiles.vae.measured import spread, statistic_difference

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def image(height: int = 101, width: int = 77, rows: int = 1, seed: int = 0) -> Tensor:
    """A picture with slow changes of tone, which plain tiles get wrong, and noise."""
    down, across = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    slow = torch.stack([down * across, down + 0 * across, across + 0 * down])
    return slow + 0.3 * torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


def latents(height: int = 25, width: int = 19, rows: int = 1, channels: int = 4) -> Tensor:
    slow = torch.linspace(-2, 2, width) * torch.linspace(0, 1, height)[:, None]
    return slow + torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(1))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).abs().max() / (expected.max() - expected.min()).double())


@dataclass
class Drawn:
    """A picture that exists only where it is looked at."""

    size: Size
    asked: list[Box] = field(default_factory=list[Box])

    def read(self, box: Box) -> Tensor:
        self.asked.append(box)
        down = torch.arange(box.top, box.bottom)[:, None] / 50
        across = torch.arange(box.left, box.right) / 70
        return torch.stack([torch.sin(down + across), torch.cos(down * across), torch.sin(across) + 0 * down])[None]


@dataclass
class Gathered:
    """Keeps only a coarse mean, and knows which rows are finished."""

    size: Size
    written: Any = field(init=False)
    boxes: list[Box] = field(default_factory=list[Box])
    total: float = 0.0

    def __post_init__(self) -> None:
        self.written = np.zeros(self.size, dtype=np.uint8)  # not a tensor: the spy must not count it

    def write(self, box: Box, values: Tensor) -> None:
        assert values.shape[2:] == box.size
        self.boxes.append(box)
        self.written[box.to_slices()] += 1
        self.total += float(values.sum(dtype=torch.float64))


def test_a_diffusers_autoencoder_gives_what_it_gave_untiled_and_is_put_back() -> None:
    vae = tiny_vae("sd")
    pixels, codes, before = image(rows=2), latents(rows=2), dict(vars(vae))
    expected = vae.encode(pixels).latent_dist.parameters, vae.decode(codes).sample
    with exact_vae(vae, tile=32) as exact:
        found = vae.encode(pixels).latent_dist.parameters, vae.decode(codes).sample
    assert vars(vae).keys() == before.keys()
    assert [error(*pair) <= TOLERANCE for pair in zip(found, expected, strict=True)] == [True, True]
    assert exact is not None
    assert [(report.plan.direction, report.plan.windows > 20) for report in exact.reports] == [
        ("encode", True),
        ("decode", True),
    ]


def test_an_exception_inside_leaves_no_trace() -> None:
    vae = tiny_vae("sd")
    before = dict(vars(vae))
    with pytest.raises(RuntimeError, match="inside"), exact_vae(vae):
        raise RuntimeError("inside")
    assert vars(vae).keys() == before.keys()


def test_plain_tuples_and_the_posterior_are_the_autoencoders_own() -> None:
    vae = tiny_vae("sd")
    pixels = image()
    expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
    with exact_vae(vae, tile=32):
        (posterior,) = vae.encode(pixels, return_dict=False)
        (decoded,) = vae.decode(z=latents(), return_dict=False, generator=torch.Generator())
    assert error(posterior.sample(torch.Generator().manual_seed(3)), expected) <= TOLERANCE
    assert error(decoded, vae.decode(latents()).sample) <= TOLERANCE


def test_slicing_and_tiling_switched_on_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    vae = tiny_vae("tiny-silu-16")
    pixels = image(104, 80)
    expected = vae.encode(pixels).latents
    vae.enable_tiling()
    vae.enable_slicing()
    with caplog.at_level(logging.INFO), exact_vae(vae, tile=32):
        # diffusers' own tiled encode crashes with 16 latent channels.
        assert error(vae.encode(pixels).latents, expected) <= TOLERANCE
    assert "enable_tiling() of the autoencoder has no effect" in caplog.text
    assert vae.use_tiling


@settings(max_examples=25)
@given(
    name=st.sampled_from(["sd", "tiny-relu", "sd3"]),
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    tile=st.integers(16, 64),
    ram=st.sampled_from([None, 0.3]),
)
def test_any_size_any_tile_any_budget(name: str, height: int, width: int, tile: int, ram: float | None) -> None:
    vae = tiny_vae(name)
    pixels = image(height, width)
    raw: Any = vae.encode(pixels)
    expected: Tensor = raw.latent_dist.parameters if hasattr(raw, "latent_dist") else raw.latents
    with exact_vae(vae, tile=tile, ram_budget_mib=ram, spill_budget_mib=64):
        found: Any = vae.encode(pixels)
        assert error(found.latent_dist.parameters if hasattr(found, "latent_dist") else found.latents, expected) <= (
            TOLERANCE
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "tiny-relu"])
def test_half_precision_is_no_farther_from_float32_than_an_untiled_pass(name: str, dtype: torch.dtype) -> None:
    vae, codes = tiny_vae(name), latents(rows=2)
    expected = vae.decode(codes).sample
    vae.to(dtype)
    untiled = vae.decode(codes.to(dtype)).sample
    with exact_vae(vae, tile=32):
        exact = vae.decode(codes.to(dtype)).sample
    assert exact.dtype == dtype
    distance = [float((part.float() - expected).square().mean().sqrt()) for part in (exact, untiled)]
    assert distance[0] <= 1.1 * distance[1]


@pytest.mark.parametrize("budget", [None, 3])
def test_autocast_is_followed(budget: float | None) -> None:
    vae, codes = tiny_vae("sd"), latents()
    expected = vae.decode(codes).sample
    with torch.autocast("cpu", torch.bfloat16):
        untiled = vae.decode(codes).sample
        with exact_vae(vae, tile=32, device_budget_mib=budget):
            exact = vae.decode(codes).sample
    distance = [float((part.float() - expected).square().mean().sqrt()) for part in (exact, untiled)]
    assert distance[0] <= 1.1 * distance[1]


# Where the maps lie, and how many of them.


def test_maps_on_disk_give_the_same_and_the_folder_is_empty_afterwards(tmp_path: Path) -> None:
    vae, codes = tiny_vae("sd"), latents(40, 40)
    expected = vae.decode(codes).sample
    with exact_vae(vae, tile=64, ram_budget_mib=0, spill_budget_mib=256, spill_dir=tmp_path) as exact:
        assert error(vae.decode(codes).sample, expected) <= TOLERANCE
    assert exact is not None
    assert exact.reports[0].plan.spill_mib > 0
    assert exact.reports[0].plan.ram_mib == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows ends processes otherwise")
def test_a_run_that_is_killed_leaves_the_spill_folder_empty(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from diffusers import AutoencoderKL; from latent_tiles import exact_vae\n"
        "vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',) * 2,\n"
        "    up_block_types=('UpDecoderBlock2D',) * 2, norm_num_groups=4)\n"
        "kill = lambda what, done, total: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "with exact_vae(vae, ram_budget_mib=0, spill_budget_mib=256, spill_dir=sys.argv[1], tile=32, progress=kill):\n"
        "    vae.decode(torch.zeros(1, 4, 48, 48))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_less_memory_means_fewer_maps_and_more_work_for_the_same_result() -> None:
    vae, codes = tiny_vae("sd"), latents(48, 48)
    expected = vae.decode(codes).sample
    plans = list[Any]()
    for ram in (64, 2.2, 1.0):
        with exact_vae(vae, tile=48, ram_budget_mib=ram) as exact:
            assert error(vae.decode(codes).sample, expected) <= TOLERANCE
        assert exact is not None
        plans.append(exact.reports[0].plan)
        assert plans[-1].ram_mib <= ram
    assert len({plan.keeps for plan in plans}) == 3
    assert plans[0].flops < plans[1].flops < plans[2].flops


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    vae = tiny_vae("sd")
    for name, hint in (("ram_budget_mib", r"give at least (\d+) MiB"), ("device_budget_mib", r">= (\d+)")):
        with exact_vae(vae, **{name: 0.001}) as exact:
            assert exact is not None
            with pytest.raises(BudgetError, match=name) as caught:
                exact.plan("decode", 200, 200)
        found = re.search(hint, str(caught.value))
        assert found is not None
        with exact_vae(vae, **{name: float(found[1])}) as exact:
            assert exact is not None
            assert exact.plan("decode", 200, 200).windows > 0


def test_a_time_budget_is_checked_against_the_prediction() -> None:
    with exact_vae(tiny_vae("sd"), time_budget_s=0.001) as exact:
        assert exact is not None
        with pytest.raises(BudgetError, match=r"predicted to take \d+ s, more than the 0 s given.*attention_keys"):
            exact.plan("decode", 2000, 2000)


def test_a_plan_says_the_cost_without_running_anything() -> None:
    vae = tiny_vae("sd")
    with exact_vae(vae) as exact:
        assert exact is not None
        plan, larger = exact.plan("decode", 100, 120), exact.plan("decode", 200, 240)
    assert (plan.input_size, plan.output_size) == ((100, 120), (400, 480))
    assert larger.flops == pytest.approx(4 * plan.flops, rel=0.1)
    assert larger.attention_flops == 16 * plan.attention_flops > 0
    assert larger.ram_mib == pytest.approx(4 * plan.ram_mib)
    assert "passes" in str(plan)
    assert exact.reports == []


@pytest.mark.parametrize("name", ["sd", "tiny-relu", "qwen"])
def test_a_plan_says_the_side_of_windows_in_pixels(name: str) -> None:
    with exact_vae(tiny_vae(name), tile=64) as exact:
        assert exact is not None
        assert 64 <= exact.plan("encode", 512, 512).window_px < 128
        assert 64 <= exact.plan("decode", 128, 128).window_px < 128


# Memory.


def test_the_working_set_keeps_its_budget_and_does_not_grow_with_the_frame() -> None:
    vae = tiny_vae("tiny-relu")
    measured_speed(torch.device("cpu"), torch.float32)  # the calibration takes memory once in a process
    peaks = list[int]()
    for side in (256, 512, 1024):
        sink = Gathered(Size(side, side))
        with exact_vae(vae, device_budget_mib=4) as exact, AllocationSpy() as spy:
            assert exact is not None
            codes = exact.encode_from(Drawn(Size(side, side))).latents
            exact.decode_to(codes, sink)
        peaks.append(spy.peak - codes.nbytes)
        assert peaks[-1] <= 4 * 2**20
    assert max(peaks) <= 1.05 * min(peaks[1:])


def test_windows_and_maps_together_keep_to_what_was_planned() -> None:
    vae = tiny_vae("sd")
    for side in (32, 64):
        codes, sink = latents(side, side), Gathered(Size(4 * side, 4 * side))
        with exact_vae(vae, device_budget_mib=4, ram_budget_mib=64) as exact, AllocationSpy() as spy:
            assert exact is not None
            exact.decode_to(codes, sink)
        plan = exact.reports[0].plan
        assert plan.window_mib <= 4
        assert spy.peak <= (plan.ram_mib + plan.window_mib + 0.25) * 2**20


def test_a_finished_window_does_not_lie_beside_the_next() -> None:
    vae, written, beside = tiny_vae("tiny-relu"), list[weakref.ref[Tensor]](), list[int]()

    class Watching:
        def write(self, box: Box, values: Tensor) -> None:
            del box
            written.append(weakref.ref(values))

    def look(*called: Any) -> None:
        del called
        beside.append(sum(part() is not None for part in written))

    vae.decoder.layers[0].register_forward_pre_hook(look)
    with exact_vae(vae, tile=32) as exact:
        assert exact is not None
        exact.decode_to(latents(), Watching())
    assert len(written) > 4
    assert max(beside) == 0


# Streams.


def test_a_picture_is_read_and_written_in_parts_and_each_place_once() -> None:
    vae = tiny_vae("sd")
    source = Drawn(Size(320, 256))
    whole = source.read(Box(0, 0, 320, 256))
    source.asked.clear()
    with exact_vae(vae, tile=32) as exact:
        assert exact is not None
        moments = exact.encode_from(source).latent_dist.parameters
        sink = Gathered(Size(320, 256))
        exact.decode_to(moments[:, :4], sink)
    assert error(moments, vae.encode(whole).latent_dist.parameters) <= TOLERANCE
    assert max(box.area for box in source.asked) <= 320 * 256 / 10
    assert sink.written.min() == sink.written.max() == 1
    assert [box.top for box in sink.boxes] == sorted(box.top for box in sink.boxes)
    assert sink.total == pytest.approx(float(vae.decode(moments[:, :4]).sample.double().sum()), rel=1e-4)


def test_progress_counts_every_window() -> None:
    told = list[tuple[str, int, int]]()
    vae = tiny_vae("sd")
    with exact_vae(vae, tile=32, progress=lambda *entry: told.append(entry)):
        vae.encode(image())
    assert [entry[1] for entry in told] == list(range(1, len(told) + 1))
    assert {(name, total) for name, _, total in told} == {("encode", len(told))}


# Approximations, never without being asked for.


def test_sampled_statistics_come_close_and_their_residual_is_told(caplog: pytest.LogCaptureFixture) -> None:
    vae = tiny_vae("sd")
    codes = torch.randn(1, 4, 160, 160, generator=torch.Generator().manual_seed(2))
    with exact_vae(vae, mode="sampled", residual_limit=1.0, attention_keys=2000) as sampled:
        found = vae.decode(codes).sample
    with exact_vae(vae, attention_keys=2000) as exact:
        own = vae.decode(codes).sample
    assert sampled is not None
    assert exact is not None
    residual = sampled.reports[0].residual
    assert residual is not None
    assert 0 < residual < 0.05
    assert exact.reports[0].residual is None
    assert error(found, own) < 0.02
    assert sampled.reports[0].plan.ram_mib < exact.reports[0].plan.ram_mib / 4
    assert sampled.reports[0].plan.passes < exact.reports[0].plan.passes
    assert caplog.text == ""


def test_patches_keep_to_the_budget_or_are_refused() -> None:
    vae = tiny_vae("sd")
    for budget in (8, 64):
        with exact_vae(vae, mode="sampled", device_budget_mib=budget) as exact:
            assert exact is not None
            assert exact.plan("decode", 160, 160).window_mib <= budget
    with exact_vae(vae, mode="sampled", device_budget_mib=3) as exact:
        assert exact is not None
        with pytest.raises(BudgetError, match=r"patches of mode 'sampled' take .* give device_budget_mib >= \d+"):
            exact.plan("decode", 160, 160)


def test_dropout_in_training_is_refused() -> None:
    vae = tiny_vae("sd")
    with exact_vae(vae):
        vae.decode(latents())
        vae.decoder.mid_block.resnets[0].dropout.p = 0.5
        vae.train()
        with pytest.raises(VaeError, match="ResnetBlock2D with dropout in training mode is not known"):
            vae.decode(latents())


def test_a_large_residual_warns(caplog: pytest.LogCaptureFixture) -> None:
    vae = tiny_vae("sd")
    pixels = image(400, 400)
    pixels[..., 137:141, :] *= 40  # patches may well miss a line that changes every statistic
    with exact_vae(vae, mode="sampled") as exact:
        vae.encode(pixels)
    assert exact is not None
    residual = exact.reports[0].residual
    assert residual is not None
    assert residual > 5e-4
    assert f"differ from those of the whole frame by {residual:.1e} standard deviations" in caplog.text


def test_an_attention_budget_reports_the_error_that_it_makes() -> None:
    vae, codes = tiny_vae("sd"), latents(40, 32)
    errors = list[float]()
    for keys in (20, 400):
        with exact_vae(vae, attention_keys=keys) as exact:
            vae.decode(codes)
        assert exact is not None
        reported = exact.reports[0].attention_error
        assert reported is not None
        errors.append(reported)
    assert errors[0] > errors[1] > 0
    with exact_vae(vae, attention_keys=40 * 32) as exact:
        assert error(vae.decode(codes).sample, tiny_vae("sd").decode(codes).sample) <= TOLERANCE


@pytest.mark.parametrize("size", [Size(1000, 1), Size(1, 1000), Size(400, 3), Size(30, 40)])
@pytest.mark.parametrize("keys", [1, 5, 20, 400])
def test_never_more_keys_than_were_asked_for(size: Size, keys: int) -> None:
    picked = spread(size, keys)
    assert picked is not None
    assert 1 <= len(picked) <= keys
    assert int(picked.max()) < size.area


def test_a_flat_map_has_no_residual() -> None:
    flat = Moments(mean=torch.ones(1, 4).double(), variance=torch.zeros(1, 4).double())
    assert statistic_difference(flat, flat) == 0


# Models that are offloaded, cast, adapted or compiled.


def test_leaf_modules_are_called_so_that_casting_stays_in_force() -> None:
    vae, codes = tiny_vae("sd"), latents()
    vae.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=("nothing",)
    )
    expected = vae.decode(codes).sample
    with exact_vae(vae, tile=32):
        assert error(vae.decode(codes).sample, expected) <= TOLERANCE


def test_weights_that_lie_elsewhere_between_calls_are_fetched() -> None:
    from accelerate import cpu_offload

    vae, codes, pixels = tiny_vae("sd"), latents(), image()
    expected = vae.decode(codes).sample
    cpu_offload(vae, execution_device=torch.device("cpu"), offload_buffers=True)
    assert next(vae.parameters()).device.type == "meta"
    with exact_vae(vae, tile=32) as exact:
        assert error(vae.decode(codes).sample, expected) <= TOLERANCE
        vae.encode(pixels)
        assert exact is not None
        assert exact.plan("encode", 100, 100).windows > 0


def test_groups_of_leaves_are_fetched() -> None:
    from diffusers.hooks import apply_group_offloading

    vae, codes = tiny_vae("sd"), latents()
    expected = vae.decode(codes).sample
    cpu = torch.device("cpu")
    apply_group_offloading(vae, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with exact_vae(vae, tile=32):
        assert error(vae.decode(codes).sample, expected) <= TOLERANCE


def test_adapters_on_convolutions_and_attention_are_applied() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    vae, codes = tiny_vae("sd"), latents()
    plain = vae.decode(codes).sample
    targets = ["conv1", "conv_out", "to_q", "conv_shortcut"]
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=targets), vae)
    adapted = vae.decode(codes).sample
    assert error(adapted, plain) > 100 * TOLERANCE
    with exact_vae(vae, tile=32):
        assert error(vae.decode(codes).sample, adapted) <= TOLERANCE


def test_fused_projections_are_known() -> None:
    vae, codes = tiny_vae("sd"), latents()
    vae.fuse_qkv_projections()
    expected = vae.decode(codes).sample
    with exact_vae(vae, tile=32):
        assert error(vae.decode(codes).sample, expected) <= TOLERANCE


def test_a_compiled_wrapper_is_looked_through() -> None:
    vae, codes = tiny_vae("sd"), latents()
    compiled: Any = torch.compile(vae, backend="eager")
    expected = vae.decode(codes).sample
    with exact_vae(compiled, tile=32) as exact:
        assert error(compiled.decode(codes).sample, expected) <= TOLERANCE
    assert exact is not None
    assert len(exact.reports) == 1


def test_weights_on_another_device_are_an_error_with_the_fix() -> None:
    vae = tiny_vae("tiny-relu")
    vae.decode(latents())
    with exact_vae(vae):
        vae.decode(latents())  # checked once, so that what follows meets the layers themselves
        vae.decoder.layers[0].to("meta")
        with pytest.raises(ExecutorError, match="weights are on meta, its input on cpu; move the model there"):
            vae.decode(latents())


# What is refused.


def test_a_block_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    forward = ResnetBlock2D.forward

    def drifted(self: Any, input_tensor: Tensor, temb: Any) -> Tensor:
        return forward(self, input_tensor, temb) * 1.1

    vae = tiny_vae("sd")
    monkeypatch.setattr(ResnetBlock2D, "forward", drifted)
    with exact_vae(vae), pytest.raises(VaeError, match=r"differs from its own decode by .* of the range"):
        vae.decode(latents())
    with exact_vae(vae), pytest.raises(VaeError, match=r"differs from its own encode by .* of the range"):
        vae.encode(image())


def test_a_program_of_another_shape_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vae("sd")
    original = type(vae).decode

    def cropped(self: Any, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        return type(original(self, z))(sample=original(self, z).sample[..., 1:])

    monkeypatch.setattr(type(vae), "decode", cropped)
    with exact_vae(vae), pytest.raises(VaeError, match=r"gives \(1, 3, .*\) where its own decode gives"):
        vae.decode(latents())


def test_other_classes_are_refused_with_the_list() -> None:
    vae = diffusers.AutoencoderOobleck(encoder_hidden_size=8, decoder_channels=8, decoder_input_channels=4)
    with (
        pytest.raises(VaeError, match=r"AutoencoderOobleck cannot be run.*AutoencoderKL, .*mode='stock'"),
        exact_vae(vae),
    ):
        pass


def test_stock_changes_nothing() -> None:
    vae = tiny_vae("sd")
    before = dict(vars(vae))
    with exact_vae(vae, mode="stock") as exact:
        assert exact is None
        assert vars(vae).keys() == before.keys()
    with pytest.raises(VaeError, match="there is nothing to run"):
        ExactVae(vae, VaeOptions(mode="stock"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 8}, "tile must be at least 16 pixels, got 8"),
        ({"ram_budget_mib": -1.0}, "ram_budget_mib must not be negative, got -1"),
        ({"device_budget_mib": float("nan")}, "device_budget_mib must not be negative, got nan"),
        ({"spill_budget_mib": float("inf")}, "spill_budget_mib must be finite, got inf"),
        ({"attention_keys": 0}, "attention_keys must be at least 1, got 0"),
        ({"spill_dir": "no/such/folder"}, "spill_dir 'no/such/folder' is not a folder"),
    ],
)
def test_options_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    options: Any = VaeOptions
    with pytest.raises(VaeError, match=re.escape(message)):
        options(**settings)


def test_a_mode_that_does_not_exist_is_refused() -> None:
    options = VaeOptions()
    object.__setattr__(options, "mode", "fast")  # past the type checker of this test suite
    with pytest.raises(VaeError, match="mode must be one of exact, sampled, stock, got 'fast'"):
        options.__post_init__()


def test_options_and_settings_together_are_refused() -> None:
    with (
        pytest.raises(VaeError, match="give options or settings, not both; got options and tile"),
        exact_vae(tiny_vae("sd"), VaeOptions(), tile=32),
    ):
        pass


def test_gradients_axes_and_frames_are_refused() -> None:
    vae, video = tiny_vae("sd"), tiny_vae("wan")
    with exact_vae(vae), torch.enable_grad():
        with pytest.raises(VaeError, match="gives no gradients"):
            vae.decode(latents().requires_grad_())
        with pytest.raises(VaeError, match=r"takes tensors of 4 axes, got \(1, 4, 1, 8, 8\)"):
            vae.decode(torch.zeros(1, 4, 1, 8, 8))
    with exact_vae(video), pytest.raises(VaeError, match="run exactly for single frames, got 5"):
        video.decode(torch.zeros(1, 4, 5, 8, 8))


def test_a_leaf_is_taken_where_no_gradients_are_asked_for() -> None:
    vae, codes = tiny_vae("sd"), latents()
    expected = vae.decode(codes).sample
    with exact_vae(vae, tile=32):
        assert error(vae.decode(codes.clone().requires_grad_()).sample, expected) <= TOLERANCE


# Speed, as a ratio in one run; the bar itself is measured by benchmarks/bench_vae.py.


@pytest.mark.slow
def test_it_takes_no_longer_than_an_untiled_pass() -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    ).eval()
    codes = torch.randn(1, 4, 512, 512)
    seconds: dict[str, list[float]] = {"stock": [], "exact": []}
    for mode in ("stock", "exact") * 3:
        with exact_vae(vae, mode=mode):
            start = time.perf_counter()
            vae.decode(codes)
            seconds[mode].append(time.perf_counter() - start)
    assert min(seconds["exact"]) <= 1.1 * min(seconds["stock"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_within_a_small_budget(dtype: torch.dtype) -> None:
    torch.backends.cudnn.allow_tf32 = False
    vae, codes = tiny_vae("sd").to("cuda"), latents(96, 64).to("cuda")
    expected = vae.decode(codes).sample
    vae.to(dtype)
    untiled = vae.decode(codes.to(dtype)).sample
    with exact_vae(vae, device_budget_mib=16, ram_budget_mib=64):
        found = vae.decode(codes.to(dtype)).sample
    if dtype == torch.float32:
        assert error(found, expected) <= TOLERANCE
    distance = [float((part.float() - expected).square().mean().sqrt()) for part in (found, untiled)]
    assert distance[0] <= max(1.1 * distance[1], 1e-4)
