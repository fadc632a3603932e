"""The tiled denoiser: order, batches, fusion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from latent_tiles.denoiser import Clock, Denoiser, TiledDenoiser
from latent_tiles.families.base import ModelCall
from latent_tiles.families.unet import UNetCall
from latent_tiles.geometry import Box, Size, TileGrid, plan_grid
from latent_tiles.memory import ModelStep
from latent_tiles.memory.none import NoMemory
from latent_tiles.noise import NoiseField
from latent_tiles.windows import WINDOWS, cosine


class FunctionCall:
    """A model call whose model is any function of (rows, channels, height, width)."""

    timestep = torch.tensor(500)

    def __init__(self, noisy: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        self.noisy, self.function = noisy, function
        self.canvas = Size(*noisy.shape[-2:])
        self.batches: list[tuple[Box, ...]] = []

    def run_whole(self) -> Any:
        return self.function(self.noisy)

    def run_tiles(self, boxes: Sequence[Box], noisy: Sequence[Tensor]) -> Sequence[Tensor]:
        assert {tile.shape for tile in noisy} == {(*self.noisy.shape[:2], *boxes[0].size)}
        self.batches.append(tuple(boxes))
        return self.function(torch.cat(list(noisy))).chunk(len(boxes))

    def wrap(self, prediction: Tensor) -> Any:
        return prediction


def denoiser(tile: int = 16, overlap: int = 6, multiple_of: int = 2, **changes: Any) -> TiledDenoiser:
    settings: dict[str, Any] = {
        "plan_grid": lambda size: plan_grid(size, tile, overlap, multiple_of=multiple_of),
        "window": cosine,
        "memory": NoMemory(),
        "tile_batch": 1,
        "scheduler": DDIMScheduler(),
        "noise": NoiseField(seeds=(0,)),
        "branches": lambda: (1.0,),
    }
    return TiledDenoiser(**{**settings, **changes})


def canvas(height: int, width: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(height * width))


@pytest.fixture(scope="session")
def unet() -> UNet2DConditionModel:
    return tiny.unet()


@pytest.fixture(scope="session")
def text() -> Tensor:
    return torch.randn(2, 7, tiny.WIDTH, generator=torch.Generator().manual_seed(1))


def call_of(unet: UNet2DConditionModel, sample: Tensor, text: Tensor, **changes: Any) -> UNetCall:
    arguments = {"encoder_hidden_states": text[: sample.shape[0]], **changes}
    return UNetCall(unet, unet.forward, (sample, torch.tensor(321)), arguments)


def pointwise() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(4, 16, 1), nn.SiLU(), nn.Conv2d(16, 4, 1), nn.Tanh()).requires_grad_(False)


class Reversed(NoMemory):
    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        return tuple(tuple(reversed(tick)) for tick in super().ticks(grid))


class Shuffled(NoMemory):
    """Every tile in a tick of its own, in an order that has nothing to do with the grid."""

    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(3)).tolist()
        return tuple((index,) for index in order)


def test_it_is_a_denoiser_and_the_fakes_are_model_calls() -> None:
    assert isinstance(denoiser(), Denoiser)
    assert isinstance(FunctionCall(canvas(4, 4), torch.sin), ModelCall)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tile_is_bit_equal_to_the_models_own_forward(unet: UNet2DConditionModel, text: Tensor, dtype: Any) -> None:
    model = unet if dtype == torch.float32 else tiny.unet().to(dtype)
    sample, words = canvas(16, 12, rows=2).to(dtype), text.to(dtype)
    tiled = denoiser()
    own = model(sample, torch.tensor(321), encoder_hidden_states=words)
    found = tiled.predict(call_of(model, sample, words))
    assert type(found) is type(own)
    assert torch.equal(found.sample, own.sample)
    found = tiled.predict(call_of(model, sample, words, return_dict=False))
    assert isinstance(found, tuple)
    assert torch.equal(found[0], own.sample)
    assert found[0].dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
def test_several_tiles_answer_in_the_form_that_was_asked_for(
    unet: UNet2DConditionModel, text: Tensor, return_dict: bool
) -> None:
    sample = canvas(24, 20)
    found = denoiser().predict(call_of(unet, sample, text, return_dict=return_dict))
    prediction = found.sample if return_dict else found[0]
    assert isinstance(found, tuple) != return_dict
    assert prediction.shape == sample.shape
    assert prediction.dtype == sample.dtype


@pytest.mark.parametrize("size", [(16, 16), (40, 56), (37, 41), (17, 16), (3, 101), (1, 1)])
def test_an_identity_denoiser_gives_the_input_back(size: tuple[int, int]) -> None:
    sample = canvas(*size, rows=2)
    found = denoiser(tile_batch=3).predict(FunctionCall(sample, torch.clone))
    torch.testing.assert_close(found, sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile_batch", [1, 4])
@pytest.mark.parametrize("window", sorted(WINDOWS))
@pytest.mark.parametrize("size", [(40, 56), (37, 41), (53, 97)])
def test_a_pointwise_denoiser_tiled_equals_untiled(window: str, size: tuple[int, int], tile_batch: int) -> None:
    sample, model = canvas(*size), pointwise()
    found = denoiser(window=WINDOWS[window], tile_batch=tile_batch).predict(FunctionCall(sample, model))
    torch.testing.assert_close(found, model(sample), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_real_model_does_not_depend_on_the_tile_batch(unet: UNet2DConditionModel, text: Tensor) -> None:
    sample = canvas(37, 45, rows=2)
    results = [
        denoiser(tile_batch=size).predict(call_of(unet, sample, text, return_dict=False))[0] for size in (1, 3, 4, 100)
    ]
    for other in results[1:]:
        # Float rounding of batched matrix products; predictions are of order 1.
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("memory", [Reversed, Shuffled])
def test_without_memory_the_order_of_tiles_does_not_matter(
    unet: UNet2DConditionModel, text: Tensor, memory: type[NoMemory]
) -> None:
    sample = canvas(37, 45)
    plain, other = (
        denoiser(memory=one()).predict(call_of(unet, sample, text, return_dict=False))[0] for one in (NoMemory, memory)
    )
    assert torch.equal(other, plain)


@torch.no_grad()
def test_tiles_are_really_separate(unet: UNet2DConditionModel, text: Tensor) -> None:
    """A change in one corner reaches the tiles that hold it and no others, unlike in an untiled call."""
    sample = canvas(40, 40)
    changed = sample.clone()
    changed[..., 0, 0] += 1
    tiled = denoiser(tile=16, overlap=4)
    before, after = (tiled.predict(call_of(unet, one, text, return_dict=False))[0] for one in (sample, changed))
    touched = (before != after).any(dim=1)[0]
    assert bool(touched[:12, :12].any())
    assert not bool(touched[16:].any())
    assert not bool(touched[:, 16:].any())


@pytest.mark.parametrize("tile_batch", [1, 2, 5])
@pytest.mark.parametrize("size", [(40, 40), (37, 41), (40, 41), (97, 17)])
def test_batches_hold_tiles_of_one_shape(size: tuple[int, int], tile_batch: int) -> None:
    call = FunctionCall(canvas(*size), torch.clone)
    tiled = denoiser(tile_batch=tile_batch)
    tiled.predict(call)
    grid = tiled.plan_grid(call.canvas)
    assert sorted(itertools.chain(*call.batches)) == sorted(grid)
    for batch in call.batches:
        assert 1 <= len(batch) <= tile_batch
        assert len({box.size for box in batch}) == 1
    shapes = [box.size for box in grid]
    assert len(call.batches) == sum(-(-shapes.count(shape) // tile_batch) for shape in set(shapes))


def test_counts() -> None:
    told: list[int] = []
    clock = Clock()
    tiled = denoiser(tile_batch=4, clock=clock, on_tiles=told.append)
    call = FunctionCall(canvas(36, 36), torch.clone)
    count = len(tiled.plan_grid(call.canvas))
    assert count == 9
    tiled.predict(call)
    assert told == [4, 4, 1]
    assert clock == Clock(steps=0, calls_in_step=1, model_calls=1, tiles=9)
    tiled.predict(call)
    assert clock == Clock(steps=0, calls_in_step=2, model_calls=2, tiles=18)
    clock.stepped()
    assert clock == Clock(steps=1, calls_in_step=0, model_calls=2, tiles=18)
    tiled.predict(FunctionCall(canvas(8, 8), torch.clone))
    assert told[-1] == 1
    assert clock == Clock(steps=1, calls_in_step=1, model_calls=3, tiles=19)


def test_the_grid_is_planned_once_for_each_canvas() -> None:
    planned: list[Size] = []

    def plan(size: Size) -> TileGrid:
        planned.append(size)
        return plan_grid(size, 16, 4)

    tiled = denoiser(plan_grid=plan)
    for size in ((40, 40), (24, 40), (40, 40), (24, 40)):
        tiled.predict(FunctionCall(canvas(*size), torch.clone))
    assert planned == [Size(40, 40), Size(24, 40)]


class Diary(NoMemory):
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.steps: list[ModelStep] = []

    def ticks(self, grid: TileGrid) -> Sequence[Sequence[int]]:
        return ((0,), tuple(range(1, len(grid))))

    def begin(self, step: ModelStep) -> None:
        self.steps.append(step)
        self.entries.append("begin")

    def see(self, index: int, noisy: Tensor) -> Tensor:
        self.entries.append(("see", index))
        return noisy + index

    def decide(self, index: int, *, noisy: Tensor, seen: Tensor, prediction: Tensor) -> Tensor:
        assert torch.equal(seen, noisy + index)
        assert torch.equal(prediction, 2 * seen), "the model is run on what the tile saw"
        self.entries.append(("decide", index))
        return noisy

    def end_tick(self) -> None:
        self.entries.append("end of tick")


def test_the_memory_is_asked_in_the_order_that_its_protocol_states() -> None:
    diary, sample = Diary(), canvas(16, 36)
    found = denoiser(memory=diary, tile_batch=2, overlap=4).predict(FunctionCall(sample, lambda x: 2 * x))
    assert diary.entries == [
        "begin",
        ("see", 0), ("decide", 0), "end of tick",
        ("see", 1), ("see", 2), ("decide", 1), ("decide", 2), "end of tick",
    ]  # fmt: skip
    # What `decide` says is what is fused.
    torch.testing.assert_close(found, sample, rtol=1e-6, atol=1e-6)


def test_the_memory_learns_about_the_call() -> None:
    diary, field = Diary(), NoiseField(seeds=(5,), origin=(3, 4))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    tiled = denoiser(memory=diary, noise=field, branches=lambda: (-6.5, 7.5), scheduler=scheduler, overlap=4)
    call = FunctionCall(canvas(16, 36, rows=4), lambda x: 2 * x)
    tiled.predict(call)
    tiled.predict(call)
    first, second = diary.steps
    assert (first.rows, first.channels, first.branches, first.call, second.call) == (4, 4, (-6.5, 7.5), 0, 1)
    assert first.device == torch.device("cpu")
    assert first.grid.frame == call.canvas
    assert [weights.shape for weights in first.weights] == [box.size for box in first.grid]
    assert first.levels().signal == pytest.approx(float(scheduler.alphas_cumprod[500]) ** 0.5)
    assert first.noise is not None
    # Two branches share the noise of each of the two items.
    assert torch.equal(first.noise(), field.sample("initial", items=2, channels=4, box=Box(0, 0, 16, 36)))


def test_without_a_field_the_memory_is_told_so() -> None:
    diary = Diary()
    denoiser(memory=diary, noise=None, overlap=4).predict(FunctionCall(canvas(16, 36), lambda x: 2 * x))
    assert diary.steps[0].noise is None


def test_one_tile_asks_no_memory() -> None:
    diary = Diary()
    denoiser(memory=diary).predict(FunctionCall(canvas(16, 16), torch.clone))
    assert diary.entries == []


def test_the_input_is_not_changed() -> None:
    sample = canvas(40, 40)
    copy = sample.clone()
    denoiser().predict(FunctionCall(sample, torch.sin))
    assert torch.equal(sample, copy)


def test_fusion_is_in_float32() -> None:
    sample = canvas(40, 40).to(torch.bfloat16)
    found = denoiser().predict(FunctionCall(sample, torch.clone))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sample.float(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_odd_canvases_run_through_a_real_model(unet: UNet2DConditionModel, text: Tensor) -> None:
    for size in ((17, 19), (31, 37), (16, 33)):
        found = denoiser(tile_batch=4).predict(call_of(unet, canvas(*size), text, return_dict=False))[0]
        assert found.shape[-2:] == size
        assert bool(found.isfinite().all())


@torch.no_grad()
def test_fused_tiles_are_the_weighted_mean_of_the_models_own_answers(unet: UNet2DConditionModel, text: Tensor) -> None:
    sample = canvas(24, 24)
    tiled = denoiser(window=WINDOWS["uniform"])
    total, count = torch.zeros_like(sample), torch.zeros(24, 24)
    for box in tiled.plan_grid(Size(24, 24)):
        rows, columns = box.to_slices()
        answer = unet(sample[..., rows, columns], torch.tensor(321), encoder_hidden_states=text[:1]).sample
        total[..., rows, columns] += answer
        count[rows, columns] += 1
    found = tiled.predict(call_of(unet, sample, text)).sample
    torch.testing.assert_close(found, total / count, rtol=1e-5, atol=1e-6)
