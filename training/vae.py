"""Stage 1: the autoencoder, with latents of about unit variance so that no scaling factor is needed.

InstructPix2Pix does not multiply the image's latents by `scaling_factor`; the encoder itself therefore learns latents
of zero mean and unit variance (a penalty on the channel moments), and `scaling_factor` is 1.

Run: `python -m training.vae --data photos/train-*.tar --out runs/vae --minutes 40`
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from .command import add_data_argument, add_init_argument, add_loop_arguments, begin, loop_config
from .data import CropConfig, Pixels, batch_rng, expand, random_crop, read_pictures
from .errors import require
from .history import history_of, is_model
from .loop import Batch, fit, load_ema

logger = logging.getLogger(__name__)

KINDS = ("tiny", "kl")


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The autoencoder's architecture; it halves the size once per level after the first.

    Attributes:
        kind: "tiny" (AutoencoderTiny, quick to train on a CPU) or "kl" (AutoencoderKL without attention, for a GPU).
        latent_channels: Channels of the latents.
        width: Channels of every level ("tiny") or of the first ("kl").
        encoder_blocks: Residual blocks of each encoder level; their count sets the factor 2 ** (levels - 1).
        decoder_blocks: Residual blocks of each decoder level, lowest resolution first.
    """

    kind: str = "tiny"
    latent_channels: int = 4
    width: int = 48
    encoder_blocks: tuple[int, ...] = (1, 2, 4)
    decoder_blocks: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self) -> None:
        """Check every setting."""
        require(self.kind in KINDS, f"kind is {self.kind!r}; choose one of {KINDS}")
        require(
            len(self.encoder_blocks) == len(self.decoder_blocks) >= 1,
            f"{len(self.encoder_blocks)} encoder and {len(self.decoder_blocks)} decoder levels; give the same number",
        )
        require(self.width % 8 == 0, f"width is {self.width}; choose a multiple of 8 (for group norm)")

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.encoder_blocks) - 1)


@dataclass(frozen=True, kw_only=True)
class VaeLossConfig:
    """Weights of the loss and sizes of the batches.

    Attributes:
        crops: Pairs of the crop side in pixels and the batch size.
        crop_odds: Relative frequency of each pair.
        gradient: Weight of the L1 distance of horizontal and vertical differences.
        texture: Weight of the distance of local Laplacian magnitudes, which keeps the contrast of fine texture.
        texture_from: Progress (0..1) at which the texture term starts.
        moments: Weight of the penalty that keeps every latent channel at zero mean and unit variance.
        latent_noise: Standard deviation of the noise that the decoder must bear.
    """

    crops: tuple[tuple[int, int], ...] = ((64, 16), (128, 4))
    crop_odds: tuple[float, ...] = (0.8, 0.2)
    gradient: float = 0.5
    texture: float = 0.5
    texture_from: float = 0.6
    moments: float = 0.02
    latent_noise: float = 0.02

    def __post_init__(self) -> None:
        """Check every setting."""
        require(
            len(self.crops) == len(self.crop_odds) >= 1,
            f"{len(self.crops)} crops and {len(self.crop_odds)} crop_odds; give the same number",
        )
        require(min(self.crop_odds) >= 0 < sum(self.crop_odds), f"crop_odds is {self.crop_odds}; choose positive odds")
        require(self.latent_noise >= 0, f"latent_noise is {self.latent_noise}; choose 0 or more")


def build_vae(config: VaeConfig) -> AutoencoderTiny | AutoencoderKL:
    """A fresh autoencoder that `encode`s [-1, 1] images to unit-variance latents and `decode`s them back."""
    levels = len(config.encoder_blocks)
    if config.kind == "tiny":
        return AutoencoderTiny(
            latent_channels=config.latent_channels,
            encoder_block_out_channels=(config.width,) * levels,
            decoder_block_out_channels=(config.width,) * levels,
            num_encoder_blocks=config.encoder_blocks,
            num_decoder_blocks=config.decoder_blocks,
            scaling_factor=1.0,
        )
    return AutoencoderKL(
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.width * min(level + 1, 3) for level in range(levels)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=max(config.decoder_blocks[:1]),
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=128,
    )


