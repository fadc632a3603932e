"""What a camera and the web do to a photograph, mildly: smaller, slightly blurred, noisy, compressed.

The order is that of the real chain: optical blur, reduction, sensor noise, JPEG. The result is enlarged back by
bicubic interpolation, which is the frame that the InstructPix2Pix host is given.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .data import Pixels
from .errors import require

FILTERS = {
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class DegradeConfig:
    """Ranges of the degradation; each (low, high) is drawn uniformly.

    Attributes:
        scale: Reduction factor where it is neither 4 nor 1.
        largest_chance: Share of the pictures that are reduced by the largest factor of `scale`.
        full_size_chance: Share that keeps its size (restoration).
        blur_chance: Share that is blurred before the reduction.
        blur: Gaussian sigma in reduced pixels.
        noise_chance: Share with sensor noise.
        noise: Standard deviation of the noise at mid grey, 0..255.
        jpeg_chance: Share that is compressed.
        jpeg: JPEG quality, 1..100.
    """

    scale: Range = (1.5, 4.0)
    largest_chance: float = 0.5
    full_size_chance: float = 0.15
    blur_chance: float = 0.35
    blur: Range = (0.2, 0.7)
    noise_chance: float = 0.35
    noise: Range = (0.5, 4.0)
    jpeg_chance: float = 0.35
    jpeg: Range = (75.0, 97.0)

    def __post_init__(self) -> None:
        """Check every setting."""
        for name, lowest, highest in (("scale", 1, 16), ("blur", 0, 10), ("noise", 0, 128), ("jpeg", 1, 100)):
            low, high = getattr(self, name)
            require(
                lowest <= low <= high <= highest,
                f"{name} is ({low}, {high}); choose {lowest} <= low <= high <= {highest}",
            )
        for name in ("largest_chance", "full_size_chance", "blur_chance", "noise_chance", "jpeg_chance"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; choose 0..1")
        total = self.largest_chance + self.full_size_chance
        require(total <= 1, f"largest_chance + full_size_chance is {total}; choose 1 or less in all")


def _scale(rng: np.random.Generator, config: DegradeConfig) -> float:
    draw = rng.random()
    if draw < config.largest_chance:
        return config.scale[1]
    if draw < config.largest_chance + config.full_size_chance:
        return 1.0
    return float(rng.uniform(*config.scale))


def add_sensor_noise(picture: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Noise that grows with the square root of the signal, as a sensor's does, partly shared by the channels.

    Args:
        picture: (height, width, 3) uint8.
        sigma: Standard deviation at mid grey, in units of 1/255.
        rng: Source of the noise.

    Returns:
        A noisy picture of the same shape and type.
    """
    height, width = picture.shape[:2]
    signal = picture.astype(np.float32)
    noise = 0.7 * rng.standard_normal((height, width, 3), np.float32)
    noise += 0.714 * rng.standard_normal((height, width, 1), np.float32)
    gain = np.sqrt(0.3 + 0.7 * signal / 127.5)
    return np.clip(np.rint(signal + sigma * gain * noise), 0, 255).astype(np.uint8)


def compress(picture: Pixels, quality: int) -> Pixels:
    """The picture after JPEG compression with 4:2:0 chroma below quality 90, as is usual."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    with Image.open(io.BytesIO(buffer.getvalue())) as decoded:
        return np.asarray(decoded.convert("RGB"))


def degrade(picture: Pixels, rng: np.random.Generator, config: DegradeConfig | None = None) -> Pixels:
    """A degraded picture, enlarged back to its own size by bicubic interpolation.

    Args:
        picture: (height, width, 3) uint8.
        rng: Source of every random choice.
        config: Ranges; the mild defaults if None.

    Returns:
        A (height, width, 3) uint8 picture.
    """
    config = config or DegradeConfig()
    height, width = picture.shape[:2]
    scale = _scale(rng, config)
    image = Image.fromarray(picture)
    if rng.random() < config.blur_chance:
        image = image.filter(ImageFilter.GaussianBlur(scale * float(rng.uniform(*config.blur))))
    if scale > 1:
        small = (max(1, round(width / scale)), max(1, round(height / scale)))
        image = image.resize(small, FILTERS[str(rng.choice(list(FILTERS)))])
    reduced = np.asarray(image)
    if rng.random() < config.noise_chance:
        reduced = add_sensor_noise(reduced, float(rng.uniform(*config.noise)), rng)
    if rng.random() < config.jpeg_chance:
        reduced = compress(reduced, int(rng.uniform(*config.jpeg)))
    if reduced.shape != picture.shape:
        reduced = np.asarray(Image.fromarray(reduced).resize((width, height), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(reduced)
