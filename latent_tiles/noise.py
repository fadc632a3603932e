"""One noise field for the whole frame: noise as a pure function of seed and world position.

The same position gets the same noise whatever the grid, batch, order, device count or crop. The field is keyed by what
the noise is for and, inside a sampler, by the number of the step; never by how many draws came before it, so a run that
is resumed or rendered in parts draws what the whole run would have drawn.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.errors import NoiseError
from latent_tiles.geometry import Box

Purpose = Literal["initial", "posterior", "low_res", "step"]
"""What a draw is for: the sampler's start, the VAE's posterior, the x4 host's low-resolution noise, a solver's step."""

BLOCK = 64
"""Side of the squares that are drawn at once. Part of the definition of the field: changing it changes every result."""

_SEED_LIMIT = 2**64


@dataclass(frozen=True, kw_only=True)
class NoiseField:
    """Standard normal noise on an endless grid of latents.

    Each 64 x 64 block of each channel comes from a Philox counter generator (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3") whose 128-bit key is a hash of seed, purpose, step, item, channel and block position.

    Args:
        seeds: one seed, or one for each item of the batch, each in [0, 2**64).
        origin: world position (top, left) of the canvas's first latent; may be negative. A crop rendered with its
            origin in the frame gets the frame's noise.

    Raises:
        NoiseError: no seed, or one out of range.

    Example:
        >>> whole = NoiseField(seeds=(7,)).sample("initial", items=1, channels=4, box=Box(0, 0, 96, 96))
        >>> crop = NoiseField(seeds=(7,), origin=(32, 40)).sample("initial", items=1, channels=4, box=Box(0, 0, 32, 32))
        >>> bool((whole[:, :, 32:64, 40:72] == crop).all())
        True
    """

    seeds: tuple[int, ...]
    origin: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise NoiseError("a noise field needs at least one seed")
        for seed in self.seeds:
            check_seed(seed)

    def sample(
        self, purpose: Purpose, *, items: int, channels: int, box: Box, step: int = 0
    ) -> Float[Tensor, "items channels height width"]:
        """Noise of a rectangle of the canvas.

        Args:
            purpose: what the draw is for; each purpose has a field of its own.
            items: number of images in the batch; item k uses seed k, or a stream of its own below the last seed.
            channels: number of channels.
            box: rectangle in canvas coordinates.
            step: number of the solver's step, for purpose "step".

        Returns:
            Standard normal noise, float32, on the CPU.

        Raises:
            NoiseError: unknown purpose.
        """
        if purpose not in get_args(Purpose):
            raise NoiseError(f"unknown purpose {purpose!r}; use one of {', '.join(get_args(Purpose))}")
        top, left = box.top + self.origin[0], box.left + self.origin[1]
        noise = np.empty((items, channels, box.height, box.width), dtype=np.float32)
        for item in range(items):
            stream = f"{self.seeds[item % len(self.seeds)]}/{item // len(self.seeds)}/{purpose}/{step}"
            for channel in range(channels):
                for block_row, rows, inner_rows in _cuts(top, box.height):
                    for block_column, columns, inner_columns in _cuts(left, box.width):
                        block = _draw(f"{stream}/{channel}/{block_row}/{block_column}")
                        noise[item, channel, rows, columns] = block[inner_rows, inner_columns]
        return torch.from_numpy(noise)


def check_seed(seed: int) -> int:
    """The seed, if it can be one.

    Raises:
        NoiseError: not a whole number in [0, 2**64).
    """
    try:
        whole = operator.index(seed)
    except TypeError:
        raise NoiseError(f"a seed must be a whole number, got {seed!r}") from None
    if not 0 <= whole < _SEED_LIMIT:
        raise NoiseError(f"seed {whole} is out of range; use 0 to 2**64 - 1")
    return whole


def _cuts(start: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Blocks touched by [start, start + length): block number, where it goes in the result, what part of it."""
    position = 0
    while position < length:
        block, inside = divmod(start + position, BLOCK)
        count = min(BLOCK - inside, length - position)
        yield block, slice(position, position + count), slice(inside, inside + count)
        position += count


def _draw(key: str) -> np.ndarray:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal((BLOCK, BLOCK), dtype=np.float32)
