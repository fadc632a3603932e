"""Photographs: read from a folder or tar shards, cut into augmented crops.

A crop is a pure function of the random generator that it is given, so that a batch is a pure function of (seed, step)
and a resumed run sees exactly what an uninterrupted one would have seen, whatever the number of loader workers.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import TrainingDataError, require

Pixels = NDArray[np.uint8]
"""A picture, (height, width, 3), sRGB, 0..255."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})


def _is_picture(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _decode(data: bytes, origin: str) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise TrainingDataError(f"{origin} cannot be decoded ({error}); remove it or replace it") from error


def _sources(paths: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and _is_picture(file.name))
            yield from ((file.relative_to(path).as_posix(), file.read_bytes()) for file in files)
        elif path.is_file() and path.suffix == ".tar":
            with tarfile.open(path) as archive:
                for member in archive:
                    handle = archive.extractfile(member) if member.isfile() and _is_picture(member.name) else None
                    if handle is not None:
                        yield member.name, handle.read()
        elif path.is_file() and _is_picture(path.name):
            yield path.name, path.read_bytes()
        else:
            raise TrainingDataError(f"{path} is neither a folder, a .tar shard nor a picture; pass one that exists")


def expand(patterns: list[str]) -> list[Path]:
    """Paths that patterns such as `photos/train-*.tar` stand for, in a stable order.

    Args:
        patterns: Folders, tar shards, pictures, or glob patterns of them.

    Raises:
        TrainingDataError: If a pattern matches nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        magic = any(mark in path.name for mark in "*?[")
        matches = sorted(path.parent.glob(path.name)) if magic else [path]
        if not matches:
            raise TrainingDataError(f"{pattern!r} matches no file; check the folder and the pattern")
        found += matches
    return found


def read_pictures(paths: list[Path], *, limit: int | None = None) -> list[tuple[str, Pixels]]:
    """All pictures of folders and tar shards, decoded, in a stable order.

    They are kept decoded in memory (a 512 px square is 0.75 MiB), which suits sets of a few thousand crops.

    Args:
        paths: Folders (searched recursively), tar shards, or single pictures.
        limit: Stop after so many pictures; None reads all.

    Returns:
        Pairs of the name and the (height, width, 3) uint8 picture.

    Raises:
        TrainingDataError: If a path does not exist, a picture is damaged, or nothing was found.
    """
    pictures: list[tuple[str, Pixels]] = []
    for name, data in _sources(paths):
        if limit is not None and len(pictures) >= limit:
            break
        pictures.append((name, _decode(data, name)))
    if not pictures:
        raise TrainingDataError(f"no picture in {', '.join(map(str, paths))}; expected one of {sorted(SUFFIXES)}")
    return pictures


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How crops are cut and augmented.

    Attributes:
        shrink_chance: Share of the crops that are cut larger and area-averaged down, 0..1, which makes
            soft photographs sharp.
        shrink_max: Largest such reduction, at least 1.
        turn: Whether to turn by quarters; flips are always done left to right.
    """

    shrink_chance: float = 0.25
    shrink_max: float = 2.0
    turn: bool = True

    def __post_init__(self) -> None:
        """Check every setting."""
        require(0 <= self.shrink_chance <= 1, f"shrink_chance is {self.shrink_chance}; choose 0..1")
        require(self.shrink_max >= 1, f"shrink_max is {self.shrink_max}; choose 1 or more")


def random_crop(
    pictures: list[Pixels], size: tuple[int, int], rng: np.random.Generator, config: CropConfig | None = None
) -> Pixels:
    """One augmented crop of a random picture.

    Args:
        pictures: (height, width, 3) uint8 pictures, each at least `size`.
        size: (height, width) of the crop in pixels.
        rng: Source of every random choice.
        config: Augmentation; the defaults if None.

    Returns:
        A contiguous (height, width, 3) uint8 array.

    Raises:
        TrainingDataError: If the chosen picture is smaller than the crop.
    """
    config = config or CropConfig()
    picture = pictures[int(rng.integers(len(pictures)))]
    quarter = int(rng.integers(4)) if config.turn else 0
    height, width = size if quarter % 2 == 0 else size[::-1]
    if picture.shape[0] < height or picture.shape[1] < width:
        raise TrainingDataError(
            f"a picture of {picture.shape[0]}x{picture.shape[1]} px is smaller than the crop of {height}x{width} px;"
            " remove small pictures or train with smaller crops"
        )
    shrink = 1.0
    if config.shrink_max > 1 and rng.random() < config.shrink_chance:
        room = min(picture.shape[0] / height, picture.shape[1] / width, config.shrink_max)
        shrink = float(rng.uniform(1.0, room))
    cut_height, cut_width = round(height * shrink), round(width * shrink)
    top = int(rng.integers(picture.shape[0] - cut_height + 1))
    left = int(rng.integers(picture.shape[1] - cut_width + 1))
    crop = picture[top : top + cut_height, left : left + cut_width]
    if (cut_height, cut_width) != (height, width):
        crop = np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.BOX))
    crop = np.rot90(crop, quarter)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(crop)


def batch_rng(seed: int, *keys: int) -> np.random.Generator:
    """The generator of one batch or picture: a pure function of the run's seed and the keys, such as the step."""
    return np.random.default_rng([seed, *keys])
