"""Stage 4: what the denoiser really makes of the training pairs, for the decoder to learn from.

Run: `python -m training.samples --data photos/train-*.tar --latents runs/latents --unet runs/unet --out runs/samples`
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from .command import add_data_argument, add_machine_arguments, begin
from .data import Pixels, batch_rng, expand, read_pictures
from .degrade import DegradeConfig
from .errors import CheckpointError, TrainingDataError, require
from .latents import LatentsConfig, make_pair
from .text import build_tokenizer
from .unet import build_scheduler, load_unet
from .words import WordConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """How samples are made.

    Attributes:
        side: Side of the square crops in latents.
        batch: Crops that are denoised together.
        steps: Denoising steps, as in use.
        round: Round of the pool whose pairs are taken; its photographs must be the same and in the same order.
        seed: Of the crops' places and of the noise.
        latents: Settings that the round was encoded with.
    """

    side: int = 64
    batch: int = 4
    steps: int = 8
    round: int = 0
    seed: int = 0
    latents: LatentsConfig = LatentsConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        """Check every setting."""
        for name in ("side", "batch", "steps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; choose 1 or more")


def denoise(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, noise: Tensor, condition: Tensor, text: Tensor
) -> Tensor:
    """Run the sampler as the host does, without guidance.

    Args:
        unet: The denoiser.
        scheduler: With its timesteps set.
        noise: (batch, channels, height, width) start.
        condition: Latents of the degraded frame, same shape.
        text: (batch, tokens, width) hidden states of the prompts.

    Returns:
        The denoised latents, same shape, float32.
    """
    latents = noise
    for step in scheduler.timesteps:
        inputs = torch.cat([latents, condition], 1).contiguous(memory_format=torch.channels_last)
        predicted = unet(inputs, step, text).sample.float()
        latents = scheduler.step(predicted, step, latents).prev_sample
    return latents


def make_samples(
    pictures: list[Pixels], pool: Path, unet: Path, out: Path, config: SamplesConfig, precision: str
) -> Path:
    """Denoise one crop of every pair of a round and store it beside its target.

    Args:
        pictures: The photographs of the round, in its order.
        pool: Folder of the rounds.
        unet: Folder of the denoiser's run.
        out: Folder to write; left alone if it exists.
        config: Sizes, steps and seed.
        precision: "bf16" or "no".

    Returns:
        `out`: `sampled.npy` and `clean.npy`, float16 (n, channels, side, side), and `pixels.npy`, uint8
        (n, side * factor, side * factor, 3).

    Raises:
        CheckpointError: If the round does not exist.
        TrainingDataError: If it was made of another number of photographs.
    """
    if out.is_dir():
        return out
    source = pool / f"round-{config.round:03d}"
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; run `python -m training.latents` first")
    targets, conditions = (np.load(source / f"{name}.npy", mmap_mode="r") for name in ("target", "condition"))
    if len(targets) != len(pictures):
        raise TrainingDataError(
            f"{source} holds {len(targets)} pairs of {len(pictures)} photographs; pass the same --data"
        )
    accelerator = Accelerator(mixed_precision=precision)
    denoiser, text_encoder, _ = load_unet(unet)
    denoiser = denoiser.to(accelerator.device, memory_format=torch.channels_last)
    text_encoder.to(accelerator.device)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    scheduler.set_timesteps(config.steps)
    side, factor = config.side, config.latents.side_px // targets.shape[2]
    work = out.with_name(out.name + ".new")
    work.mkdir(parents=True, exist_ok=True)
    shape = (len(pictures), targets.shape[1], side, side)
    stores = {n: np.lib.format.open_memmap(work / f"{n}.npy", "w+", np.float16, shape) for n in ("sampled", "clean")}
    pixels = np.lib.format.open_memmap(work / "pixels.npy", "w+", np.uint8, (len(pictures), *(side * factor,) * 2, 3))
    for first in range(0, len(pictures), config.batch):
        indices = range(first, min(first + config.batch, len(pictures)))
        prompts, crops = [], []
        for index in indices:
            rng = batch_rng(config.latents.seed, config.round, index)
            target, _, words = make_pair(pictures[index], config.latents, rng, DegradeConfig(), WordConfig())
            place = batch_rng(config.seed, config.round, index, 1)
            top, left = (int(place.integers(targets.shape[2] - side + 1)) for _ in range(2))
            window = (index, slice(None), slice(top, top + side), slice(left, left + side))
            stores["clean"][index] = targets[window]
            rows, columns = (slice(start * factor, (start + side) * factor) for start in (top, left))
            pixels[index] = target[rows, columns]
            crops.append(np.asarray(conditions[window], np.float32))
            prompts.append(", ".join(words))
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(config.seed * 1_000_000_007 + first)
        noise = torch.randn((len(crops), *shape[1:]), generator=generator).to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            text = text_encoder(tokens.to(accelerator.device)).last_hidden_state
            condition = torch.from_numpy(np.stack(crops)).to(accelerator.device)
            stores["sampled"][first : first + len(crops)] = denoise(denoiser, scheduler, noise, condition, text).cpu()
        if first // config.batch % 50 == 49:
            logger.info("%d of %d", first + len(crops), len(pictures))
    for store in (*stores.values(), pixels):
        store.flush()
    os.replace(work, out)
    return out


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.samples", description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--latents", type=Path, required=True, help="folder of the encoded pairs")
    parser.add_argument("--unet", type=Path, required=True, help="the denoiser's run, or an exported model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples; left alone if it exists")
    parser.add_argument("--side", type=int, default=SamplesConfig.side, help="side of a crop in latents")
    parser.add_argument("--batch", type=int, default=SamplesConfig.batch)
    parser.add_argument("--steps", type=int, default=SamplesConfig.steps, help="as in use (default: %(default)s)")
    parser.add_argument("--latents-seed", type=int, default=LatentsConfig.seed, help="that the pairs were encoded with")
    add_machine_arguments(parser)
    options = parser.parse_args(arguments)
    begin(options)
    pictures = [pixels for _, pixels in read_pictures(expand(options.data))]
    config = SamplesConfig(
        side=options.side,
        batch=options.batch,
        steps=options.steps,
        latents=LatentsConfig(seed=options.latents_seed),
    )
    logger.info(
        "wrote %s", make_samples(pictures, options.latents, options.unet, options.out, config, options.precision)
    )


if __name__ == "__main__":
    main()
