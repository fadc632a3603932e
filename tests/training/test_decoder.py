"""The last two stages: samples of the denoiser, and the decoder that learns from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_tiny import LATENTS, UNET, UNET_BATCHES, VAE, fresh_accelerator, loop, make_pictures

from training.decoder import DecoderConfig, DecoderObjective, decoder_batches
from training.errors import CheckpointError, TrainingConfigError, TrainingDataError
from training.latents import LatentPool, encode_round
from training.loop import fit, load_ema
from training.samples import SamplesConfig, make_samples
from training.text import build_text_encoder, build_tokenizer
from training.unet import UnetObjective, build_unet, unet_batches
from training.vae import VaeLossConfig, VaeObjective, build_vae, encode_mode, load_vae, vae_batches

SAMPLES = SamplesConfig(side=12, batch=2, steps=2, latents=LATENTS)
DECODER = DecoderConfig(side=12, margin=2, batch=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder and a denoiser of a few steps, a round of latents, and samples."""
    folder = tmp_path_factory.mktemp("runs")
    fresh_accelerator()
    torch.manual_seed(0)
    losses = VaeLossConfig(crops=((16, 4),), crop_odds=(1.0,))
    batches = vae_batches(make_pictures(), losses, seed=0)
    fit(VaeObjective(build_vae(VAE), losses), batches, loop(10), folder / "vae", settings={"vae": vars(VAE)})
    accelerator = Accelerator(mixed_precision="no")
    encode_round(make_pictures(), load_vae(folder / "vae"), folder / "latents", 0, LATENTS, accelerator)
    tokenizer = build_tokenizer()
    objective = UnetObjective(build_unet(UNET), build_text_encoder(tokenizer, UNET.text_width), 0.0)
    pairs = unet_batches(LatentPool(folder / "latents"), tokenizer, UNET_BATCHES, seed=0)
    fit(objective, pairs, loop(3), folder / "unet", settings={"unet": vars(UNET)})
    make_samples(make_pictures(), folder / "latents", folder / "unet", folder / "samples", SAMPLES, "no")
    return folder


def _train(runs: Path, out: Path, steps: int, stop_after: int | None = None) -> dict[str, float]:
    objective = DecoderObjective(load_vae(runs / "vae"), DECODER)
    batches = decoder_batches(runs / "samples", DECODER, seed=0)
    return fit(objective, batches, loop(steps), out, settings={"vae": vars(VAE)}, stop_after=stop_after)


def test_samples_stand_beside_their_targets(tmp_path: Path, runs: Path) -> None:
    """Clean latents are those of the pool, the pixels decode them, and a second run gives the same samples."""
    sampled, clean, pixels = (np.load(runs / "samples" / f"{name}.npy") for name in ("sampled", "clean", "pixels"))
    assert sampled.shape == clean.shape == (4, 4, 12, 12)
    assert pixels.shape == (4, 48, 48, 3)
    stored = np.load(runs / "latents" / "round-000" / "target.npy")
    windows = np.lib.stride_tricks.sliding_window_view(stored[0], (12, 12), axis=(1, 2))
    assert (windows == clean[0][:, None, None]).all((0, 3, 4)).any()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    distance = (encode_mode(load_vae(runs / "vae"), images)[:, None] - torch.from_numpy(clean)[None]).abs()
    distance = distance[..., 3:-3, 3:-3].mean((2, 3, 4))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]
    assert distance.diagonal().max() < 0.25 * distance.mean()
    again = make_samples(make_pictures(), runs / "latents", runs / "unet", tmp_path / "again", SAMPLES, "no")
    assert np.array_equal(np.load(again / "sampled.npy"), sampled)


def test_decoder_learns_and_leaves_the_encoder_alone(tmp_path: Path, runs: Path) -> None:
    """A few steps lower the loss; only the decoder changes."""
    start = _train(runs, tmp_path / "start", 2)
    end = _train(runs, tmp_path / "end", 60)
    assert end["loss"] < 0.8 * start["loss"]
    before, after = load_ema(runs / "vae")[0], load_ema(tmp_path / "end")[0]
    changed = {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder"}


def test_decoder_resumes_exactly(tmp_path: Path, runs: Path) -> None:
    """Five steps equal two, an interruption, and three."""
    _train(runs, tmp_path / "whole", 5)
    _train(runs, tmp_path / "parts", 5, stop_after=2)
    _train(runs, tmp_path / "parts", 5)
    whole, parts = (load_ema(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_missing_or_unfit_samples_are_refused(tmp_path: Path, runs: Path) -> None:
    """Each message says what to do."""
    with pytest.raises(CheckpointError, match="has no samples"):
        decoder_batches(tmp_path, DECODER, seed=0)
    with pytest.raises(TrainingDataError, match="the samples hold 12"):
        decoder_batches(runs / "samples", DecoderConfig(side=13), seed=0)
    with pytest.raises(CheckpointError, match="does not exist"):
        make_samples(make_pictures(), tmp_path, runs / "unet", tmp_path / "out", SAMPLES, "no")
    with pytest.raises(TrainingDataError, match="holds 4 pairs of 3 photographs"):
        make_samples(make_pictures(3), runs / "latents", runs / "unet", tmp_path / "out", SAMPLES, "no")
    with pytest.raises(TrainingConfigError, match="sampled is 2"):
        DecoderConfig(sampled=2.0)
    with pytest.raises(TrainingConfigError, match="below half the side"):
        DecoderConfig(side=8, margin=4)
