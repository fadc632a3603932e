"""The words that steer the model, and what each of them does to a training pair.

The empty prompt turns a mildly degraded photograph into a clean, sharp one. "denoise" and "remove jpeg artifacts"
announce an input that is much worse than usual, so that the model trusts it less; "film grain" and "soft" change the
target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from .data import Pixels
from .degrade import DegradeConfig
from .errors import require

WORDS = ("denoise", "remove jpeg artifacts", "film grain", "soft")
FILLERS = (
    "a",
    "photo",
    "of",
    "sharp",
    "clean",
    "natural",
    "portrait",
    "landscape",
    "detailed",
    "picture",
    "with",
    "the",
)
"""Words without effect, so that a prompt of other models does no harm."""

HEAVY_NOISE = (6.0, 20.0)
HEAVY_JPEG = (20.0, 60.0)


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    """How often words are drawn.

    Attributes:
        chance: Chance of each word, 0..1, independent of the others.
        drop: Chance that words which announce a bad input are withheld though the input is bad.
        filler_chance: Chance of words without effect.
        grain: Standard deviation of the grain at mid grey, 0..255.
        soft: Gaussian sigma of the soft target in pixels.
    """

    chance: float = 0.14
    drop: float = 0.15
    filler_chance: float = 0.15
    grain: float = 9.0
    soft: float = 1.6

    def __post_init__(self) -> None:
        """Check every setting."""
        for name in ("chance", "drop", "filler_chance"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; choose 0..1")
        require(self.grain >= 0, f"grain is {self.grain}; choose 0 or more")
        require(self.soft >= 0, f"soft is {self.soft}; choose 0 or more")


def draw_words(rng: np.random.Generator, config: WordConfig) -> tuple[str, ...]:
    """The words of one pair, in random order."""
    chosen = [word for word in WORDS if rng.random() < config.chance]
    return tuple(str(word) for word in rng.permutation(chosen))


def prompt_of(words: tuple[str, ...], rng: np.random.Generator, config: WordConfig) -> str:
    """The prompt that a pair of these words is trained with; some are withheld, some fillers are added."""
    said = [w for w in words if w in WORDS[2:] or rng.random() >= config.drop]
    if rng.random() < config.filler_chance:
        fillers = [str(filler) for filler in rng.choice(FILLERS, size=int(rng.integers(1, 4)))]
        said.insert(int(rng.integers(len(said) + 1)), " ".join(fillers))
    return ", ".join(said)


def degradation_of(words: tuple[str, ...], mild: DegradeConfig) -> DegradeConfig:
    """The degradation of the input: the mild one, or worse where a word announces it."""
    if "denoise" in words:
        mild = replace(mild, noise_chance=1.0, noise=HEAVY_NOISE)
    if "remove jpeg artifacts" in words:
        mild = replace(mild, jpeg_chance=1.0, jpeg=HEAVY_JPEG)
    return mild


def target_of(picture: Pixels, words: tuple[str, ...], rng: np.random.Generator, config: WordConfig) -> Pixels:
    """The target of the words: the picture itself, softened or with monochrome grain.

    Args:
        picture: (height, width, 3) uint8.
        words: Of `WORDS`.
        rng: Source of the grain.
        config: Strengths.

    Returns:
        A (height, width, 3) uint8 picture.
    """
    if "soft" in words:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(config.soft)))
    if "film grain" in words:
        height, width = picture.shape[:2]
        grain = rng.standard_normal((height + 2, width + 2), np.float32)
        grain = 0.5 * grain[1:-1, 1:-1] + 0.125 * (
            grain[:-2, 1:-1] + grain[2:, 1:-1] + grain[1:-1, :-2] + grain[1:-1, 2:]
        )
        grain /= np.sqrt(0.25 + 4 * 0.125**2)
        signal = picture.astype(np.float32)
        gain = 0.4 + 2.4 * (signal / 255) * (1 - signal / 255)
        picture = np.clip(np.rint(signal + config.grain * gain * grain[..., None]), 0, 255).astype(np.uint8)
    return picture
