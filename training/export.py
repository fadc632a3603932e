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
from .history import FILE as TRAINING_FILE
from .history import History, history_of
from .text import build_tokenizer
from .unet import build_scheduler, flops_per_latent, load_unet
from .vae import load_vae

logger = logging.getLogger(__name__)

PHOTOGRAPHS, PAIRS = "--data photos/train-*.tar", "--latents runs/latents"


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
    """The host pipeline of two finished runs, or of exported models' parts, in float32.

    Args:
        vae: Folder of the autoencoder's run, of the decoder's, or of a model.
        unet: Folder of the denoiser's run or of a model.
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


def _commands(history: dict[str, History]) -> str:
    def stage(name: str, inputs: str) -> list[str]:
        sittings = enumerate(history[name])
        return [
            f"python -m training.{name} {'--init model ' if number else ''}{inputs} --out runs/{name}"
            f" --minutes {sitting['minutes']:.0f}"
            for number, sitting in sittings
        ]

    lines = [
        *stage("vae", PHOTOGRAPHS),
        f"python -m training.latents {PHOTOGRAPHS} --vae runs/vae --out runs/latents --rounds 2",
        *stage("unet", PAIRS),
    ]
    if history["decoder"]:
        lines.append(f"python -m training.samples {PHOTOGRAPHS} {PAIRS} --unet runs/unet --out runs/samples")
        lines += [
            f"python -m training.decoder --vae {'model' if number else 'runs/vae'} --samples runs/samples"
            f" --out runs/decoder --minutes {sitting['minutes']:.0f}"
            for number, sitting in enumerate(history["decoder"])
        ]
    decoder = " --decoder runs/decoder" if history["decoder"] else ""
    return "\n".join([*lines, f"python -m training.export --vae runs/vae --unet runs/unet{decoder} --out model"])


def _spent(history: History) -> str:
    minutes, steps = (sum(sitting[key] for sitting in history) for key in ("minutes", "steps"))
    sittings = f" in {len(history)} sittings" if len(history) > 1 else ""
    return f"{minutes:.0f} minutes{sittings} ({steps} steps"


def _facts(
    pipe: StableDiffusionInstructPix2PixPipeline, history: dict[str, History], options: dict[str, Any]
) -> CardFacts:
    channels = tuple(pipe.unet.config["block_out_channels"])
    factor = pipe.vae_scale_factor
    polish = ""
    if history["decoder"]:
        polish = (
            f" Then the decoder alone {_spent(history['decoder'])}) on latents that the denoiser makes of the training"
            " pairs, mixed with clean ones, with a discriminator of patches beside the pixel losses."
        )
    training = (
        f"On {options['hardware']}, bfloat16 autocast: the autoencoder {_spent(history['vae'])}), the denoiser with its"
        f" text encoder {_spent(history['unet'])}; latent crops of 32 to 96 a side, square and not)."
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
        "hours": sum(sitting["minutes"] for part in history.values() for sitting in part) / 60,
        "multiple": factor * 2 ** (len(channels) - 1),
    }
    metrics = options["metrics"].read_text() if options["metrics"] else "Not measured yet.\n"
    licences, index = options["licences"], options["index"]
    data = summarise_sources(licences, index) if licences and index else "Not stated.\n"
    return CardFacts(values=values, training=training, commands=_commands(history), metrics=metrics, data=data)


def export(vae: Path, unet: Path, out: Path, **options: Any) -> Path:
    """Write the model folder.

    Args:
        vae: Folder of the autoencoder's run, or an exported model whose autoencoder is kept.
        unet: Folder of the denoiser's run, or an exported model whose denoiser is kept.
        out: Folder to write; replaced if it exists.
        **options: `defaults` (ModelDefaults), `metrics`, `licences` and `index` (paths or None), `hardware`
            (words), `decoder` (folder of the decoder's run, whose autoencoder is then taken, or None).

    Returns:
        `out`, with float16 weights (the text encoder: float32), `latent_tiles.json`, `training.json` (how long each
        part was trained), `MODEL_CARD.md`, `CREDITS.md` if the licences are given, and `SHA256SUMS`.
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
    history = {
        "vae": history_of(vae, "vae"),
        "unet": history_of(unet, "unet"),
        "decoder": history_of(options["decoder"] or vae, "decoder"),
    }
    card = render_card(_facts(pipe, history, options))
    if out.exists():
        shutil.rmtree(out)
    pipe.vae.to(torch.float16)
    pipe.unet.to(torch.float16)
    # The text encoder stays in float32: transformers loads the stored type, diffusers float32, and they must agree.
    pipe.save_pretrained(out, safe_serialization=True)
    (out / "latent_tiles.json").write_text(json.dumps(asdict(options["defaults"]), indent=2) + "\n")
    (out / TRAINING_FILE).write_text(json.dumps(history, indent=2) + "\n")
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
    parser.add_argument("--vae", type=Path, required=True, help="the autoencoder's run, or an exported model")
    parser.add_argument("--unet", type=Path, required=True, help="the denoiser's run, or an exported model")
    parser.add_argument("--decoder", type=Path, help="folder of the decoder's run, if there was one")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write; replaced if it exists")
    parser.add_argument("--licences", type=Path, help="Markdown of the photographs' sources")
    parser.add_argument("--index", type=Path, help="CSV of the crops")
    parser.add_argument("--metrics", type=Path, help="Markdown of measurements for the card")
    parser.add_argument("--hardware", default="CPU", help="what the model was trained on, in words")
    parser.add_argument("--default-steps", type=int, default=ModelDefaults.num_inference_steps)
    parser.add_argument("--validated-untiled-latent", type=int, help="largest latent side validated without tiles")
    options = parser.parse_args(arguments)
    begin(options)
    values = vars(options)
    defaults = ModelDefaults(
        num_inference_steps=values.pop("default_steps"),
        validated_untiled_latent=values.pop("validated_untiled_latent"),
    )
    out = export(values.pop("vae"), values.pop("unet"), values.pop("out"), defaults=defaults, **values)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    logger.info("wrote %s, %.1f MB", out, size / 1e6)


if __name__ == "__main__":
    main()
