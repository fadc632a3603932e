"""`pin`: against its formula, written down a second time, and against `none`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, IPNDMScheduler, UNet2DConditionModel
from torch import Tensor

from latent_tiles.denoiser import Clock, TiledDenoiser
from latent_tiles.errors import MemoryStrategyError, ParameterisationError
from latent_tiles.families.unet import UNetCall
from latent_tiles.geometry import Box, Size, TileGrid, plan_grid
from latent_tiles.memory import TileMemory
from latent_tiles.memory.none import NoMemory
from latent_tiles.memory.pin import Pin
from latent_tiles.noise import NoiseField
from latent_tiles.parameterisation import Levels, levels
from latent_tiles.windows import cosine, tile_weights

FIELD = NoiseField(seeds=(21,))
SIZE = Size(40, 52)
TILE, OVERLAP = 16, 6
Model = Callable[[Tensor], Tensor]


class Call:
    """A model call whose model is any function of (branches * items, channels, height, width) of one tile."""

    def __init__(self, noisy: Tensor, model: Model, timestep: Tensor) -> None:
        self.noisy, self.model, self.timestep = noisy, model, timestep
        self.canvas = Size(*noisy.shape[-2:])
        self.seen: dict[Box, Tensor] = {}

    def run_whole(self) -> Any:
        return self.model(self.noisy)

    def run_tiles(self, boxes: Sequence[Box], noisy: Sequence[Tensor]) -> Sequence[Tensor]:
        self.seen |= dict(zip(boxes, noisy, strict=True))
        return [self.model(tile) for tile in noisy]

    def wrap(self, prediction: Tensor) -> Any:
        return prediction


def scheduler_for(prediction: str = "epsilon", kind: Any = DDIMScheduler) -> Any:
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)
    scheduler.set_timesteps(10)
    return scheduler


def denoiser(memory: TileMemory, scheduler: Any, **changes: Any) -> TiledDenoiser:
    settings: dict[str, Any] = {
        "plan_grid": lambda size: plan_grid(size, TILE, OVERLAP, multiple_of=2),
        "window": cosine,
        "tile_batch": 1,
        "noise": FIELD,
        "branches": lambda: (1.0,),
    }
    return TiledDenoiser(memory=memory, scheduler=scheduler, **{**settings, **changes})


def sample(rows: int = 1, size: Size = SIZE, seed: int = 2) -> Tensor:
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed))


def blurring(noisy: Tensor) -> Tensor:
    """Not pointwise, not linear, and different at a tile's border: every tile decides something of its own."""
    blurred = torch.nn.functional.avg_pool2d(noisy, 5, stride=1, padding=2)
    return torch.tanh(0.7 * noisy + blurred.flip(1)) + 0.1 * noisy.mean()


def by_formula(
    noisy: Tensor, model: Model, now: Levels, strength: float, branches: tuple[float, ...] = (1.0,)
) -> tuple[Tensor, dict[Box, Tensor]]:
    """The rule of pin.py's text, tile after tile, with sets of earlier tiles instead of canvases and ticks."""
    grid = plan_grid(Size(*noisy.shape[-2:]), TILE, OVERLAP, multiple_of=2)
    items = noisy.shape[0] // len(branches)
    noise = FIELD.sample("initial", items=items, channels=4, box=Box(0, 0, *grid.frame))
    a, s = now.signal, now.noise
    decided: list[tuple[int, Tensor]] = []
    shown: dict[Box, Tensor] = {}
    total, count = torch.zeros_like(noisy), torch.zeros(grid.frame)
    for index in sorted(range(len(grid)), key=lambda k: sum(grid.place(k))):
        here = sum(grid.place(index))
        earlier, weight = torch.zeros(items, 4, *grid.frame), torch.zeros(grid.frame)
        for other, clean in decided:
            if sum(grid.place(other)) < here:
                rows, columns = grid[other].to_slices()
                earlier[..., rows, columns] += tile_weights(grid, other, cosine) * clean
                weight[rows, columns] += tile_weights(grid, other, cosine)
        rows, columns = grid[index].to_slices()
        x, own, known = noisy[..., rows, columns], tile_weights(grid, index, cosine), weight[rows, columns]
        x0 = earlier[..., rows, columns] / known.clamp(min=1e-20)
        target = (a * x0 + s * noise[..., rows, columns]).repeat(len(branches), 1, 1, 1)
        seen = x + strength * known / (known + own) * (target - x)
        shown[grid[index]] = seen
        answer = model(seen)
        weights = torch.tensor(branches).view(-1, 1, 1, 1, 1)
        guided = (weights * answer.unflatten(0, (len(branches), items))).sum(0)
        decided.append((index, (seen[:items] - s * guided) / a))
        # The epsilon that stands at x for the x0 that was predicted at x'.
        total[..., rows, columns] += own * (x - (seen - s * answer)) / s
        count[rows, columns] += own
    return total / count, shown


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("size", [SIZE, Size(37, 41)])
def test_pin_is_its_formula(strength: float, size: Size) -> None:
    scheduler, noisy = scheduler_for(), sample(size=size)
    t = scheduler.timesteps[4]
    call = Call(noisy, blurring, t)
    found = denoiser(Pin(strength=strength), scheduler).predict(call)
    expected, shown = by_formula(noisy, blurring, levels(scheduler, t), strength)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for box, seen in call.seen.items():
        torch.testing.assert_close(seen, shown[box], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, denoiser(NoMemory(), scheduler).predict(Call(noisy, blurring, t)), atol=1e-2)


