"""Stage 5: the decoder alone, on what the denoiser makes, so that its small errors do not show as specks or as blur.

The encoder stays as it is; clean latents remain in the mixture, so that the round trip keeps its quality.

Run: `python -m training.decoder --vae runs/vae --samples runs/samples --out runs/decoder --minutes 10`
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .command import add_loop_arguments, begin, loop_config
from .data import batch_rng
from .errors import CheckpointError, TrainingDataError, require
from .loop import Batch, fit, load_ema
from .vae import load_vae, reconstruction_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Weights of the loss and sizes of the batches.

    Attributes:
        side: Side of the crops in latents.
        margin: Latents at each border that do not count: inside a photograph the decoder sees what is cut off here.
        batch: Crops of a batch.
        sampled: Share of the crops whose latents come from the denoiser, 0..1; the others are clean.
        latent_noise: Standard deviation of further noise on the latents.
        gradient: Weight of the L1 distance of differences.
        texture: Weight of the distance of local Laplacian magnitudes.
    """

    side: int = 28
    margin: int = 6
    batch: int = 8
    sampled: float = 0.6
    latent_noise: float = 0.02
    gradient: float = 0.5
    texture: float = 0.7

    def __post_init__(self) -> None:
        """Check every setting."""
        require(0 <= self.sampled <= 1, f"sampled is {self.sampled}; choose 0..1")
        require(
            0 <= 2 * self.margin < self.side,
            f"margin is {self.margin} latents on both sides, side {self.side}; choose a margin below half the side",
        )


class DecoderObjective(nn.Module):
    """Pixel loss of the decoder; the encoder is frozen."""

    def __init__(self, vae: nn.Module, config: DecoderConfig) -> None:
        """Take the whole autoencoder and train its decoder."""
        super().__init__()
        self.vae = vae
        self.config = config
        vae.requires_grad_(False)
        for name in ("decoder", "post_quant_conv"):
            part = getattr(vae, name, None)
            if part is not None:
                part.requires_grad_(True)

    def forward(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: "latents" (batch, channels, side, side) and "images" (batch, 3, height, width) uint8.
            generator: Source of the latent noise.
            progress: Unused.

        Returns:
            "loss" and its parts; float32 scalars.
        """
        latents = batch["latents"].float()
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        images = batch["images"].float().div(127.5).sub(1)
        latents = (latents + self.config.latent_noise * noise).contiguous(memory_format=torch.channels_last)
        decoded = self.vae.decode(latents).sample.float()
        cut = self.config.margin * images.shape[-1] // latents.shape[-1]
        if cut:
            decoded, images = (planes[..., cut:-cut, cut:-cut] for planes in (decoded, images))
        return reconstruction_losses(decoded, images, gradient=self.config.gradient, texture=self.config.texture)


def decoder_batches(samples: Path, config: DecoderConfig, seed: int) -> Callable[[int], Batch]:
    """A function from the step to its batch of latents and the pixels that they stand for.

    Args:
        samples: Folder that `training.samples` wrote.
        config: Sizes and shares.
        seed: Of the crops.

    Raises:
        CheckpointError: If the folder has no samples.
        TrainingDataError: If the stored crops are smaller than `config.side`.
    """
    if not (samples / "pixels.npy").is_file():
        raise CheckpointError(f"{samples} has no samples; run `python -m training.samples` first")
    sampled, clean, pixels = (
        np.load(samples / f"{name}.npy", mmap_mode="r") for name in ("sampled", "clean", "pixels")
    )
    stored, factor = clean.shape[2], pixels.shape[1] // clean.shape[2]
    if stored < config.side:
        raise TrainingDataError(f"side is {config.side} latents, the samples hold {stored}; choose a smaller side")

    def make_batch(step: int) -> Batch:
        rng = batch_rng(seed, step)
        latents, images = [], []
        for _ in range(config.batch):
            source = sampled if rng.random() < config.sampled else clean
            index = int(rng.integers(len(source)))
            top, left = (int(rng.integers(stored - config.side + 1)) for _ in range(2))
            rows, columns = (slice(start, start + config.side) for start in (top, left))
            latents.append(source[index, :, rows, columns])
            ends = [slice(part.start * factor, part.stop * factor) for part in (rows, columns)]
            images.append(pixels[index, ends[0], ends[1]])
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return {"latents": torch.from_numpy(np.stack(latents)), "images": stacked}

    return make_batch


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.decoder", description=__doc__.splitlines()[0])
    add_loop_arguments(parser, lr=5e-4)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder's run")
    parser.add_argument("--samples", type=Path, required=True, help="folder of the denoiser's samples")
    parser.add_argument("--texture", type=float, default=DecoderConfig.texture, help="weight of the texture term")
    parser.add_argument("--batch", type=int, default=DecoderConfig.batch)
    options = parser.parse_args(arguments)
    begin(options)
    shape = DecoderConfig(texture=options.texture, batch=options.batch)
    config = loop_config(options)
    objective = DecoderObjective(load_vae(options.vae), shape)
    batches = decoder_batches(options.samples, shape, config.seed)
    vae_settings = load_ema(options.vae)[1]["settings"]["vae"]
    settings = {"stage": "decoder", "vae": vae_settings, "decoder": asdict(shape), "seed": config.seed}
    fit(objective, batches, config, Path(options.out), settings=settings)


if __name__ == "__main__":
    main()
