"""Levels against the schedulers themselves: real step loops with a known clean latent and known noise."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latent_tiles.errors import ParameterisationError
from latent_tiles.parameterisation import Levels, Prediction, levels

# Two schedulers of diffusers hand a tensor to a numpy function when they are built.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

STABLE_DIFFUSION: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STEPS = 10

# With the right prediction these integrate exactly, so that their own trajectory is the oracle.
DETERMINISTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddim-parallel": ("DDIMParallelScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm-prk": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-continuous": ("EulerDiscreteScheduler", {"timestep_type": "continuous", "use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm3": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "deis": ("DEISMultistepScheduler", {}),
}
# These add noise of their own, or drift; the oracle is their `add_noise` at every step.
RENOISED: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
    # These two are exact in theory; diffusers' own trajectory drifts off where they start in the middle, or average v.
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2m-sde-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "sa-solver": ("SASolverScheduler", {}),
}
FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "flow-unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "flow-dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
NOT_OFFERED = {
    # What diffusers itself refuses.
    ("pndm", "sample"), ("pndm-prk", "sample"), ("kdpm2", "sample"), ("kdpm2-karras", "sample"),
    ("euler", "sample"), ("euler-karras", "sample"), ("euler-trailing", "sample"), ("euler-continuous", "sample"),
    ("euler-ancestral", "sample"), ("heun", "sample"), ("heun-karras", "sample"), ("lms", "sample"),
}  # fmt: skip


def build(name: str, table: dict[str, tuple[str, dict[str, Any]]], **changes: Any) -> Any:
    kind, settings = table[name]
    base = {} if kind.startswith("FlowMatch") else STABLE_DIFFUSION
    scheduler = getattr(diffusers, kind)(**{**base, **settings, **changes})
    scheduler.set_timesteps(STEPS)
    return scheduler


def known() -> tuple[Tensor, Tensor]:
    """A clean latent and noise, in float64 so that what is compared is the mathematics."""
    generator = torch.Generator().manual_seed(5)
    shape = (1, 4, 6, 6)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def exact_prediction(now: Levels, clean: Tensor, noise: Tensor) -> Tensor:
    return {
        "epsilon": noise,
        "v_prediction": now.signal * noise - now.noise * clean,
        "sample": clean,
        "flow": noise - clean,
    }[now.prediction]


def start_in_the_middle(scheduler: Any, skipped: int) -> Any:
    """As the img2img hosts do in `get_timesteps`."""
    begin = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def close(found: Tensor, expected: Tensor) -> None:
    # Schedulers keep sigmas and cumulated alphas in float32.
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)


def check_clean(now: Levels, clean: Tensor, noise: Tensor) -> None:
    noisy = now.noisy(clean, noise)
    found = now.clean(noisy, exact_prediction(now, clean, noise))
    torch.testing.assert_close(found, clean, rtol=1e-9, atol=1e-9)


def offered(table: dict[str, tuple[str, dict[str, Any]]]) -> list[tuple[str, Prediction]]:
    return [(name, prediction) for name in table for prediction in PREDICTIONS if (name, prediction) not in NOT_OFFERED]


def drifts(name: str, prediction: Prediction, skipped: int | None) -> bool:
    """Whether diffusers' own trajectory leaves the schedule's levels; RENOISED has these cases."""
    return name.startswith(("pndm", "lms")) and (bool(skipped) or prediction == "v_prediction")


@pytest.mark.parametrize(
    ("name", "prediction", "skipped"),
    [
        (name, prediction, skipped)
        for name, prediction in offered(DETERMINISTIC)
        for skipped in (None, 0, 3)
        if not drifts(name, prediction, skipped)
    ],
)
def test_levels_follow_the_trajectory_of_a_deterministic_sampler(
    name: str, prediction: Prediction, skipped: int | None
) -> None:
    scheduler = build(name, DETERMINISTIC, prediction_type=prediction)
    timesteps = scheduler.timesteps if skipped is None else start_in_the_middle(scheduler, skipped)
    clean, noise = known()
    sample = None
    for t in timesteps:
        if sample is None:
            sample = start(scheduler, clean, noise, t)
        shown = scheduler.scale_model_input(sample, t)
        now = levels(scheduler, t)
        assert now.prediction == prediction
        close(shown, now.noisy(clean, noise))
        check_clean(now, clean, noise)
        sample = scheduler.step(exact_prediction(now, clean, noise), t, sample).prev_sample


def start(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, t[None], noise)
    return scheduler.add_noise(clean, noise, t[None])


@pytest.mark.parametrize("skipped", [0, 3])
@pytest.mark.parametrize(("name", "prediction"), offered(RENOISED))
def test_levels_are_those_of_a_samplers_own_noising(name: str, prediction: Prediction, skipped: int) -> None:
    scheduler = build(name, RENOISED, prediction_type=prediction)
    clean, noise = known()
    for t in start_in_the_middle(scheduler, skipped):
        sample = scheduler.add_noise(clean, noise, t[None])
        shown = scheduler.scale_model_input(sample, t)
        now = levels(scheduler, t)
        assert now.prediction == prediction
        close(shown, now.noisy(clean, noise))
        check_clean(now, clean, noise)
        scheduler.step(exact_prediction(now, clean, noise), t, sample)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("skipped", [0, 3])
def test_levels_of_the_ancestral_two_stage_sampler(skipped: int, karras: bool) -> None:
    """KDPM2 ancestral adds noise after its second stage only: the first must lead where the second expects."""
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler(**STABLE_DIFFUSION, use_karras_sigmas=karras)
    scheduler.set_timesteps(STEPS)
    clean, noise = known()
    for t in start_in_the_middle(scheduler, skipped):
        if scheduler.state_in_first_order:
            sample = scheduler.add_noise(clean, noise, t[None])
        shown = scheduler.scale_model_input(sample, t)
        now = levels(scheduler, t)
        close(shown, now.noisy(clean, noise))
        check_clean(now, clean, noise)
        sample = scheduler.step(noise, t, sample).prev_sample


@pytest.mark.parametrize("skipped", [None, 0, 3])
@pytest.mark.parametrize("name", FLOW)
def test_levels_follow_the_trajectory_of_a_flow_sampler(name: str, skipped: int | None) -> None:
    scheduler = build(name, FLOW)
    timesteps = scheduler.timesteps if skipped is None else start_in_the_middle(scheduler, skipped)
    clean, noise = known()
    clean, noise = clean.float(), noise.float()  # flow schedulers step in float32
    sample = start(scheduler, clean, noise, timesteps[0])
    for t in timesteps:
        now = levels(scheduler, t)
        assert now.prediction == "flow"
        assert now.signal + now.noise == pytest.approx(1, abs=1e-6)
        close(sample, now.noisy(clean, noise))
        torch.testing.assert_close(now.clean(sample, noise - clean), clean, rtol=0, atol=2e-5)
        sample = scheduler.step(noise - clean, t, sample).prev_sample


@pytest.mark.parametrize("name", ["dpm++2m-karras", "euler", "unipc", "ddim"])
def test_the_timestep_may_be_a_number_a_scalar_or_rows(name: str) -> None:
    scheduler = build(name, DETERMINISTIC)
    t = scheduler.timesteps[2]
    forms: list[Any] = [t, t[None], t.expand(6), float(t)]
    found = [levels(scheduler, form) for form in forms]
    assert all(one == found[0] for one in found)


def test_equal_timesteps_are_told_apart_by_the_step() -> None:
    """Karras sigmas round to equal timesteps at the end of a long schedule."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True)
    scheduler.set_timesteps(60)
    repeated = [k for k in range(59) if scheduler.timesteps[k] == scheduler.timesteps[k + 1]]
    assert repeated, "the case this test is about"
    k = repeated[0]
    scheduler.set_begin_index(k)
    first = levels(scheduler, scheduler.timesteps[k])
    scheduler.set_begin_index(k + 1)
    second = levels(scheduler, scheduler.timesteps[k + 1])
    assert first.noise > second.noise
    assert first.noise / first.signal == pytest.approx(float(scheduler.sigmas[k]), rel=1e-5)