GUIDED = (-1.5, 2.5)
"""Weights of the unconditional and the conditional branch at a guidance scale of 2.5."""


def two_branches(noisy: Tensor) -> Tensor:
    """Branches that disagree: what is pinned for one is wrong for the other."""
    uncond, cond = noisy.chunk(2)
    return torch.cat([blurring(uncond), blurring(cond) + 0.5 * torch.sin(3 * cond)])


def test_under_guidance_all_branches_see_the_guided_neighbours() -> None:
    scheduler = scheduler_for()
    t = scheduler.timesteps[4]
    now = levels(scheduler, t)
    one = sample(rows=2)
    noisy = one.repeat(2, 1, 1, 1)
    call = Call(noisy, two_branches, t)
    found = denoiser(Pin(), scheduler, branches=lambda: GUIDED).predict(call)
    expected, shown = by_formula(noisy, two_branches, now, 1.0, GUIDED)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for box, seen in call.seen.items():
        uncond, cond = seen.chunk(2)
        assert torch.equal(uncond, cond)
        torch.testing.assert_close(seen, shown[box], rtol=1e-4, atol=1e-3)

    # Pinning each branch to its own neighbours would be something else, and so would the unguided or plain mean.
    def alone(branch: int) -> Tensor:
        def model(tile: Tensor) -> Tensor:
            return two_branches(tile.repeat(2, 1, 1, 1)).chunk(2)[branch]

        return by_formula(one, model, now, 1.0)[0]

    guided = sum(weight * part for weight, part in zip(GUIDED, found.chunk(2), strict=True))
    each_alone = sum(weight * alone(branch) for branch, weight in enumerate(GUIDED))
    assert float((guided - each_alone).abs().max()) > 0.05
    for wrong in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        assert float((by_formula(noisy, two_branches, now, 1.0, wrong)[0] - expected).abs().max()) > 0.05


