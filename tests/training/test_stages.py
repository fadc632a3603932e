"""Each stage learns, resumes exactly, and together they give a folder that stock diffusers runs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from training_tiny import LATENTS, UNET, UNET_BATCHES, VAE, VAE_LOSS, fresh_accelerator, loop, make_pictures

from training.card import summarise_sources
from training.data import Pixels
from training.errors import CheckpointError, TrainingConfigError, TrainingDataError
from training.export import ModelDefaults, export
from training.latents import LatentPool, encode_round
from training.loop import LoopConfig, fit, load_ema
from training.text import MAX_LENGTH, build_text_encoder, build_tokenizer
from training.unet import UnetConfig, UnetObjective, build_scheduler, build_unet, flops_per_latent, unet_batches
from training.vae import VaeConfig, VaeLossConfig, VaeObjective, build_vae, encode_mode, load_vae, vae_batches
from training.words import WORDS


def _train_vae(out: Path, config: LoopConfig, stop_after: int | None = None, kind: str = "tiny") -> dict[str, float]:
    torch.manual_seed(0)
    shape = VAE if kind == "tiny" else VaeConfig(kind="kl", width=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
    objective = VaeObjective(build_vae(shape), VAE_LOSS)
    settings = {"vae": vars(shape)}
    batches = vae_batches(make_pictures(), VAE_LOSS, seed=0)
    return fit(objective, batches, config, out, settings=settings, stop_after=stop_after)


def _train_unet(out: Path, pool: LatentPool, config: LoopConfig, stop_after: int | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    objective = UnetObjective(build_unet(UNET), build_text_encoder(tokenizer, UNET.text_width), 0.05)
    batches = unet_batches(pool, tokenizer, UNET_BATCHES, seed=0)
    return fit(objective, batches, config, out, settings={"unet": vars(UNET)}, stop_after=stop_after)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of a few steps and one round of latents of it."""
    folder = tmp_path_factory.mktemp("runs")
    fresh_accelerator()
    _train_vae(folder / "vae", loop(40))
    vae = load_vae(folder / "vae")
    encode_round(make_pictures(), vae, folder / "latents", 0, LATENTS, Accelerator(mixed_precision="no"))
    return folder


