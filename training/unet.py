"""Stage 3: the denoiser and its text encoder, trained together on pairs of latents.

The denoiser sees the noisy latents and, concatenated, the latents of the degraded frame that bicubic interpolation
enlarged; it predicts v (Salimans and Ho 2022, eq. 12) on a cosine schedule whose betas are rescaled to zero terminal
signal (Lin et al. 2023), so that trailing timesteps start from pure noise in training as in use.

Run: `python -m training.unet --latents runs/latents --out runs/unet --minutes 50`
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTokenizer

from .command import add_init_argument, add_loop_arguments, begin, loop_config
from .data import batch_rng
from .errors import CheckpointError, require
from .history import history_of, is_model
from .latents import LatentPool
from .loop import Batch, fit, load_ema
from .text import build_text_encoder, build_tokenizer
from .words import WordConfig, prompt_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UnetConfig:
    """The denoiser's architecture.

    Attributes:
        channels: Of every level; each level after the first halves the size.
        layers: Residual blocks of a level on the way down; one more on the way up.
        attention_levels: How many of the lowest levels attend to themselves and to the text; the middle always does.
        text_width: Channels of the text encoder.
        latent_channels: Of the autoencoder.
        pooled_text: Whether the prompt, pooled, also joins the timestep's embedding, which reaches every level: a
            word that changes the finest detail is otherwise heard at the lowest level only.
    """

    channels: tuple[int, ...] = (48, 64, 96, 160)
    layers: int = 1
    attention_levels: int = 1
    text_width: int = 64
    latent_channels: int = 4
    pooled_text: bool = True

    def __post_init__(self) -> None:
        """Check every setting."""
        require(
            all(width % 16 == 0 for width in self.channels),
            f"channels is {self.channels}; choose multiples of 16 (group norm)",
        )
        require(
            0 <= self.attention_levels < len(self.channels),
            f"attention_levels is {self.attention_levels} of {len(self.channels)} levels; leave the highest without",
        )


@dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """Which timesteps are trained, and how much each counts.

    Attributes:
        sampler_steps: Steps of the sampler in use.
        focus: Share of the crops whose timestep is one that this sampler visits, 0..1; the others are drawn uniformly.
        clean_weight: Largest weight of the error of the implied clean latents. The error of v weights it by one over
            the noise's variance, so that nearly clean latents, where little is left to do, rule the gradient; above
            this limit it counts no more.
    """

    sampler_steps: int = 8
    focus: float = 0.75
    clean_weight: float = 4.0

    def __post_init__(self) -> None:
        """Check every setting."""
        require(self.sampler_steps >= 1, f"sampler_steps is {self.sampler_steps}; choose 1 or more")
        require(0 <= self.focus <= 1, f"focus is {self.focus}; choose 0..1")
        require(self.clean_weight >= 1, f"clean_weight is {self.clean_weight}; choose 1 or more")


@dataclass(frozen=True, kw_only=True)
class UnetBatchConfig:
    """Sizes of the batches.

    Attributes:
        sizes: Triples of height and width in latents and the batch size.
        odds: Relative frequency of each.
        condition_noise: Largest standard deviation of noise on the condition; each crop draws its own.
    """

    sizes: tuple[tuple[int, int, int], ...] = (
        (32, 32, 16),
        (48, 48, 7),
        (64, 64, 4),
        (96, 96, 2),
        (32, 64, 8),
        (64, 32, 8),
        (40, 96, 4),
    )
    odds: tuple[float, ...] = (0.55, 0.12, 0.12, 0.06, 0.05, 0.05, 0.05)
    condition_noise: float = 0.05

    def __post_init__(self) -> None:
        """Check every setting."""
        require(
            len(self.sizes) == len(self.odds) >= 1,
            f"{len(self.sizes)} sizes and {len(self.odds)} odds; give the same number",
        )
        require(min(self.odds) >= 0 < sum(self.odds), f"odds is {self.odds}; choose positive odds")
        require(self.condition_noise >= 0, f"condition_noise is {self.condition_noise}; choose 0 or more")


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of training and of use."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_unet(config: UnetConfig) -> UNet2DConditionModel:
    """A fresh denoiser with 2 * latent_channels inputs: noisy latents, then the frame's."""
    levels = len(config.channels)
    attends = [level >= levels - config.attention_levels for level in range(levels)]
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=2 * config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        norm_num_groups=8,
        cross_attention_dim=config.text_width,
        attention_head_dim=tuple(max(1, width // 32) for width in config.channels),
        addition_embed_type="text" if config.pooled_text else None,
        addition_embed_type_num_heads=4,
    )
    if config.pooled_text:
        # Silent at first, so that weights that were trained without it give what they gave.
        nn.init.zeros_(unet.add_embedding.norm2.weight)
    return unet


def flops_per_latent(unet: UNet2DConditionModel, side: int = 64) -> float:
    """Floating-point operations (two for a multiply-add) of one call per latent pixel."""
    text = torch.zeros(1, 24, unet.config["cross_attention_dim"], device=unet.device, dtype=unet.dtype)
    sample = torch.zeros(1, unet.config["in_channels"], side, side, device=unet.device, dtype=unet.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(sample, 0, text)
    return counter.get_total_flops() / side**2


class UnetObjective(nn.Module):
    """Mean squared error of the predicted v, weighted by the timestep."""

    signal: Tensor
    visited: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        condition_noise: float,
        timesteps: TimestepConfig | None = None,
    ) -> None:
        """Wrap the parts that are trained together."""
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.condition_noise = condition_noise
        self.timesteps = timesteps or TimestepConfig()
        scheduler = build_scheduler()
        scheduler.set_timesteps(self.timesteps.sampler_steps)
        self.register_buffer("signal", scheduler.alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("visited", scheduler.timesteps.clone(), persistent=False)

    def _draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        device = self.signal.device
        strata = torch.rand(1, generator=generator, device=device) + torch.arange(count, device=device) / count
        strata = strata.remainder(1)
        anywhere, visited = (
            (strata * choices).long().clamp(max=choices - 1) for choices in (len(self.signal), len(self.visited))
        )
        focused = torch.rand(count, generator=generator, device=device) < self.timesteps.focus
        return torch.where(focused, self.visited[visited], anywhere)

    def forward(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: "target" and "condition", (batch, channels, height, width) latents, and "tokens", (batch, length).
            generator: Source of timesteps and noise.
            progress: Unused; the objective is the same throughout.

        Returns:
            "loss", "v" without the weights, and "x0", the error of the implied clean latents; float32 scalars.
        """
        target, condition = batch["target"].float(), batch["condition"].float()
        count, device = len(target), target.device
        steps = self._draw_timesteps(count, generator)
        noise = torch.randn(target.shape, generator=generator, device=device)
        strength = torch.rand((count, 1, 1, 1), generator=generator, device=device) * self.condition_noise
        condition = condition + strength * torch.randn(condition.shape, generator=generator, device=device)
        signal = self.signal[steps].view(-1, 1, 1, 1)
        noise_share = (1 - signal.square()).clamp_min(0).sqrt()
        noisy = signal * target + noise_share * noise
        text = self.text_encoder(batch["tokens"]).last_hidden_state
        inputs = torch.cat([noisy, condition], 1).contiguous(memory_format=torch.channels_last)
        predicted = self.unet(inputs, steps, text).sample.float()
        error = (predicted - (signal * noise - noise_share * target)).square().mean((1, 2, 3))
        variance = noise_share.flatten().square()
        weight = (self.timesteps.clean_weight * variance).clamp_max(1)
        return {"loss": (weight * error).mean(), "v": error.mean(), "x0": (error * variance).mean()}


def unet_batches(
    pool: LatentPool, tokenizer: CLIPTokenizer, config: UnetBatchConfig, seed: int
) -> Callable[[int], Batch]:
    """A function from the step to its batch of latent crops and prompt tokens."""
    odds, words = np.asarray(config.odds) / sum(config.odds), WordConfig()

    def make_batch(step: int) -> Batch:
        rng = batch_rng(seed, step)
        height, width, count = config.sizes[int(rng.choice(len(odds), p=odds))]
        crops = [pool.crop((height, width), rng) for _ in range(count)]
        prompts = [prompt_of(said, rng, words) for _, _, said in crops]
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return {
            "target": torch.from_numpy(np.stack([target for target, _, _ in crops])),
            "condition": torch.from_numpy(np.stack([condition for _, condition, _ in crops])),
            "tokens": tokens.input_ids,
        }

    return make_batch


def _shape_of(unet: UNet2DConditionModel) -> UnetConfig:
    config = unet.config
    return UnetConfig(
        channels=tuple(config["block_out_channels"]),
        layers=config["layers_per_block"],
        attention_levels=sum(kind.startswith("CrossAttn") for kind in config["down_block_types"]),
        text_width=config["cross_attention_dim"],
        latent_channels=config["out_channels"],
        pooled_text=config["addition_embed_type"] == "text",
    )


def load_unet(source: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, UnetConfig]:
    """A trained denoiser and text encoder in float32 and evaluation mode, and the denoiser's architecture.

    Args:
        source: Folder of a run (its average is taken), or of an exported model.
    """
    if is_model(source):
        unet = UNet2DConditionModel.from_pretrained(source / "unet").float()
        text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder").float()
        shape = _shape_of(unet)
    else:
        state, facts = load_ema(source)
        settings = dict(facts["settings"]["unet"])
        shape = UnetConfig(**{**settings, "channels": tuple(settings["channels"])})
        unet, text_encoder = build_unet(shape), build_text_encoder(build_tokenizer(), shape.text_width)
        UnetObjective(unet, text_encoder, 0.0).load_state_dict(state)
    for part in (unet, text_encoder):
        part.eval().requires_grad_(False)
    return unet, text_encoder, shape


def start_from(source: Path, *, pooled_text: bool = True) -> tuple[UNet2DConditionModel, CLIPTextModel, UnetConfig]:
    """Trainable copies of a trained denoiser and text encoder, and the architecture.

    Args:
        source: Folder of a run or of an exported model.
        pooled_text: Whether to add the pooled prompt, silent at first, to a denoiser that has none.
    """
    trained, text_encoder, shape = load_unet(source)
    shape = replace(shape, pooled_text=shape.pooled_text or pooled_text)
    unet = build_unet(shape)
    missing, unexpected = unet.load_state_dict(trained.state_dict(), strict=False)
    if unexpected or any(not key.startswith("add_embedding.") for key in missing):
        raise CheckpointError(f"{source} lacks {missing} and has {unexpected} besides; it is another architecture")
    return unet, text_encoder.train().requires_grad_(True), shape


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.unet", description=__doc__.splitlines()[0])
    add_loop_arguments(parser, lr=8e-4)
    parser.add_argument("--latents", required=True, help="folder of the encoded pairs")
    add_init_argument(parser)
    parser.add_argument("--channels", type=int, nargs="+", default=UnetConfig.channels, help="channels of every level")
    parser.add_argument("--layers", type=int, default=UnetConfig.layers)
    parser.add_argument("--batch-factor", type=int, default=1, help="multiply the batch sizes (for a GPU)")
    options = parser.parse_args(arguments)
    begin(options)
    pool = LatentPool(Path(options.latents))
    sizes = tuple((height, width, count * options.batch_factor) for height, width, count in UnetBatchConfig.sizes)
    batches = UnetBatchConfig(sizes=sizes)
    config = loop_config(options)
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    if options.init is None:
        shape = UnetConfig(channels=tuple(options.channels), layers=options.layers, latent_channels=pool.channels)
        unet, text_encoder = build_unet(shape), build_text_encoder(tokenizer, shape.text_width)
    else:
        unet, text_encoder, shape = start_from(options.init)
    logger.info(
        "denoiser: %.2f M parameters, %.3f MFLOP per latent pixel and call; %d pairs",
        sum(parameter.numel() for parameter in unet.parameters()) / 1e6,
        flops_per_latent(unet) / 1e6,
        len(pool),
    )
    timesteps = TimestepConfig()
    objective = UnetObjective(unet, text_encoder, batches.condition_noise, timesteps)
    settings = {
        "stage": "unet",
        "unet": asdict(shape),
        "batches": asdict(batches),
        "timesteps": asdict(timesteps),
        "seed": config.seed,
        "history": history_of(options.init, "unet"),
    }
    fit(objective, unet_batches(pool, tokenizer, batches, config.seed), config, Path(options.out), settings=settings)


if __name__ == "__main__":
    main()