def freeze_encoder(vae: nn.Module) -> None:
    """Leave only the decoder trainable."""
    vae.requires_grad_(False)
    for name in ("decoder", "post_quant_conv"):
        part = getattr(vae, name, None)
        if part is not None:
            part.requires_grad_(True)


def encode_mode(vae: nn.Module, images: Tensor) -> Tensor:
    """Latents of images as InstructPix2Pix takes them: the code itself, or the posterior's mode.

    Args:
        vae: The autoencoder.
        images: (batch, 3, height, width), [-1, 1].

    Returns:
        (batch, channels, height / factor, width / factor), about unit variance.
    """
    encoded = vae.encode(images)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def _differences(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def _laplacian_magnitude(images: Tensor, window: int = 8) -> Tensor:
    luma = images.mean(1, keepdim=True)
    centre = luma[..., 1:-1, 1:-1]
    around = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
    return nn.functional.avg_pool2d((4 * centre - around).abs(), window, stride=window // 2)


def reconstruction_losses(decoded: Tensor, images: Tensor, *, gradient: float, texture: float) -> dict[str, Tensor]:
    """Distances of decoded images to the truth.

    Args:
        decoded: (batch, 3, height, width), [-1, 1].
        images: The truth, same shape.
        gradient: Weight of the L1 distance of horizontal and vertical differences.
        texture: Weight of the distance of local Laplacian magnitudes; 0 leaves it out.

    Returns:
        "loss", "l1", "psnr" in dB, and "texture" where it counts; float32 scalars.
    """
    pixels = (decoded - images).abs().mean()
    pairs = zip(_differences(decoded), _differences(images), strict=True)
    loss = pixels + gradient * sum((ours - truth).abs().mean() for ours, truth in pairs)
    error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3))
    losses = {"l1": pixels, "psnr": (-10 * torch.log10(error / 4 + 1e-8)).mean()}
    if texture > 0:
        losses["texture"] = (_laplacian_magnitude(decoded) - _laplacian_magnitude(images)).abs().mean()
        loss = loss + texture * losses["texture"]
    return {"loss": loss, **losses}


