"""Command-line arguments that all training stages share."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from .loop import LoopConfig


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the photographs."""
    parser.add_argument("--data", nargs="+", required=True, help="folders, tar shards or pictures; patterns allowed")


def add_init_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the weights to begin with."""
    parser.add_argument(
        "--init", type=Path, help="exported model, or a run, whose weights are the start (default: fresh weights)"
    )


def add_loop_arguments(parser: argparse.ArgumentParser, *, lr: float) -> None:
    """Add output, budget and bookkeeping arguments."""
    parser.add_argument("--out", required=True, help="folder of the checkpoint; an interrupted run there is continued")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="training steps in all")
    budget.add_argument("--minutes", type=float, help="wall-clock minutes in all; the learning rate follows the clock")
    parser.add_argument("--lease-minutes", type=float, help="interrupt this call so early; run again to continue")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--ema", type=float, default=LoopConfig.ema, help="decay of the average (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: load in this process)")
    add_machine_arguments(parser)
    parser.add_argument("--tracker", choices=("tensorboard",), help="log through accelerate")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments that say how the machine is used."""
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="autocast (default: %(default)s)")


def begin(options: argparse.Namespace) -> None:
    """Log to the terminal and use as many threads as were asked for, if any were."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if getattr(options, "threads", None) is not None:
        torch.set_num_threads(options.threads)


def loop_config(options: argparse.Namespace) -> LoopConfig:
    """The `LoopConfig` of parsed arguments."""
    return LoopConfig(
        steps=options.steps,
        minutes=options.minutes,
        lease_minutes=options.lease_minutes,
        lr=options.lr,
        ema=options.ema,
        seed=options.seed,
        workers=options.workers,
        threads=options.threads,
        precision=options.precision,
        tracker=options.tracker,
    )
