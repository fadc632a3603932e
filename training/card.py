"""MODEL_CARD.md: what the model is, what it was trained on, what it measures and what it cannot do."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TrainingDataError
from .words import WORDS

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [super-resolution, restoration, latent-diffusion]
---
# Reference model of latent-tiles

A small latent diffusion model that restores and enlarges photographs. It is loaded by stock diffusers as
`StableDiffusionInstructPix2PixPipeline`: the frame, enlarged by bicubic interpolation, is encoded, its latents are
concatenated to the noisy ones, and {steps} DDIM steps at guidance 1 give the latents of a clean, sharp photograph. It was
made so that everything that latent-tiles claims about tiles can be shown offline; it is no rival of large models.

| part | what | parameters |
|---|---|---|
| autoencoder | {vae_class}, {factor} pixels a latent, {latent_channels} channels, no attention | {vae_millions:.2f} M |
| denoiser | UNet2DConditionModel {channels}, attention at the lowest level, {mflop:.2f} MFLOP per latent pixel and call | {unet_millions:.2f} M |
| text | two-layer CLIP encoder, {tokens} tokens | {text_millions:.2f} M |

Latents have about zero mean and unit variance, `scaling_factor` is 1. The prediction is v on a cosine schedule of zero
terminal signal with trailing timesteps.

## Words
The empty prompt is the default: a clean, natural, sharp photograph. {words}
"denoise" and "remove jpeg artifacts" announce a much worse input than usual; "film grain" and "soft" change the target.
Words can be joined by commas; others are ignored as well as so small a model can.
How far they do stands under "Measured".

## Use
```python
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=torch.float32)
small = Image.open("photo.png").convert("RGB")
frame = small.resize((4 * small.width, 4 * small.height), Image.Resampling.BICUBIC)
result = pipe(prompt="", image=frame, num_inference_steps={steps}, guidance_scale=1.0, image_guidance_scale=1.0).images[0]
```
Sides of the frame should be multiples of {multiple} pixels.

## Training
{training}

Degradation of the inputs: optical blur (sigma 0.2-0.7 reduced pixels), area, bicubic or Lanczos reduction by 1.5-4 or none,
sensor noise up to 4/255 and JPEG of quality 75-97, each in part of the pairs; noise up to 20/255 and quality down to 20
where a word announces it. Commands:

```
{commands}
```

## Measured
{metrics}

## Data, licences and credits
{data}
`CREDITS.md` in this folder names every photograph, its author where known, and its licence. No photograph is part of this
folder. Of CC BY and CC BY-SA works: crops were downscaled, cropped, turned and degraded for training.

## Limits
- Trained for {hours:.1f} hours in all on a small set: regular fine structure (text, grids, weaves) can come out scrambled, faces at
  very small scale are not restored, and texture is plausible rather than true. Do not use it where detail is evidence.
- The autoencoder bounds what can be kept; a frame that is sharp already loses a little by the round trip.
- Degradations stronger than those above, motion blur, and drawings were not trained.
"""  # noqa: E501 (rows of Markdown tables cannot be wrapped)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card's text is filled with.

    Attributes:
        values: The numbers of the template's table.
        training: Sentences about hardware, time and steps.
        commands: Shell commands, one a line.
        metrics: Markdown of the measurements.
        data: Markdown of the sources.
    """

    values: dict[str, Any]
    training: str
    commands: str
    metrics: str
    data: str


def summarise_sources(licences: Path, index: Path) -> str:
    """The photographs' sources as a table: repository, licence, training photographs and crops.

    Args:
        licences: Markdown with one `## repository` section each: the licence's paragraph, then a `Files:` line.
        index: CSV with the columns `shard` and `repo`, a row a crop.

    Returns:
        Markdown.

    Raises:
        TrainingDataError: If the file has no such section.
    """
    with index.open(newline="") as handle:
        crops = Counter(row["repo"] for row in csv.DictReader(handle) if row["shard"].startswith("train"))
    pattern = re.compile(r"^## (\S+)\n+(.+?)\n+Files: \d+ \((.*?)\)", re.MULTILINE | re.DOTALL)
    sections = pattern.findall(licences.read_text())
    if not sections:
        raise TrainingDataError(
            f"{licences} has no section `## repository` with a `Files:` line; pass the sources' list"
        )
    rows = ["| source repository | licence | photographs | crops |", "|---|---|---|---|"]
    photographs = 0
    for repository, licence, counts in sections:
        found = re.search(r"train (\d+)", counts)
        if found is None or not crops[repository]:
            continue
        photographs += int(found.group(1))
        text = " ".join(licence.split()).replace("|", "/")
        rows.append(f"| {repository} | {text} | {found.group(1)} | {crops[repository]} |")
    head = f"{sum(crops.values())} crops of {photographs} photographs from {len(rows) - 2} public repositories."
    return f"{head}\n\n" + "\n".join(rows) + "\n"


def render_card(facts: CardFacts) -> str:
    """The text of the card."""
    words = "Words that are meant to steer: " + ", ".join(f'"{word}"' for word in WORDS) + "."
    return TEMPLATE.format(
        **facts.values,
        words=words,
        training=facts.training,
        commands=facts.commands,
        metrics=facts.metrics,
        data=facts.data,
    )
