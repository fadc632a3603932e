"""Stage 5: the decoder alone, on what the denoiser makes, so that its small errors do not show as specks or as blur.

The encoder stays as it is, so that latents keep their meaning; clean crops remain in the mixture, so that the round
trip keeps its quality. A discriminator of patches makes fine texture look like a photograph's.

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
from safetensors.torch import load_file
from torch import Tensor, nn

from .adversary import PatchDiscriminator, hinge_losses
from .command import add_loop_arguments, begin, loop_config
from .data import batch_rng
from .errors import CheckpointError, TrainingDataError, require
from .history import history_of
from .loop import Batch, find_checkpoint, fit
from .vae import encode_mode, freeze_encoder, load_vae_with_shape, reconstruction_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Weights of the loss and sizes of the batches.

    Attributes:
        side: Side of the denoiser's crops in latents.
        margin: Latents at each border of them that do not count: inside a photograph the decoder sees what is cut off.
        sampled: Denoiser's crops of a batch.
        clean: Crops of a batch that the encoder encodes, whole small frames whose borders count; their side is
            `side - 2 * margin`.
        latent_noise: Largest standard deviation of further noise on the latents; each crop draws its own.
        gradient: Weight of the L1 distance of differences.
        texture: Weight of the distance of local Laplacian magnitudes, for clean crops.
        sampled_texture: The same for the denoiser's crops, which lack more of it.
        adversarial: Weight of the discriminator's opinion; 0 trains without one.
        adversarial_from: Progress (0..1) until which that weight grows from 0.
    """

    side: int = 32
    margin: int = 5
    sampled: int = 3
    clean: int = 3
    latent_noise: float = 0.05
    gradient: float = 0.5
    texture: float = 0.5
    sampled_texture: float = 2.0
    adversarial: float = 0.1
    adversarial_from: float = 0.15

    def __post_init__(self) -> None:
        """Check every setting."""
        require(
            min(self.sampled, self.clean) >= 0 < self.sampled + self.clean,
            f"sampled is {self.sampled} and clean {self.clean} crops; choose 0 or more of each, and at least one",
        )
        require(
            0 <= 2 * self.margin < self.side,
            f"margin is {self.margin} latents on both sides, side {self.side}; choose a margin below half the side",
        )
        require(self.latent_noise >= 0, f"latent_noise is {self.latent_noise}; choose 0 or more")
        require(self.adversarial >= 0, f"adversarial is {self.adversarial}; choose 0 or more")
        require(
            0 < self.adversarial_from <= 1, f"adversarial_from is {self.adversarial_from}; choose more than 0, up to 1"
        )


def _as_images(pixels: Tensor) -> Tensor:
    return pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


