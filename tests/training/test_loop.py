"""The loop: budgets, checkpoints, averages."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_tiny import loop

from training.errors import CheckpointError, TrainingConfigError
from training.loop import Batch, Ema, LoopConfig, find_checkpoint, fit, load_ema, save_checkpoint


class Line(nn.Module):
    """Fits a line through noisy points."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.line = nn.Linear(2, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Squared error."""
        points = batch["points"]
        noise = 0.01 * torch.randn(len(points), 1, generator=generator)
        return {"loss": (self.line(points) - points.sum(1, keepdim=True) - noise).square().mean()}


def _points(step: int) -> Batch:
    return {"points": torch.randn(8, 2, generator=torch.Generator().manual_seed(step))}


@pytest.mark.parametrize(
    "change",
    [{"steps": None}, {"minutes": 1.0}, {"lease_minutes": 0.0}, {"lr": 0.0}, {"ema": 1.0}, {"precision": "fp8"}],
)
def test_impossible_budgets_are_refused(change: dict[str, object]) -> None:
    """Exactly one budget; every value in its range."""
    with pytest.raises(TrainingConfigError, match=r"choose|give"):
        loop(5, **change)


def test_learning_rate_warms_up_and_anneals_by_steps_or_clock() -> None:
    """The rate starts small, peaks after the warm-up and ends at the floor, whatever measures the progress."""
    by_steps = LoopConfig(steps=100, lr=1.0, warmup_steps=10, lr_floor=0.1)
    rates = [by_steps.learning_rate(step, by_steps.progress(step, 0.0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert rates[100] == pytest.approx(0.1)
    by_clock = LoopConfig(minutes=2.0, lr=1.0)
    assert by_clock.progress(10_000, 60.0) == pytest.approx(0.5)
    assert by_clock.progress(0, 1e9) == 1.0


def test_average_follows_the_weights() -> None:
    """The average of constant weights is those weights; it lags behind a change."""
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.9)
    before = ema.state["weight"].clone()
    ema.update(module, 1000)
    assert torch.allclose(ema.state["weight"], before)
    with torch.no_grad():
        module.weight += 1
    ema.update(module, 1000)
    assert torch.allclose(ema.state["weight"], before + 0.1)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    """Starting again after the last step returns at once with the same weights."""
    fit(Line(), _points, loop(5), tmp_path, settings={})
    first, facts = load_ema(tmp_path)
    assert facts["step"] == 5
    assert fit(Line(), _points, loop(5), tmp_path, settings={}) == {"step": 5}
    assert all(torch.equal(first[key], value) for key, value in load_ema(tmp_path)[0].items())


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    """Batches are functions of the step, so loader processes change nothing."""
    for workers in (0, 2):
        fit(Line(), _points, loop(6, workers=workers), tmp_path / str(workers), settings={})
    alone, helped = (load_ema(tmp_path / name)[0] for name in ("0", "2"))
    assert all(torch.equal(alone[key], helped[key]) for key in alone)


def test_minutes_end_a_run(tmp_path: Path) -> None:
    """A budget of time ends soon and leaves a checkpoint."""
    result = fit(Line(), _points, loop(1, steps=None, minutes=0.005), tmp_path, settings={})
    assert result["step"] >= 1
    assert find_checkpoint(tmp_path) is not None


def test_a_lease_interrupts_and_the_next_one_continues(tmp_path: Path) -> None:
    """Short leases add up to the same run."""
    fit(Line(), _points, loop(4), tmp_path / "whole", settings={})
    leased = loop(4, lease_minutes=1e-9)
    steps = [fit(Line(), _points, leased, tmp_path / "leased", settings={})["step"] for _ in range(4)]
    assert steps == [1, 2, 3, 4]
    whole, pieces = (load_ema(tmp_path / name)[0] for name in ("whole", "leased"))
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)


def test_other_settings_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    """A checkpoint belongs to its settings."""
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_ema(tmp_path)
    fit(Line(), _points, loop(2), tmp_path, settings={"width": 1})
    with pytest.raises(CheckpointError, match="use another --out"):
        fit(Line(), _points, loop(2), tmp_path, settings={"width": 2})


def test_a_crash_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Half-written folders are ignored and replaced; the older checkpoint counts until the newer one is in place."""
    weights = {"w": torch.ones(1)}
    parts = {"model": weights, "ema": weights, "optimizer": {}}
    save_checkpoint(tmp_path / "checkpoint", parts, {"step": 1})
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint.old"
    save_checkpoint(tmp_path / "checkpoint", parts, {"step": 2})
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
