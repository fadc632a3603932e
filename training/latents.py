"""Stage 2: pairs of latents, encoded once, from which the denoiser's stage cuts its crops.

The encoder costs several times what the denoiser costs per latent pixel; encoding each photograph a few times, with
fresh degradations and turns, and cutting many crops out of the result makes training on a CPU possible at all.

Run: `python -m training.latents --data photos/train-*.tar --vae runs/vae --out runs/latents --rounds 2`
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from .command import add_data_argument, add_machine_arguments, begin
from .data import CropConfig, Pixels, batch_rng, expand, random_crop, read_pictures
from .degrade import DegradeConfig, degrade
from .errors import CheckpointError, TrainingDataError, require
from .vae import encode_mode, load_vae
from .words import WordConfig, degradation_of, draw_words, target_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """How a round of pairs is made.

    Attributes:
        side_px: Side of the square crop that is encoded, in pixels; a multiple of the autoencoder's factor.
        seed: Of crops, degradations and words.
    """

    side_px: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every setting."""
        require(self.side_px >= 8, f"side_px is {self.side_px}; choose 8 or more")


def _to_images(pixels: list[Pixels], device: torch.device) -> Tensor:
    stacked = torch.from_numpy(np.stack(pixels)).to(device)
    return stacked.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def make_pair(
    picture: Pixels, config: LatentsConfig, rng: np.random.Generator, degradation: DegradeConfig, words: WordConfig
) -> tuple[Pixels, Pixels, tuple[str, ...]]:
    """One training pair of a photograph.

    Args:
        picture: (height, width, 3) uint8, at least `side_px` on both sides.
        config: Size of the crop.
        rng: Source of every choice.
        degradation: The mild degradation.
        words: How often words are drawn and how strong they are.

    Returns:
        The target and the degraded input, (side_px, side_px, 3) uint8 each, and the words that hold for the pair.
    """
    crop = random_crop([picture], (config.side_px, config.side_px), rng, CropConfig())
    said = draw_words(rng, words)
    return target_of(crop, said, rng, words), degrade(crop, rng, degradation_of(said, degradation)), said


def encode_round(
    pictures: list[Pixels], vae: nn.Module, out: Path, number: int, config: LatentsConfig, accelerator: Accelerator
) -> Path:
    """Encode every photograph once, with the choices of round `number`, and write `out/round-NNN`.

    Args:
        pictures: (height, width, 3) uint8.
        vae: The trained autoencoder, on the accelerator's device.
        out: Folder of the pool.
        number: Which round; each has its own crops, degradations and words.
        config: Crop size and seed.
        accelerator: Device and autocast.

    Returns:
        The folder of the round: `target.npy` and `condition.npy`, float16 (n, channels, side, side), and `words.json`.
        A round that exists already is left alone.
    """
    folder = out / f"round-{number:03d}"
    if folder.is_dir():
        return folder
    work = folder.with_name(folder.name + ".new")
    work.mkdir(parents=True, exist_ok=True)
    stores: dict[str, NDArray[np.float16]] = {}
    words: list[tuple[str, ...]] = []
    for index, picture in enumerate(pictures):
        target, condition, said = make_pair(
            picture, config, batch_rng(config.seed, number, index), DegradeConfig(), WordConfig()
        )
        with torch.inference_mode(), accelerator.autocast():
            latents = (
                encode_mode(vae, _to_images([target, condition], accelerator.device)).to("cpu", torch.float16).numpy()
            )
        for name, latent in zip(("target", "condition"), latents, strict=True):
            if name not in stores:
                shape = (len(pictures), *latent.shape)
                stores[name] = np.lib.format.open_memmap(work / f"{name}.npy", "w+", np.float16, shape)
            stores[name][index] = latent
        words.append(said)
        if (index + 1) % 100 == 0:
            logger.info("round %d: %d of %d", number, index + 1, len(pictures))
    for store in stores.values():
        store.flush()
    (work / "words.json").write_text(json.dumps(words))
    os.replace(work, folder)
    return folder


class LatentPool:
    """Rounds of encoded pairs, memory-mapped.

    Attributes:
        channels: Latent channels.
        side: Side of the stored squares in latents.
    """

    def __init__(self, folder: Path) -> None:
        """Open every finished round in `folder`."""
        rounds = sorted(path for path in folder.glob("round-*") if path.is_dir() and path.suffix != ".new")
        if not rounds:
            raise CheckpointError(f"{folder} has no round of latents; run `python -m training.latents` first")
        self._targets = [np.load(path / "target.npy", mmap_mode="r") for path in rounds]
        self._conditions = [np.load(path / "condition.npy", mmap_mode="r") for path in rounds]
        self._words = [json.loads((path / "words.json").read_text()) for path in rounds]
        self.channels, self.side = self._targets[0].shape[1], self._targets[0].shape[2]

    def __len__(self) -> int:
        """Number of pairs."""
        return sum(map(len, self._words))

    def crop(
        self, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float16], NDArray[np.float16], tuple[str, ...]]:
        """A random crop of a random pair.

        Args:
            size: (height, width) in latents.
            rng: Source of the choice.

        Returns:
            Target and condition, (channels, height, width) float16, and the words of the pair.

        Raises:
            TrainingDataError: If the crop is larger than the stored squares.
        """
        if max(size) > self.side:
            raise TrainingDataError(
                f"a crop of {size} latents is larger than the stored {self.side}; encode larger ones"
            )
        chosen = int(rng.integers(len(self._words)))
        pair = int(rng.integers(len(self._words[chosen])))
        top, left = (int(rng.integers(self.side - length + 1)) for length in size)
        window = (pair, slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
        return self._targets[chosen][window], self._conditions[chosen][window], tuple(self._words[chosen][pair])


def main(arguments: list[str] | None = None) -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m training.latents", description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--vae", required=True, help="the autoencoder's run, or an exported model")
    parser.add_argument("--out", required=True, help="folder of the pool; rounds that exist are kept")
    parser.add_argument("--rounds", type=int, default=2, help="encodings of every photograph (default: %(default)s)")
    parser.add_argument("--first-round", type=int, default=0, help="number of the first of them")
    parser.add_argument("--side-px", type=int, default=LatentsConfig.side_px)
    parser.add_argument("--seed", type=int, default=0)
    add_machine_arguments(parser)
    options = parser.parse_args(arguments)
    begin(options)
    accelerator = Accelerator(mixed_precision=options.precision)
    vae = load_vae(Path(options.vae)).to(accelerator.device, memory_format=torch.channels_last)
    pictures = [pixels for _, pixels in read_pictures(expand(options.data))]
    config = LatentsConfig(side_px=options.side_px, seed=options.seed)
    for number in range(options.first_round, options.first_round + options.rounds):
        logger.info("wrote %s", encode_round(pictures, vae, Path(options.out), number, config, accelerator))


if __name__ == "__main__":
    main()