class DecoderObjective(nn.Module):
    """Pixel loss of the decoder and a discriminator's opinion of it; the encoder is frozen."""

    def __init__(self, vae: nn.Module, config: DecoderConfig) -> None:
        """Take the whole autoencoder and train its decoder."""
        super().__init__()
        self.vae = vae
        self.config = config
        freeze_encoder(vae)
        if config.adversarial > 0:
            self.discriminator = PatchDiscriminator()

    def _decode(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        strength = torch.rand((len(latents), 1, 1, 1), generator=generator, device=latents.device)
        noisy = latents.float() + self.config.latent_noise * strength * noise
        return self.vae.decode(noisy.contiguous(memory_format=torch.channels_last)).sample.float()

    def forward(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: "latents" of the denoiser (sampled, channels, side, side) with "images" (sampled, 3, height, width)
                uint8, and "clean" images (clean, 3, smaller height, smaller width) uint8; either group may be absent.
            generator: Source of the latent noise.
            progress: Share of the budget that is used, 0..1.

        Returns:
            "loss" and its parts; float32 scalars. "psnr" is that of the clean crops where there are any.
        """
        pairs = []
        if "latents" in batch:
            images, decoded = _as_images(batch["images"]), self._decode(batch["latents"], generator)
            cut = self.config.margin * images.shape[-1] // batch["latents"].shape[-1]
            window = slice(cut, images.shape[-1] - cut)
            pairs.append((decoded[..., window, window], images[..., window, window], self.config.sampled_texture))
        if "clean" in batch:
            images = _as_images(batch["clean"])
            with torch.no_grad():
                latents = encode_mode(self.vae, images)
            pairs.append((self._decode(latents, generator), images, self.config.texture))
        parts = [
            (len(truth), reconstruction_losses(ours, truth, gradient=self.config.gradient, texture=texture))
            for ours, truth, texture in pairs
        ]
        total = sum(count for count, _ in parts)
        shared = parts[0][1].keys() & parts[-1][1].keys()
        losses = {key: sum(count * part[key] for count, part in parts) / total for key in sorted(shared)}
        losses["psnr"] = parts[-1][1]["psnr"]
        if self.config.adversarial > 0:
            ours, truth = (torch.cat(side) for side in list(zip(*pairs, strict=True))[:2])
            losses["generator"], losses["discriminator"] = hinge_losses(self.discriminator, ours, truth)
            weight = self.config.adversarial * min(1.0, progress / self.config.adversarial_from)
            losses["loss"] = losses["loss"] + weight * losses["generator"] + losses["discriminator"]
        return losses


def carry_discriminator(objective: DecoderObjective, source: Path) -> None:
    """Go on with the discriminator of an earlier run of this stage, where `source` is one that has it."""
    checkpoint = find_checkpoint(source)
    if checkpoint is None or objective.config.adversarial == 0:
        return
    prefix = "discriminator."
    state = {
        key.removeprefix(prefix): value
        for key, value in load_file(checkpoint / "model.safetensors").items()
        if key.startswith(prefix)
    }
    if state:
        objective.discriminator.load_state_dict(state)


def _turned(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pixels = np.rot90(pixels, int(rng.integers(4)))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


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
    sampled, pixels = (np.load(samples / f"{name}.npy", mmap_mode="r") for name in ("sampled", "pixels"))
    stored, factor = sampled.shape[2], pixels.shape[1] // sampled.shape[2]
    if stored < config.side:
        raise TrainingDataError(f"side is {config.side} latents, the samples hold {stored}; choose a smaller side")

    def cut(rng: np.random.Generator, side: int) -> tuple[int, slice, slice]:
        index = int(rng.integers(len(sampled)))
        rows, columns = (slice(start, start + side) for start in rng.integers(stored - side + 1, size=2).tolist())
        return index, rows, columns

    def pixels_of(index: int, rows: slice, columns: slice) -> np.ndarray:
        ends = [slice(part.start * factor, part.stop * factor) for part in (rows, columns)]
        return pixels[index, ends[0], ends[1]]

    def make_batch(step: int) -> Batch:
        rng = batch_rng(seed, step)
        batch: dict[str, np.ndarray] = {}
        if config.sampled:
            cuts = [cut(rng, config.side) for _ in range(config.sampled)]
            batch["latents"] = np.stack([sampled[index, :, rows, columns] for index, rows, columns in cuts])
            batch["images"] = np.stack([pixels_of(*place) for place in cuts]).transpose(0, 3, 1, 2)
        if config.clean:
            cuts = [cut(rng, config.side - 2 * config.margin) for _ in range(config.clean)]
            batch["clean"] = np.stack([_turned(pixels_of(*place), rng) for place in cuts]).transpose(0, 3, 1, 2)
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}

    return make_batch


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.decoder", description=__doc__.splitlines()[0])
    add_loop_arguments(parser, lr=5e-4)
    parser.add_argument("--vae", type=Path, required=True, help="the run, or exported model, to go on from")
    parser.add_argument("--samples", type=Path, required=True, help="folder of the denoiser's samples")
    for name, of in (("texture", "clean"), ("sampled_texture", "the denoiser's")):
        flag, default = "--" + name.replace("_", "-"), getattr(DecoderConfig, name)
        parser.add_argument(flag, type=float, default=default, help=f"weight of the texture of {of} crops")
    parser.add_argument("--batch", type=int, default=DecoderConfig.sampled, help="crops of either kind in a batch")
    parser.add_argument("--adversarial", type=float, default=DecoderConfig.adversarial, help="0: no discriminator")
    options = parser.parse_args(arguments)
    begin(options)
    shape = DecoderConfig(
        sampled=options.batch,
        clean=options.batch,
        texture=options.texture,
        sampled_texture=options.sampled_texture,
        adversarial=options.adversarial,
    )
    config = loop_config(options)
    torch.manual_seed(config.seed)
    vae, vae_shape = load_vae_with_shape(options.vae)
    objective = DecoderObjective(vae.train(), shape)
    carry_discriminator(objective, options.vae)
    settings = {
        "stage": "decoder",
        "vae": asdict(vae_shape),
        "decoder": asdict(shape),
        "seed": config.seed,
        "history": history_of(options.vae, "decoder"),
    }
    fit(
        objective,
        decoder_batches(options.samples, shape, config.seed),
        config,
        Path(options.out),
        settings=settings,
    )


if __name__ == "__main__":
    main()