def test_without_a_begin_index_equal_timesteps_read_as_diffusers_reads_them() -> None:
    scheduler = diffusers.HeunDiscreteScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[1]
    assert t == scheduler.timesteps[2]
    now = levels(scheduler, t)
    scheduler.scale_model_input(torch.zeros(1), t)
    assert now == levels(scheduler, t)


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_levels_are_the_same_for_a_second_call_of_one_step(call: int) -> None:
    scheduler = build("euler", DETERMINISTIC)
    for t in scheduler.timesteps[:call]:
        scheduler.scale_model_input(torch.zeros(1, 1, 2, 2), t)
        scheduler.step(torch.zeros(1, 1, 2, 2), t, torch.zeros(1, 1, 2, 2))
    t = scheduler.timesteps[call]
    scheduler.scale_model_input(torch.zeros(1), t)
    assert levels(scheduler, t) == levels(scheduler, t)


def unit(signal: float, noise: float, prediction: Prediction) -> Levels:
    """Levels as a scheduler has them: on the unit circle, or on the line for flow."""
    if prediction == "flow":
        return Levels(signal=1 - noise, noise=noise, prediction="flow")
    length = (signal**2 + noise**2) ** 0.5
    return Levels(signal=signal / length, noise=noise / length, prediction=prediction)


REAL_LEVELS = st.builds(
    unit,
    signal=st.floats(0.05, 1),
    noise=st.floats(0.05, 0.999),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample", "flow"]),
)


@given(REAL_LEVELS)
def test_the_right_prediction_gives_the_clean_latent(now: Levels) -> None:
    check_clean(now, *known())


