"""The training loop that all stages share: budget, learning rate, EMA, checkpoints, logs.

Exact resume: batches and noise are pure functions of (seed, step), so that weights, EMA, optimizer state and the step
are all the state there is. A run that is limited by steps is bit-equal however often it is interrupted; one that is
limited by minutes takes its learning rate from the clock, and resumes at the time used so far.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .errors import CheckpointError, require

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Budget, optimizer and bookkeeping of one run.

    Attributes:
        steps: Stop after so many steps in all; exclusive with `minutes`.
        minutes: Stop after so much wall-clock time in all, resumed runs included; the learning rate follows the clock.
        lease_minutes: Interrupt this call, with a checkpoint, after so much time; None runs to the end of the budget.
        lr: Peak learning rate.
        lr_floor: Share of the peak that is left at the end.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of AdamW.
        clip: Largest gradient norm.
        ema: Decay of the weight average per step; it warms up as (1 + step) / (10 + step).
        seed: Of everything random.
        workers: Loader processes; 0 loads in the training process.
        threads: CPU threads of torch; None leaves torch's choice.
        precision: "bf16" (autocast) or "no".
        save_every_s: Seconds between checkpoints; one is always written at the end.
        log_every: Steps between log lines.
        tracker: Tracker of accelerate ("tensorboard"), or None.
    """

    steps: int | None = None
    minutes: float | None = None
    lease_minutes: float | None = None
    lr: float = 1e-3
    lr_floor: float = 0.01
    warmup_steps: int = 200
    weight_decay: float = 1e-3
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    workers: int = 0
    threads: int | None = None
    precision: str = "bf16"
    save_every_s: float = 120.0
    log_every: int = 100
    tracker: str | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        require(
            (self.steps is None) != (self.minutes is None),
            f"steps is {self.steps} and minutes is {self.minutes}; give exactly one of them",
        )
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}; choose 1 or more")
        require(self.minutes is None or self.minutes > 0, f"minutes is {self.minutes}; choose more than 0")
        require(
            self.lease_minutes is None or self.lease_minutes > 0,
            f"lease_minutes is {self.lease_minutes}; choose more than 0",
        )
        require(self.lr > 0, f"lr is {self.lr}; choose more than 0")
        require(0 <= self.ema < 1, f"ema is {self.ema}; choose 0 <= ema < 1")
        require(self.precision in {"bf16", "no"}, f"precision is {self.precision!r}; choose 'bf16' or 'no'")

    def progress(self, step: int, elapsed_s: float) -> float:
        """Share of the budget that is used before `step`, 0..1."""
        used = step / self.steps if self.steps is not None else elapsed_s / (60 * (self.minutes or 1))
        return min(1.0, used)

    def learning_rate(self, step: int, progress: float) -> float:
        """Learning rate of `step`: warm-up, then a cosine over the budget."""
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return (
            self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps)) * (self.lr_floor + (1 - self.lr_floor) * cosine)
        )


