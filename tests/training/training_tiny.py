"""Tiny settings and pictures that the tests of training share."""

import numpy as np
from accelerate.state import AcceleratorState

from training.data import Pixels
from training.latents import LatentsConfig
from training.loop import LoopConfig
from training.unet import UnetBatchConfig, UnetConfig
from training.vae import VaeConfig, VaeLossConfig

VAE = VaeConfig(width=16, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
VAE_LOSS = VaeLossConfig(crops=((16, 4), (32, 2)), crop_odds=(0.5, 0.5), texture_from=0.0)
UNET = UnetConfig(channels=(16, 32), text_width=32)
UNET_BATCHES = UnetBatchConfig(sizes=((8, 8, 4), (8, 12, 2)), odds=(0.7, 0.3))
LATENTS = LatentsConfig(side_px=64)


def loop(total: int, **changes: object) -> LoopConfig:
    """A float32 run of so many steps."""
    values = {"steps": total, "lr": 2e-3, "warmup_steps": 2, "precision": "no", "log_every": 10, **changes}
    return LoopConfig(**values)


def fresh_accelerator() -> None:
    """Forget the precision of the first run, which accelerate keeps for the rest of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def make_pictures(count: int = 4, side: int = 96) -> list[Pixels]:
    """Smooth coloured waves with an edge, different for each picture."""
    rows, columns = np.mgrid[:side, :side] / side
    pictures = []
    for index in range(count):
        waves = [np.sin((3 + index) * rows + (channel + 2) * columns + index) for channel in range(3)]
        picture = 127.5 + 90 * np.stack(waves, -1) + 30 * (columns > 0.5)[..., None]
        pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
    return pictures
