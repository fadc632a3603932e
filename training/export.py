"""Stage 6: the trained parts as one folder that stock diffusers loads.

Run: `python -m training.export --vae runs/vae --unet runs/unet --decoder runs/decoder --out model`; for a published
model also `--licences`, `--index`, `--metrics` and `--hardware`, which fill the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import nn

from .card import CardFacts, render_card, summarise_sources
from .command import begin
from .errors import require
from .loop import load_ema
from .text import build_tokenizer
from .unet import build_scheduler, flops_per_latent, load_unet
from .vae import load_vae

logger = logging.getLogger(__name__)

COMMANDS = """python -m training.vae --data photos/train-*.tar --out runs/vae --minutes {vae:.0f}
python -m training.latents --data photos/train-*.tar --vae runs/vae --out runs/latents --rounds 2
python -m training.unet --latents runs/latents --out runs/unet --minutes {unet:.0f}
{polish}python -m training.export --vae runs/vae --unet runs/unet {flag}--out model"""
POLISH = """\
python -m training.samples --data photos/train-*.tar --latents runs/latents --unet runs/unet --out runs/samples
python -m training.decoder --vae runs/vae --samples runs/samples --out runs/decoder --minutes {decoder:.0f}
"""


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """The content of `latent_tiles.json`: how the model is best used.

    Attributes:
        schema: Version of this file's layout.
        tile: Side of a tile in output pixels.
        overlap: Overlap of neighbouring tiles in output pixels.
        num_inference_steps: Denoising steps.
        guidance_scale: Text guidance; 1 runs a single branch.
        image_guidance_scale: Image guidance.
        memory: Tile memory.
        scale: Enlargement.
        validated_untiled_latent: Largest latent side at which the untiled pass was validated, or None.
    """

    schema: int = 1
    tile: int = 512
    overlap: int = 64
    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    memory: str = "none"
    scale: float = 4.0
    validated_untiled_latent: int | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        require(
            0 <= self.overlap < self.tile, f"overlap is {self.overlap} px, tile {self.tile} px; choose overlap < tile"
        )
        require(self.num_inference_steps >= 1, f"num_inference_steps is {self.num_inference_steps}; choose 1 or more")


def build_pipeline(vae: Path, unet: Path) -> StableDiffusionInstructPix2PixPipeline:
    """The host pipeline of two finished runs, in float32.

    Args:
        vae: Folder of the autoencoder's run.
        unet: Folder of the denoiser's run.
    """
    denoiser, text_encoder, _ = load_unet(unet)
    return StableDiffusionInstructPix2PixPipeline(
        vae=load_vae(vae),
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=denoiser,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` over every other file of `folder`, in the format of `sha256sum`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in files
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def _millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _facts(pipe: StableDiffusionInstructPix2PixPipeline, vae: Path, unet: Path, options: dict[str, Any]) -> CardFacts:
    (_, vae_run), (_, unet_run) = load_ema(vae), load_ema(unet)
    channels = tuple(pipe.unet.config["block_out_channels"])
    factor = pipe.vae_scale_factor
    minutes = {"vae": vae_run["elapsed_s"] / 60, "unet": unet_run["elapsed_s"] / 60, "decoder": 0.0}
    polish = ""
    if options["decoder"]:
        _, decoder_run = load_ema(options["decoder"])
        minutes["decoder"] = decoder_run["elapsed_s"] / 60
        polish = (
            f" Then the decoder alone {minutes['decoder']:.0f} minutes ({decoder_run['step']} steps) on latents that"
            " the denoiser makes of the training pairs, mixed with clean ones."
        )
    training = (
        f"On {options['hardware']}, bfloat16 autocast: the autoencoder {minutes['vae']:.0f} minutes"
        f" ({vae_run['step']} steps), the denoiser with its text encoder {minutes['unet']:.0f} minutes"
        f" ({unet_run['step']} steps; latent crops of 32 to 96 a side, square and not)."
        f"{polish} AdamW, learning rate warmed up and annealed by a cosine, averaged weights."
    )
    values = {
        "steps": options["defaults"].num_inference_steps,
        "vae_class": type(pipe.vae).__name__,
        "factor": factor,
        "latent_channels": pipe.vae.config["latent_channels"],
        "vae_millions": _millions(pipe.vae),
        "channels": channels,
        "mflop": flops_per_latent(pipe.unet) / 1e6,
        "unet_millions": _millions(pipe.unet),
        "tokens": len(pipe.tokenizer),
        "text_millions": _millions(pipe.text_encoder),
        "multiple": factor * 2 ** (len(channels) - 1),
    }
    commands = COMMANDS.format(
        vae=minutes["vae"],
        unet=minutes["unet"],
        polish=POLISH.format(decoder=minutes["decoder"]) if polish else "",
        flag="--decoder runs/decoder " if polish else "",
    )
    metrics = options["metrics"].read_text() if options["metrics"] else "Not measured yet.\n"
    licences, index = options["licences"], options["index"]
    data = summarise_sources(licences, index) if licences and index else "Not stated.\n"
    return CardFacts(values=values, training=training, commands=commands, metrics=metrics, data=data)


def export(vae: Path, unet: Path, out: Path, **options: Any) -> Path:
    """Write the model folder.

    Args:
        vae: Folder of the autoencoder's run.
        unet: Folder of the denoiser's run.
        out: Folder to write; replaced if it exists.
        **options: `defaults` (ModelDefaults), `metrics`, `licences` and `index` (paths or None), `hardware`
            (words), `decoder` (folder of the decoder's run, whose autoencoder is then taken, or None).

    Returns:
        `out`, with float16 weights (the text encoder: float32), `latent_tiles.json`, `MODEL_CARD.md`, `CREDITS.md` if
        the licences are given, and `SHA256SUMS`.
    """
    options = {
        "defaults": ModelDefaults(),
        "metrics": None,
        "licences": None,
        "index": None,
        "hardware": "CPU",
        "decoder": None,
        **options,
    }
    pipe = build_pipeline(options["decoder"] or vae, unet)
    card = render_card(_facts(pipe, vae, unet, options))
    if out.exists():
        shutil.rmtree(out)
    pipe.vae.to(torch.float16)
    pipe.unet.to(torch.float16)
    # The text encoder stays in float32: transformers loads the stored type, diffusers float32, and they must agree.
    pipe.save_pretrained(out, safe_serialization=True)
    (out / "latent_tiles.json").write_text(json.dumps(asdict(options["defaults"]), indent=2) + "\n")
    (out / "MODEL_CARD.md").write_text(card)
    if options["licences"]:
        shutil.copyfile(options["licences"], out / "CREDITS.md")
    write_checksums(out)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    return out


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder's run")
    parser.add_argument("--unet", type=Path, required=True, help="folder of the denoiser's run")
    parser.add_argument("--decoder", type=Path, help="folder of the decoder's run, if there was one")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write; replaced if it exists")
    parser.add_argument("--licences", type=Path, help="Markdown of the photographs' sources")
    parser.add_argument("--index", type=Path, help="CSV of the crops")
    parser.add_argument("--metrics", type=Path, help="Markdown of measurements for the card")
    parser.add_argument("--hardware", default="CPU", help="what the model was trained on, in words")
    parser.add_argument("--validated-untiled-latent", type=int, help="largest latent side validated without tiles")
    options = parser.parse_args(arguments)
    begin(options)
    values = vars(options)
    defaults = ModelDefaults(validated_untiled_latent=values.pop("validated_untiled_latent"))
    out = export(values.pop("vae"), values.pop("unet"), values.pop("out"), defaults=defaults, **values)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    logger.info("wrote %s, %.1f MB", out, size / 1e6)


if __name__ == "__main__":
    main()