class Ema:
    """Moving average of a module's floating-point state, kept in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the module's present weights."""
        self.decay = decay
        self.state = {key: value.detach().clone() for key, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's present weights."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[key])
                values.append(value)
            else:
                self.state[key].copy_(value)
        torch._foreach_lerp_(averages, values, weight)


class StepDataset(Dataset[Batch]):
    """Batches indexed by the training step, each a pure function of it."""

    def __init__(self, make_batch: Callable[[int], Batch]) -> None:
        """Take the function from the step to its batch."""
        self._make_batch = make_batch

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""
        return self._make_batch(step)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def _batches(make_batch: Callable[[int], Batch], first: int, workers: int) -> Iterable[Batch]:
    return DataLoader(
        StepDataset(make_batch),
        batch_size=None,
        sampler=range(first, first + 100_000_000),
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


@dataclass
class _State:
    step: int = 0
    elapsed_s: float = 0.0


def save_checkpoint(folder: Path, parts: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a checkpoint folder so that a crash at any moment leaves a whole one behind.

    Args:
        folder: Where it goes; an older checkpoint there is replaced.
        parts: "model" and "ema" state dicts and the "optimizer" state.
        facts: JSON values: the step, the time used, the settings.
    """
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, stale):
        if leftover.exists() and (leftover is fresh or folder.exists()):
            shutil.rmtree(leftover)
    fresh.mkdir(parents=True)
    for name in ("model", "ema"):
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in parts[name].items()},
            fresh / f"{name}.safetensors",
        )
    torch.save(parts["optimizer"], fresh / "optimizer.pt")
    (fresh / "state.json").write_text(json.dumps(facts, indent=1))
    if folder.exists():
        os.replace(folder, stale)
    os.replace(fresh, folder)
    shutil.rmtree(stale, ignore_errors=True)


def find_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None."""
    return next((path for name in ("checkpoint", "checkpoint.old") if (path := out / name).is_dir()), None)


def load_ema(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights and the settings of a finished or interrupted run.

    Args:
        out: The run's folder.

    Returns:
        The state dict and the content of `state.json`.

    Raises:
        CheckpointError: If the folder has no checkpoint.
    """
    checkpoint = find_checkpoint(out)
    if checkpoint is None:
        raise CheckpointError(f"{out} has no checkpoint; run the stage before this one")
    return load_file(checkpoint / "ema.safetensors"), json.loads((checkpoint / "state.json").read_text())


def fit(
    objective: nn.Module,
    make_batch: Callable[[int], Batch],
    config: LoopConfig,
    out: Path,
    *,
    settings: dict[str, Any],
    stop_after: int | None = None,
) -> dict[str, float]:
    """Train until the budget is used; continue from the checkpoint in `out` if there is one.

    Args:
        objective: Module whose `forward(batch, generator, progress)` returns scalar losses, among them "loss".
        make_batch: Batch of a step, a pure function.
        config: Budget and optimizer.
        out: Folder of the checkpoint and of the tracker's logs.
        settings: JSON description of the stage; a checkpoint of other settings is refused.
        stop_after: Interrupt this call, with a checkpoint, after so many steps; for tests.

    Returns:
        The mean of the losses since the last log line, and "step".

    Raises:
        CheckpointError: If the checkpoint in `out` was made with other settings.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.precision, log_with=config.tracker, project_dir=str(out))
    require(
        accelerator.num_processes == 1,
        f"{accelerator.num_processes} processes were launched; one is supported: start python without a launcher",
    )
    if config.tracker is not None:
        accelerator.init_trackers("logs")
    objective = objective.to(accelerator.device, memory_format=torch.channels_last)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    ema, state = Ema(objective, config.ema), _State()
    checkpoint = find_checkpoint(out)
    if checkpoint is not None:
        facts = json.loads((checkpoint / "state.json").read_text())
        if facts["settings"] != json.loads(json.dumps(settings)):
            raise CheckpointError(
                f"{checkpoint} was made with settings {facts['settings']}, this run has {settings}; use another --out"
            )
        objective.load_state_dict(load_file(checkpoint / "model.safetensors"))
        ema.state = {
            key: value.to(accelerator.device) for key, value in load_file(checkpoint / "ema.safetensors").items()
        }
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
        state = _State(facts["step"], facts["elapsed_s"])
        logger.info("resumed at step %d, %.1f min used", state.step, state.elapsed_s / 60)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)

    def save() -> None:
        parts = {"model": objective.state_dict(), "ema": ema.state, "optimizer": optimizer.state_dict()}
        facts = {"step": state.step, "elapsed_s": state.elapsed_s, "settings": settings, "loop": asdict(config)}
        save_checkpoint(out / "checkpoint", parts, facts)

    started = saved = time.monotonic()
    first, began = state.step, started - state.elapsed_s
    sums: dict[str, Tensor] = {}
    counted, means = 0, {}
    done = config.progress(state.step, state.elapsed_s) >= 1
    loader = iter(()) if done else iter(_batches(make_batch, first, config.workers))
    for batch in loader:
        progress = config.progress(state.step, state.elapsed_s)
        rate = config.learning_rate(state.step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
        generator = torch.Generator(accelerator.device).manual_seed(config.seed * 1_000_000_007 + state.step)
        losses = wrapped(batch, generator, progress)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(objective, state.step)
        state.step += 1
        state.elapsed_s = time.monotonic() - began
        for key, value in losses.items():
            sums[key] = sums.get(key, 0) + value.detach()
        counted += 1
        finished = config.progress(state.step, state.elapsed_s) >= 1 or state.step - first == stop_after
        finished |= config.lease_minutes is not None and time.monotonic() - started > 60 * config.lease_minutes
        if counted >= config.log_every or finished:
            means = {key: float(value) / counted for key, value in sums.items()}
            text = " ".join(f"{key} {value:.4f}" for key, value in means.items())
            logger.info("step %d, %.1f min, lr %.2e: %s", state.step, state.elapsed_s / 60, rate, text)
            accelerator.log({**means, "lr": rate}, step=state.step)
            sums, counted = {}, 0
        if finished or time.monotonic() - saved > config.save_every_s:
            save()
            saved = time.monotonic()
        if finished:
            break
    accelerator.end_training()
    return {**means, "step": state.step}