def test_three_branches_are_taken_in_their_order() -> None:
    """InstructPix2Pix: text, image, neither."""
    branches = (3.0, -1.5, -0.5)

    def model(noisy: Tensor) -> Tensor:
        parts = noisy.chunk(3)
        return torch.cat([blurring(part) * factor for part, factor in zip(parts, (1.0, 0.4, -0.7), strict=True)])

    scheduler, noisy = scheduler_for(), sample().repeat(3, 1, 1, 1)
    found = denoiser(Pin(), scheduler, branches=lambda: branches).predict(Call(noisy, model, scheduler.timesteps[4]))
    expected, _ = by_formula(noisy, model, levels(scheduler, scheduler.timesteps[4]), 1.0, branches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_at_the_outer_edge_a_tile_starts_from_its_neighbours() -> None:
    """lambda = 1: where the tile's own weight vanishes its input is a x0 + s n, x0 the neighbour's."""
    scheduler, noisy = scheduler_for(), sample(size=Size(16, 26))
    t = scheduler.timesteps[4]
    now = levels(scheduler, t)
    call = Call(noisy, blurring, t)
    denoiser(Pin(), scheduler).predict(call)
    first, second = call.seen
    assert (first.left, second.left) == (0, 10)
    seen = call.seen[first]
    assert torch.equal(seen, noisy[..., :16]), "the first tile sees the canvas"
    decided = now.clean(seen, blurring(seen))
    noise = FIELD.sample("initial", items=1, channels=4, box=Box(0, 0, 16, 26))
    pinned = now.noisy(decided, noise[..., :16])[..., 10:]
    overlap = call.seen[second][..., :6]
    distance = (overlap - pinned).abs() / (noisy[..., 10:16] - pinned).abs()
    ramp = cosine(6, 6, 0)
    torch.testing.assert_close(distance, ramp.expand_as(distance), rtol=1e-3, atol=1e-3)
    assert float(distance[..., 0].max()) < 0.02, "the outer edge is the neighbour's"
    # From the end of the overlap on the tile sees the canvas.
    assert torch.equal(call.seen[second][..., 6:], noisy[..., 16:])


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_tiles_that_agree_already_are_left_alone(kind: Any, prediction: str, strength: float) -> None:
    """A pointwise linear denoiser that knows x0, on a canvas with the frame's noise: nothing is left to pin."""
    if kind is EulerDiscreteScheduler and prediction == "sample":
        kind = DDIMScheduler  # Euler does not offer it
    scheduler = scheduler_for(prediction, kind)
    t = scheduler.timesteps[4]
    now = levels(scheduler, t)
    clean = sample(seed=8)[..., :1, :1].expand(1, 4, *SIZE)
    noisy = now.noisy(clean, FIELD.sample("initial", items=1, channels=4, box=Box(0, 0, *SIZE)))

    def model(x: Tensor) -> Tensor:
        x0 = clean[..., : x.shape[-2], : x.shape[-1]]
        noise = (x - now.signal * x0) / now.noise
        return {"epsilon": noise, "v_prediction": now.signal * noise - now.noise * x0, "sample": x0}[prediction]

    found = denoiser(Pin(strength=strength), scheduler).predict(Call(noisy, model, t))
    torch.testing.assert_close(found, model(noisy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_whatever_the_model_predicts_the_same_clean_latent_is_fused(prediction: str) -> None:
    """The same x0 stated as epsilon, v or sample: pin must come to the same clean canvas."""
    results: list[Tensor] = []
    for kind in ("epsilon", prediction):
        scheduler, noisy = scheduler_for(kind), sample()
        t = scheduler.timesteps[4]
        now = levels(scheduler, t)

        def model(x: Tensor, now: Levels = now, kind: str = kind) -> Tensor:
            x0 = blurring(x)
            noise = (x - now.signal * x0) / now.noise
            return {"epsilon": noise, "v_prediction": now.signal * noise - now.noise * x0, "sample": x0}[kind]

        found = denoiser(Pin(), scheduler).predict(Call(noisy, model, t))
        results.append(now.clean(noisy, found))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


class Backwards(Pin):
    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        return tuple(tuple(reversed(tick)) for tick in super().ticks(grid))


def test_the_order_within_a_tick_does_not_matter() -> None:
    scheduler, noisy = scheduler_for(), sample()
    t = scheduler.timesteps[4]
    forwards, backwards = (denoiser(kind(), scheduler).predict(Call(noisy, blurring, t)) for kind in (Pin, Backwards))
    torch.testing.assert_close(backwards, forwards, rtol=1e-5, atol=1e-5)


def test_inputs_are_not_changed() -> None:
    scheduler, noisy = scheduler_for(), sample()
    copy = noisy.clone()
    denoiser(Pin(), scheduler).predict(Call(noisy, blurring, scheduler.timesteps[4]))
    assert torch.equal(noisy, copy)


def test_every_step_starts_afresh() -> None:
    """What was decided at one step is not seen at the next."""
    scheduler, memory = scheduler_for(), Pin()
    tiled = denoiser(memory, scheduler)
    for t in scheduler.timesteps[:3]:
        tiled.predict(Call(sample(seed=int(t)), blurring, t))
        tiled.clock.stepped()
    t = scheduler.timesteps[4]
    again = tiled.predict(Call(sample(), blurring, t))
    assert torch.equal(again, denoiser(Pin(), scheduler).predict(Call(sample(), blurring, t)))


@pytest.fixture(scope="session")
def unet() -> UNet2DConditionModel:
    return tiny.unet()


def on_unet(
    unet: UNet2DConditionModel, memory: TileMemory, size: Size = SIZE, dtype: Any = None, **changes: Any
) -> Any:
    scheduler = scheduler_for()
    noisy = sample(rows=2, size=size)[:1].repeat(2, 1, 1, 1).to(dtype)
    text = torch.randn(2, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)
    tiled = denoiser(memory, scheduler, branches=lambda: GUIDED, **changes)
    arguments = (noisy, scheduler.timesteps[5], text)
    return tiled.predict(UNetCall(unet, unet.forward, arguments, {"return_dict": False}))[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [SIZE, Size(37, 41)])
def test_lambda_zero_is_bit_equal_to_none_on_a_real_model(size: Size, dtype: torch.dtype) -> None:
    """Although `pin` runs along diagonals: tiles are summed in the grid's order, whatever the order they ran in."""
    model = tiny.unet().to(dtype)
    none, pinned, pinned_fully = (
        on_unet(model, memory, size, dtype=dtype) for memory in (NoMemory(), Pin(strength=0), Pin())
    )
    assert torch.equal(pinned, none)
    assert pinned.dtype == dtype
    assert not torch.allclose(pinned_fully, none, atol=1e-3)


@torch.no_grad()
def test_the_first_tile_and_what_no_other_reaches_equal_none(unet: UNet2DConditionModel) -> None:
    none, pinned = (on_unet(unet, memory, dtype=torch.float32) for memory in (NoMemory(), Pin()))
    own = TILE - OVERLAP - 2
    assert torch.equal(pinned[..., :own, :own], none[..., :own, :own])
    assert not torch.equal(pinned, none)


@torch.no_grad()
def test_a_single_tile_equals_the_model(unet: UNet2DConditionModel) -> None:
    none, pinned = (
        on_unet(unet, memory, Size(16, 14), dtype=torch.float32) for memory in (NoMemory(), Pin())
    )  # fmt: skip
    assert torch.equal(pinned, none)


@torch.no_grad()
def test_results_do_not_depend_on_the_tile_batch(unet: UNet2DConditionModel) -> None:
    one, four = (on_unet(unet, Pin(), tile_batch=count, dtype=torch.float32) for count in (1, 4))
    # Rounding of batched matrix products, which a later tile takes on from an earlier one.
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-4)


def test_it_needs_the_noise_field() -> None:
    scheduler = scheduler_for()
    with pytest.raises(MemoryStrategyError, match="pin needs the shared noise field; use noise='field'"):
        denoiser(Pin(), scheduler, noise=None).predict(Call(sample(), blurring, scheduler.timesteps[0]))


def test_it_needs_all_branches_in_one_call() -> None:
    scheduler, clock = scheduler_for(), Clock()
    tiled = denoiser(Pin(), scheduler, clock=clock)
    tiled.predict(Call(sample(), blurring, scheduler.timesteps[0]))
    with pytest.raises(MemoryStrategyError, match="this host calls it once per branch"):
        tiled.predict(Call(sample(), blurring, scheduler.timesteps[0]))


def test_it_needs_whole_items_for_the_branches() -> None:
    scheduler = scheduler_for()
    tiled = denoiser(Pin(), scheduler, branches=lambda: GUIDED)
    with pytest.raises(MemoryStrategyError, match="3 rows are not a whole number of items for 2 guidance branches"):
        tiled.predict(Call(sample(rows=3), blurring, scheduler.timesteps[0]))


def test_it_needs_a_scheduler_that_states_its_levels() -> None:
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ParameterisationError, match="IPNDMScheduler has neither sigmas nor alphas_cumprod"):
        denoiser(Pin(), scheduler).predict(Call(sample(), blurring, scheduler.timesteps[0]))


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan"), float("inf")])
def test_lambda_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(MemoryStrategyError, match="pin: lambda must be between 0 and 1, got"):
        Pin(strength=strength)