@given(REAL_LEVELS)
def test_rebase_keeps_the_clean_latent(now: Levels) -> None:
    clean, noise = known()
    canvas = now.noisy(clean, noise)
    seen = canvas + torch.linspace(-2, 2, canvas.numel(), dtype=torch.float64).view(canvas.shape)
    prediction = torch.sin(7 * seen)
    restated = now.rebase(prediction, seen, canvas)
    torch.testing.assert_close(now.clean(canvas, restated), now.clean(seen, prediction), rtol=1e-7, atol=1e-7)


@given(REAL_LEVELS)
def test_rebase_at_the_same_input_changes_no_bit(now: Levels) -> None:
    prediction, canvas = (tensor.float() for tensor in known())
    assert torch.equal(now.rebase(prediction, canvas, canvas.clone()), prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_rebase_at_noise_level_zero_is_refused(prediction: Prediction) -> None:
    now = Levels(signal=1, noise=0, prediction=prediction)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ParameterisationError, match="noise level 0 cannot be restated"):
        now.rebase(x, x, x)


def test_rebase_of_a_sample_prediction_needs_no_levels() -> None:
    x = torch.zeros(1, 1, 2, 2)
    assert Levels(signal=1, noise=0, prediction="sample").rebase(x, x, x + 1) is x


def test_epsilon_without_signal_is_refused() -> None:
    now = Levels(signal=0, noise=1, prediction="epsilon")
    with pytest.raises(ParameterisationError, match="does not determine the clean latent"):
        now.clean(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


def test_other_predictions_hold_without_signal() -> None:
    clean, noise = known()
    for prediction in ("v_prediction", "sample", "flow"):
        check_clean(Levels(signal=0, noise=1, prediction=prediction), clean, noise)


def test_zero_terminal_snr_is_refused_for_epsilon_and_served_for_v() -> None:
    for prediction in ("epsilon", "v_prediction"):
        scheduler = diffusers.DDIMScheduler(
            **STABLE_DIFFUSION,
            rescale_betas_zero_snr=True,
            prediction_type=prediction,
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(STEPS)
        now = levels(scheduler, scheduler.timesteps[0])
        assert now.signal < 1e-6
        clean, noise = known()
        if prediction == "v_prediction":
            check_clean(now, clean, noise)
        else:
            with pytest.raises(ParameterisationError, match="does not determine"):
                now.clean(noise, noise)


def test_unknown_prediction_lists_the_known() -> None:
    unknown = object.__new__(Levels)  # past the run-time type check, which a user does not have
    for name, value in {"signal": 1.0, "noise": 1.0, "prediction": "original_sample"}.items():
        object.__setattr__(unknown, name, value)
    with pytest.raises(ParameterisationError, match="'original_sample'; known are epsilon, v_prediction, sample, flow"):
        unknown.__post_init__()


@pytest.mark.parametrize(("signal", "noise"), [(-0.1, 1.0), (1.0, -0.1), (0.0, 0.0)])
def test_impossible_levels_are_refused(signal: float, noise: float) -> None:
    with pytest.raises(ParameterisationError, match="must not be negative or both zero"):
        Levels(signal=signal, noise=noise, prediction="epsilon")


def test_mixed_timesteps_are_refused() -> None:
    with pytest.raises(ParameterisationError, match=r"different timesteps \[1\.0, 2\.0\]"):
        levels(build("ddim", DETERMINISTIC), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_schedulers_are_refused(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ParameterisationError, match=f"{name} scales inputs by the data's deviation"):
        levels(scheduler, scheduler.timesteps[0])


def test_the_consistency_scheduler_is_refused() -> None:
    """It divides by sqrt(sigma^2 + sigma_data^2), which is none of the levels known here."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ParameterisationError, match="CMStochasticIterativeScheduler scales inputs by the data's dev"):
        levels(scheduler, scheduler.timesteps[0])


def test_flow_sigmas_keep_a_prediction_type_that_is_stated() -> None:
    scheduler = build("flow-unipc", FLOW, prediction_type="epsilon")
    now = levels(scheduler, scheduler.timesteps[3])
    assert now.prediction == "epsilon"
    clean, noise = known()
    sample = start(scheduler, clean, noise, scheduler.timesteps[3])
    scheduler.step(noise, scheduler.timesteps[3], sample)
    scheduler._step_index -= 1
    close(scheduler.convert_model_output(noise, sample=sample), now.clean(sample, noise))


def test_a_scheduler_with_neither_sigmas_nor_alphas_is_refused() -> None:
    class Bare:
        def __init__(self) -> None:
            self.config: dict[str, Any] = {}

    with pytest.raises(ParameterisationError, match="Bare has neither sigmas nor alphas_cumprod"):
        levels(Bare(), 1)


@pytest.mark.parametrize("name", ["euler", "dpm++2m", "unipc"])
def test_a_timestep_off_the_schedule_is_refused(name: str) -> None:
    scheduler = build(name, DETERMINISTIC)
    with pytest.raises(ParameterisationError, match=r"timestep 0\.5 is not on the schedule of"):
        levels(scheduler, 0.5)