class VaeObjective(nn.Module):
    """Reconstruction loss of an autoencoder whose latents must have unit moments and bear noise."""

    def __init__(self, vae: nn.Module, config: VaeLossConfig) -> None:
        """Wrap the autoencoder that is trained."""
        super().__init__()
        self.vae = vae
        self.config = config

    def forward(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: "images", (batch, 3, height, width), uint8.
            generator: Source of the latent noise.
            progress: Share of the budget that is used, 0..1.

        Returns:
            "loss" and its parts, and "psnr" in dB; float32 scalars.
        """
        images = batch["images"].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        latents = encode_mode(self.vae, images).float()
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        decoded = self.vae.decode(latents + self.config.latent_noise * noise).sample.float()
        variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
        moments = (mean.square() + variance - 1 - variance.clamp_min(1e-6).log()).mean()
        texture = self.config.texture if progress >= self.config.texture_from else 0.0
        losses = reconstruction_losses(decoded, images, gradient=self.config.gradient, texture=texture)
        return {**losses, "loss": losses["loss"] + self.config.moments * moments, "moments": moments}


def vae_batches(pictures: list[Pixels], config: VaeLossConfig, seed: int) -> Callable[[int], Batch]:
    """A function from the step to its batch of crops, "images" (batch, 3, side, side) uint8."""
    odds = np.asarray(config.crop_odds) / sum(config.crop_odds)

    def make_batch(step: int) -> Batch:
        rng = batch_rng(seed, step)
        side, count = config.crops[int(rng.choice(len(odds), p=odds))]
        crops = [random_crop(pictures, (side, side), rng, CropConfig()) for _ in range(count)]
        return {"images": torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)}

    return make_batch


def _shape_of(vae: nn.Module) -> VaeConfig:
    config = vae.config
    if isinstance(vae, AutoencoderTiny):
        return VaeConfig(
            latent_channels=config["latent_channels"],
            width=config["encoder_block_out_channels"][0],
            encoder_blocks=tuple(config["num_encoder_blocks"]),
            decoder_blocks=tuple(config["num_decoder_blocks"]),
        )
    levels = len(config["block_out_channels"])
    return VaeConfig(
        kind="kl",
        latent_channels=config["latent_channels"],
        width=config["block_out_channels"][0],
        encoder_blocks=(config["layers_per_block"],) * levels,
        decoder_blocks=(config["layers_per_block"],) * levels,
    )


def load_vae(source: Path) -> AutoencoderTiny | AutoencoderKL:
    """A trained autoencoder in float32 and evaluation mode.

    Args:
        source: Folder of a run (its average is taken), or of an exported model.
    """
    return load_vae_with_shape(source)[0]


def load_vae_with_shape(source: Path) -> tuple[AutoencoderTiny | AutoencoderKL, VaeConfig]:
    """A trained autoencoder, as `load_vae` gives it, and its architecture.

    Args:
        source: Folder of a run of this stage or of the decoder's, or of an exported model.
    """
    if is_model(source):
        name = json.loads((source / "model_index.json").read_text())["vae"][1]
        kind = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}[name]
        vae = kind.from_pretrained(source / "vae").float()
        return vae.eval().requires_grad_(False), _shape_of(vae)
    state, facts = load_ema(source)
    settings = dict(facts["settings"]["vae"])
    shape = VaeConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    vae = build_vae(shape)
    vae.load_state_dict({key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")})
    return vae.eval().requires_grad_(False), shape


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.vae", description=__doc__.splitlines()[0])
    add_data_argument(parser)
    add_loop_arguments(parser, lr=1e-3)
    add_init_argument(parser)
    parser.add_argument(
        "--freeze-encoder", action="store_true", help="train the decoder alone, so that latents keep their meaning"
    )
    parser.add_argument("--kind", choices=KINDS, default="tiny")
    parser.add_argument("--width", type=int, default=VaeConfig.width, help="channels (default: %(default)s)")
    parser.add_argument("--latent-channels", type=int, default=VaeConfig.latent_channels)
    parser.add_argument("--batch-factor", type=int, default=1, help="multiply the batch sizes (for a GPU)")
    parser.add_argument("--texture", type=float, default=VaeLossConfig.texture, help="weight of the texture term")
    options = parser.parse_args(arguments)
    begin(options)
    crops = tuple((side, count * options.batch_factor) for side, count in VaeLossConfig.crops)
    losses = VaeLossConfig(crops=crops, texture=options.texture)
    config = loop_config(options)
    torch.manual_seed(config.seed)
    if options.init is None:
        shape = VaeConfig(kind=options.kind, width=options.width, latent_channels=options.latent_channels)
        vae = build_vae(shape)
    else:
        vae, shape = load_vae_with_shape(options.init)
        vae.train().requires_grad_(True)
    if options.freeze_encoder:
        freeze_encoder(vae)
    objective = VaeObjective(vae, losses)
    logger.info("autoencoder: %.2f M parameters", sum(p.numel() for p in objective.parameters()) / 1e6)
    pictures = [pixels for _, pixels in read_pictures(expand(options.data))]
    logger.info("%d pictures", len(pictures))
    settings = {
        "stage": "vae",
        "vae": asdict(shape),
        "loss": asdict(losses),
        "seed": config.seed,
        "freeze_encoder": options.freeze_encoder,
        "history": history_of(options.init, "vae"),
    }
    fit(objective, vae_batches(pictures, losses, config.seed), config, Path(options.out), settings=settings)


if __name__ == "__main__":
    main()
