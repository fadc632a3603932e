"""Each stage learns, resumes exactly, and together they give a folder that stock diffusers runs."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from torch import nn
from training_tiny import LATENTS, UNET, UNET_BATCHES, VAE, VAE_LOSS, fresh_accelerator, loop, make_pictures

from training.card import summarise_sources
from training.data import Pixels
from training.errors import CheckpointError, TrainingConfigError, TrainingDataError
from training.export import ModelDefaults, export
from training.history import history_of
from training.latents import LatentPool, encode_round
from training.loop import LoopConfig, fit, load_ema
from training.text import MAX_LENGTH, build_text_encoder, build_tokenizer
from training.unet import (
    TimestepConfig,
    UnetConfig,
    UnetObjective,
    build_scheduler,
    build_unet,
    flops_per_latent,
    load_unet,
    start_from,
    unet_batches,
)
from training.vae import (
    VaeConfig,
    VaeLossConfig,
    VaeObjective,
    build_vae,
    encode_mode,
    freeze_encoder,
    load_vae,
    load_vae_with_shape,
    vae_batches,
)
from training.vae import main as train_vae
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
        (lambda: TimestepConfig(focus=1.5), "focus is 1.5"),
        (lambda: TimestepConfig(clean_weight=0.5), "clean_weight is 0.5"),
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


def test_each_sitting_goes_on_from_the_last(tmp_path: Path, runs: Path) -> None:
    """Stages begin with an exported model's weights, nothing is lost on the way, and the history grows."""
    pool, tokenizer = LatentPool(runs / "latents"), build_tokenizer()
    torch.manual_seed(0)
    plain = UnetObjective(build_unet(replace(UNET, pooled_text=False)), build_text_encoder(tokenizer, 32), 0.05)
    settings = {"unet": {**vars(UNET), "pooled_text": False}}
    fit(plain, unet_batches(pool, tokenizer, UNET_BATCHES, seed=0), loop(2), tmp_path / "unet", settings=settings)
    first = export(runs / "vae", tmp_path / "unet", tmp_path / "first")
    trained, _, old = load_unet(first)
    unet, text_encoder, new = start_from(first)
    assert (old.pooled_text, new.pooled_text) == (False, True)
    assert new == UNET
    inputs = (torch.randn(1, 8, 8, 8), 500, torch.randn(1, MAX_LENGTH, 32))
    with torch.no_grad():
        assert torch.equal(trained(*inputs).sample, unet.eval()(*inputs).sample)
    assert all(parameter.requires_grad for part in (unet, text_encoder) for parameter in part.parameters())
    settings = {"stage": "unet", "unet": vars(new), "history": history_of(first, "unet")}
    objective = UnetObjective(unet.train(), text_encoder, 0.05)
    batches = unet_batches(pool, tokenizer, UNET_BATCHES, seed=1)
    fit(objective, batches, loop(3), tmp_path / "more", settings=settings)
    second = export(first, tmp_path / "more", tmp_path / "second")
    assert [sitting["steps"] for sitting in history_of(second, "unet")] == [2, 3]
    assert [sitting["steps"] for sitting in history_of(second, "vae")] == [40]
    assert "--init model" in (second / "MODEL_CARD.md").read_text()
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_autoencoder_starts_from_trained_weights(tmp_path: Path, runs: Path, kind: str) -> None:
    """Its shape is read from the exported model; with the encoder frozen, latents keep their meaning."""
    source = runs / "vae"
    if kind == "kl":
        source = tmp_path / "kl"
        _train_vae(source, loop(2), kind=kind)
    _train_unet(tmp_path / "unet", LatentPool(runs / "latents"), loop(1))
    model = export(source, tmp_path / "unet", tmp_path / "model")
    of_run, shape = load_vae_with_shape(source)
    of_model, same = load_vae_with_shape(model)
    assert shape == same
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert (encode_mode(of_run, images) - encode_mode(of_model, images)).abs().max() < 0.02
    freeze_encoder(of_model)
    trainable = {name.split(".")[0] for name, value in of_model.named_parameters() if value.requires_grad}
    assert trainable == ({"decoder"} if kind == "tiny" else {"decoder", "post_quant_conv"})


def test_command_lines_take_the_start(tmp_path: Path, runs: Path, picture_folder: Path) -> None:
    """Both stages run from `--init`, and an unusable folder is refused."""
    _train_unet(tmp_path / "unet", LatentPool(runs / "latents"), loop(1))
    model = export(runs / "vae", tmp_path / "unet", tmp_path / "model")
    common = ["--init", str(model), "--steps", "1", "--precision", "no"]
    train_vae(["--data", str(picture_folder), "--out", str(tmp_path / "v"), "--freeze-encoder", *common])
    before, after = load_vae(model), load_vae(tmp_path / "v")
    for part, same in (("encoder", True), ("decoder", False)):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert all(torch.equal(old, new) for old, new in pairs) == same
    with pytest.raises(CheckpointError, match="neither an exported model nor a run"):
        history_of(tmp_path / "nothing", "unet")


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_timesteps_are_those_of_the_sampler(focus: float) -> None:
    """With full focus only the sampler's timesteps are drawn, evenly; without, all of them."""
    objective = UnetObjective(nn.Identity(), nn.Identity(), 0.0, TimestepConfig(sampler_steps=4, focus=focus))
    drawn = objective._draw_timesteps(1000, torch.Generator().manual_seed(0))
    assert (sorted(set(drawn.tolist())) == [249, 499, 749, 999]) == bool(focus)
    assert 200 < int((drawn < 250).sum()) < 300
    assert len(set(drawn.tolist())) == (4 if focus else 1000)


def test_sources_without_sections_are_refused(tmp_path: Path) -> None:
    """A list that cannot be summarised is named."""
    (tmp_path / "L.md").write_text("nothing")
    (tmp_path / "i.csv").write_text("shard,repo\n")
    with pytest.raises(TrainingDataError, match="has no section"):
        summarise_sources(tmp_path / "L.md", tmp_path / "i.csv")
