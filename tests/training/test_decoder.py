"""The last two stages: samples of the denoiser, and the decoder that learns from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_tiny import LATENTS, UNET, UNET_BATCHES, VAE, fresh_accelerator, loop, make_pictures

from training.adversary import PatchDiscriminator, hinge_losses
from training.decoder import DecoderConfig, DecoderObjective, carry_discriminator, decoder_batches
from training.errors import CheckpointError, TrainingConfigError, TrainingDataError
from training.latents import LatentPool, encode_round
from training.loop import fit, load_ema
from training.samples import SamplesConfig, make_samples
from training.text import build_text_encoder, build_tokenizer
from training.unet import UnetObjective, build_unet, unet_batches
from training.vae import VaeLossConfig, VaeObjective, build_vae, encode_mode, load_vae, vae_batches

SAMPLES = SamplesConfig(side=12, batch=2, steps=2, latents=LATENTS)
DECODER = DecoderConfig(side=12, margin=2, sampled=2, clean=2)


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


def _train(
    runs: Path, out: Path, steps: int, stop_after: int | None = None, config: DecoderConfig = DECODER
) -> dict[str, float]:
    torch.manual_seed(0)
    objective = DecoderObjective(load_vae(runs / "vae"), config)
    batches = decoder_batches(runs / "samples", config, seed=0)
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


@pytest.mark.parametrize("adversarial", [0.0, 0.05])
def test_decoder_learns_and_leaves_the_encoder_alone(tmp_path: Path, runs: Path, adversarial: float) -> None:
    """A few steps lower the distance to the truth; only the decoder changes."""
    config = replace(DECODER, adversarial=adversarial)
    start = _train(runs, tmp_path / "start", 2, config=config)
    end = _train(runs, tmp_path / "end", 60, config=config)
    assert end["l1"] < 0.8 * start["l1"]
    before, after = (load_vae(folder).state_dict() for folder in (runs / "vae", tmp_path / "end"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder"}


@pytest.mark.parametrize(("sampled", "clean"), [(0, 2), (2, 0)])
def test_either_kind_of_crop_may_be_absent(runs: Path, sampled: int, clean: int) -> None:
    """The decoder learns from clean crops alone, or from the denoiser's alone."""
    config = replace(DECODER, sampled=sampled, clean=clean)
    batch = decoder_batches(runs / "samples", config, seed=0)(0)
    assert set(batch) == ({"clean"} if clean else {"latents", "images"})
    losses = DecoderObjective(load_vae(runs / "vae"), config)(batch, torch.Generator().manual_seed(0), 0.5)
    assert torch.isfinite(losses["loss"])


def test_what_is_cut_off_does_not_count(runs: Path) -> None:
    """Wrong pixels in the margin of the denoiser's crops leave the loss as it is; wrong pixels inside raise it."""
    config = replace(DECODER, clean=0, adversarial=0.0)
    objective, batch = DecoderObjective(load_vae(runs / "vae"), config), decoder_batches(runs / "samples", config, 0)(0)

    def loss(images: torch.Tensor) -> float:
        with torch.no_grad():
            return float(objective({**batch, "images": images}, torch.Generator().manual_seed(0), 0.0)["loss"])

    border, inside = batch["images"].clone(), batch["images"].clone()
    border[..., :8, :] = 255 - border[..., :8, :]
    inside[..., 8:12, 8:-8] = 255 - inside[..., 8:12, 8:-8]
    assert loss(border) == loss(batch["images"])
    assert loss(inside) > 1.05 * loss(batch["images"])


def test_each_side_of_the_discriminator_has_its_own_gradients() -> None:
    """The generator's loss moves only what made the picture, the discriminator's only the discriminator."""
    torch.manual_seed(0)
    discriminator, real = PatchDiscriminator(8), torch.rand(2, 3, 24, 24)
    fake = torch.rand(2, 3, 24, 24, requires_grad=True)
    generator_loss, discriminator_loss = hinge_losses(discriminator, fake, real)
    generator_loss.backward(retain_graph=True)
    assert fake.grad is not None
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    fake.grad = None
    discriminator_loss.backward()
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_decoder_resumes_exactly(tmp_path: Path, runs: Path) -> None:
    """Five steps equal two, an interruption, and three."""
    _train(runs, tmp_path / "whole", 5)
    _train(runs, tmp_path / "parts", 5, stop_after=2)
    _train(runs, tmp_path / "parts", 5)
    whole, parts = (load_ema(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_an_earlier_discriminator_is_carried_on(tmp_path: Path, runs: Path) -> None:
    """A second sitting of this stage has the first one's discriminator; a source without one changes nothing."""
    _train(runs, tmp_path / "first", 3)
    objective = DecoderObjective(load_vae(runs / "vae"), DECODER)
    fresh = {key: value.clone() for key, value in objective.discriminator.state_dict().items()}
    carry_discriminator(objective, runs / "vae")
    assert all(torch.equal(value, fresh[key]) for key, value in objective.discriminator.state_dict().items())
    carry_discriminator(objective, tmp_path / "first")
    trained = load_file(tmp_path / "first" / "checkpoint" / "model.safetensors")
    for key, value in objective.discriminator.state_dict().items():
        assert torch.equal(value, trained[f"discriminator.{key}"])


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
    with pytest.raises(TrainingConfigError, match="sampled is 0 and clean 0 crops"):
        DecoderConfig(sampled=0, clean=0)
    with pytest.raises(TrainingConfigError, match="adversarial_from is 0"):
        DecoderConfig(adversarial_from=0.0)
    with pytest.raises(TrainingConfigError, match="below half the side"):
        DecoderConfig(side=8, margin=4)