def _same(first: Path, second: Path) -> bool:
    (ours, _), (theirs, _) = load_ema(first), load_ema(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_vae_learns(tmp_path: Path, kind: str) -> None:
    """A few steps lower the loss of either kind."""
    start = _train_vae(tmp_path / "start", loop(2), kind=kind)
    end = _train_vae(tmp_path / "end", loop(30), kind=kind)
    assert end["loss"] < 0.8 * start["loss"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_vae_resumes_exactly(tmp_path: Path, precision: str) -> None:
    """Six steps equal two, an interruption, and four."""
    _train_vae(tmp_path / "whole", loop(6, precision=precision))
    _train_vae(tmp_path / "parts", loop(6, precision=precision), stop_after=2)
    assert load_ema(tmp_path / "parts")[1]["step"] == 2
    _train_vae(tmp_path / "parts", loop(6, precision=precision))
    assert _same(tmp_path / "whole", tmp_path / "parts")


def test_unet_learns(tmp_path: Path, runs: Path) -> None:
    """A few steps lower the loss."""
    pool = LatentPool(runs / "latents")
    start = _train_unet(tmp_path / "start", pool, loop(3))
    end = _train_unet(tmp_path / "end", pool, loop(40))
    assert end["loss"] < 0.8 * start["loss"]


def test_unet_resumes_exactly(tmp_path: Path, runs: Path) -> None:
    """Five steps equal three, an interruption, and two, text encoder included."""
    pool = LatentPool(runs / "latents")
    _train_unet(tmp_path / "whole", pool, loop(5))
    _train_unet(tmp_path / "parts", pool, loop(5), stop_after=3)
    _train_unet(tmp_path / "parts", pool, loop(5))
    assert _same(tmp_path / "whole", tmp_path / "parts")
    assert any(key.startswith("text_encoder.") for key in load_ema(tmp_path / "whole")[0])


def test_latents_follow_the_seed_and_are_kept(tmp_path: Path, runs: Path, pictures: list[Pixels]) -> None:
    """Rounds differ from one another, repeat for the same seed, and are not encoded twice."""
    vae, accelerator = load_vae(runs / "vae"), Accelerator(mixed_precision="no")
    first = encode_round(pictures, vae, tmp_path, 0, LATENTS, accelerator)
    other = encode_round(pictures, vae, tmp_path, 1, LATENTS, accelerator)
    again = encode_round(pictures, vae, tmp_path / "again", 0, LATENTS, accelerator)
    targets = [np.load(folder / "target.npy") for folder in (first, other, again)]
    assert targets[0].shape == (4, 4, 16, 16)
    assert np.array_equal(targets[0], targets[2])
    assert not np.array_equal(targets[0], targets[1])
    stamp = (first / "target.npy").stat().st_mtime_ns
    encode_round(pictures, vae, tmp_path, 0, LATENTS, accelerator)
    assert (first / "target.npy").stat().st_mtime_ns == stamp


def test_pool_refuses_what_it_does_not_hold(tmp_path: Path, runs: Path) -> None:
    """An empty folder and crops larger than the stored squares."""
    with pytest.raises(CheckpointError, match="no round of latents"):
        LatentPool(tmp_path)
    pool = LatentPool(runs / "latents")
    assert len(pool) == 4
    with pytest.raises(TrainingDataError, match="larger than the stored 16"):
        pool.crop((8, 17), np.random.default_rng(0))


def test_latents_stay_near_unit_variance(runs: Path, pictures: list[Pixels]) -> None:
    """The moment penalty holds the scale, so that no scaling factor is needed."""
    vae = load_vae(runs / "vae")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert 0.3 < encode_mode(vae, images).std() < 3
    assert vae.config["scaling_factor"] == 1.0


def test_schedule_starts_from_pure_noise() -> None:
    """Trailing timesteps begin at zero terminal signal."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(8)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[999] == 0


def test_default_denoiser_keeps_its_budget() -> None:
    """At most 11 M parameters and 1.2 MFLOP per latent pixel and call."""
    unet = build_unet(UnetConfig())
    assert sum(parameter.numel() for parameter in unet.parameters()) <= 11e6
    assert flops_per_latent(unet) <= 1.2e6


def test_steering_words_are_single_tokens() -> None:
    """The vocabulary knows every word; unknown text becomes letters, and long prompts are cut."""
    tokenizer = build_tokenizer()
    words = " ".join(WORDS).split()
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)
    assert len(tokenizer("xyz").input_ids) == 5
    padded = tokenizer("denoise " * 99, padding="max_length", max_length=MAX_LENGTH, truncation=True)
    assert len(padded.input_ids) == MAX_LENGTH


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VaeConfig(kind="vq"), "kind is 'vq'"),
        (lambda: VaeConfig(encoder_blocks=(1, 1)), "2 encoder and 3 decoder levels"),
        (lambda: VaeConfig(width=10), "multiple of 8"),
        (lambda: VaeLossConfig(crop_odds=(1.0,)), "2 crops and 1 crop_odds"),
        (lambda: UnetConfig(channels=(40, 80)), "multiples of 16"),
        (lambda: UnetConfig(attention_levels=4), "leave the highest without"),
        (lambda: ModelDefaults(tile=64, overlap=64), "overlap < tile"),
    ],
)
def test_impossible_settings_are_refused(make: object, match: str) -> None:
    """Each message names the value and the fix."""
    with pytest.raises(TrainingConfigError, match=match):
        make()


def test_export_loads_in_stock_diffusers(tmp_path: Path, runs: Path) -> None:
    """The folder is complete, its checksums hold, and the unchanged host runs it."""
    pool = LatentPool(runs / "latents")
    _train_unet(tmp_path / "unet", pool, loop(2))
    licences, index = tmp_path / "LICENSES.md", tmp_path / "index.csv"
    licences.write_text("# Sources\n\n## some/photos\n\nCC0 for all.\n\nFiles: 3 (train 2, val 1)\n")
    index.write_text("shard,repo\ntrain-0.tar,some/photos\nval-0.tar,some/photos\n")
    metrics = tmp_path / "metrics.md"
    metrics.write_text("| PSNR | 12 dB |\n")
    folder = export(
        runs / "vae", tmp_path / "unet", tmp_path / "model", licences=licences, index=index, metrics=metrics
    )
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    defaults = json.loads((folder / "latent_tiles.json").read_text())
    assert defaults["schema"] == 1
    assert defaults["num_inference_steps"] == 8
    card = (folder / "MODEL_CARD.md").read_text()
    assert "| some/photos | CC0 for all. | 2 | 1 |" in card
    assert "12 dB" in card
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae_scale_factor == 4
    result = pipe(
        prompt="",
        image=Image.new("RGB", (64, 32), (200, 100, 50)),
        num_inference_steps=2,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
    )
    assert result.images[0].size == (64, 32)


def test_sources_without_sections_are_refused(tmp_path: Path) -> None:
    """A list that cannot be summarised is named."""
    (tmp_path / "L.md").write_text("nothing")
    (tmp_path / "i.csv").write_text("shard,repo\n")
    with pytest.raises(TrainingDataError, match="has no section"):
        summarise_sources(tmp_path / "L.md", tmp_path / "i.csv")
