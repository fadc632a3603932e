"""The noise field inside unchanged hosts and schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.utils.torch_utils import randn_tensor

from latent_tiles.denoiser import Clock
from latent_tiles.errors import NoiseError
from latent_tiles.geometry import Box
from latent_tiles.noise import NoiseField
from latent_tiles.pipelines.noise_scope import FieldDraws, field_noise, require_keyed_draws

FIELD = NoiseField(seeds=(3,))


def expected(purpose: Any, items: int = 1, channels: int = 4, size: int = 8, step: int = 0) -> torch.Tensor:
    return FIELD.sample(purpose, items=items, channels=channels, box=Box(0, 0, size, size), step=step)


def test_draws_in_every_spelling_are_answered() -> None:
    like = torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    with FieldDraws(FIELD, "initial"):
        draws = [
            torch.randn(1, 4, 8, 8),
            torch.randn((1, 4, 8, 8)),
            torch.randn(size=(1, 4, 8, 8)),
            torch.randn(torch.Size([1, 4, 8, 8])),
            randn_tensor((1, 4, 8, 8), device=torch.device("cpu"), dtype=torch.float32),
        ]
        double = torch.randn_like(like)
        half = randn_tensor((1, 4, 8, 8), dtype=torch.float16)
    for draw in draws:
        assert torch.equal(draw, expected("initial"))
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), expected("initial"))
    assert torch.equal(half, expected("initial").half())


def test_outside_a_scope_nothing_is_answered() -> None:
    with FieldDraws(FIELD, "initial"):
        pass
    torch.manual_seed(0)
    plain = torch.randn(1, 4, 8, 8)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(1, 4, 8, 8), plain)
    assert not torch.equal(plain, expected("initial"))


def test_the_innermost_scope_answers() -> None:
    with FieldDraws(FIELD, "initial"), FieldDraws(FIELD, "step", step=2):
        assert torch.equal(torch.randn(1, 4, 8, 8), expected("step", step=2))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.normal(0.0, 1.0, (1, 4, 8, 8)),
        lambda: torch.zeros(1, 4, 8, 8).normal_(),
        lambda: torch.rand(1, 4, 8, 8),
        lambda: torch.rand_like(torch.zeros(1, 4, 8, 8)),
    ],
)
def test_draws_of_another_kind_are_refused(draw: Any) -> None:
    with FieldDraws(FIELD, "initial"), pytest.raises(NoiseError, match=r"cannot answer a draw by .*noise='host'"):
        draw()


def test_draws_of_another_shape_are_refused() -> None:
    with FieldDraws(FIELD, "initial"), pytest.raises(NoiseError, match=r"not \(1, 64, 16\); use noise='host'"):
        torch.randn(1, 64, 16)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_schedulers_of_brownian_noise_are_refused(name: str) -> None:
    with pytest.raises(NoiseError, match=f"{name} draws its noise from a Brownian tree"):
        require_keyed_draws(getattr(diffusers, name)())


@pytest.mark.parametrize("host", tiny.HOSTS)
def test_what_each_part_of_a_host_draws(host: str) -> None:
    """Initial noise, VAE posterior, low-resolution noise and solver steps each have a field of their own."""
    pipe: Any = tiny.host_pipeline(host)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    drawn: list[str] = []
    field = NoiseField(seeds=(3,))
    original = NoiseField.sample

    def sample(self: NoiseField, purpose: Any, *, step: int = 0, **rest: Any) -> torch.Tensor:
        drawn.append(f"{purpose}/{step}")
        return original(self, purpose, step=step, **rest)

    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseField, "sample", sample)
        with field_noise(pipe, field, clock):
            own = {"strength": 1.0} if "Img2Img" in host else {}
            pipe(prompt="a", image=torch.rand(1, 3, 32, 32), num_inference_steps=2, output_type="latent", **own)
    posterior = ["posterior/0"] if "Img2Img" in host else []
    low_res = ["low_res/0"] if "Upscale" in host else []
    # Nothing steps the clock here, so both solver steps say 0; the envelope does.
    assert drawn == [*low_res, *posterior, "initial/0", "step/0", "step/0"]
