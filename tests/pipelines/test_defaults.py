"""Defaults of a model: read, refused, used and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from latent_tiles import LatentTiledUpscalePipeline, Tiling
from latent_tiles.errors import DefaultsError
from latent_tiles.pipelines.defaults import FILE_NAME, ModelDefaults, parse_defaults
from latent_tiles.pipelines.hosts import host_of, supported_hosts

OWN = {
    "schema": 1,
    "tile": 64,
    "overlap": 32,
    "memory": "pin",
    "scale": 3.0,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "image_guidance_scale": 1.2,
    "validated_untiled_latent": 96,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.host_pipeline("StableDiffusionInstructPix2PixPipeline").save_pretrained(tmp_path)
    return tmp_path


def test_a_models_own_defaults_are_used_where_nothing_is_said(folder: Path) -> None:
    (folder / FILE_NAME).write_text(json.dumps(OWN))
    pipe = LatentTiledUpscalePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = pipe(torch.rand(3, 32, 40), seed=1).report.settings
    expected = {name: OWN[name] for name in OWN if name not in ("schema", "validated_untiled_latent")}
    assert {name: settings[name] for name in expected} == expected
    chosen = pipe(
        torch.rand(3, 32, 40), scale=2, num_inference_steps=1, tiling=Tiling(tile=32, memory="none"), seed=1
    ).report
    assert chosen.output_size == (64, 80)
    assert chosen.settings["num_inference_steps"] == 1
    assert chosen.settings["memory"] == "none"
    assert chosen.settings["tile"] == 32
    # The model's overlap of 32 px leaves a tile of 32 px no room: an eighth of the tile instead.
    assert chosen.settings["overlap"] == 4


def test_defaults_travel_with_save_and_from_pipe(folder: Path, tmp_path: Path) -> None:
    (folder / FILE_NAME).write_text(json.dumps(OWN))
    pipe = LatentTiledUpscalePipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / FILE_NAME).read_text()) == OWN
    import diffusers

    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    for source in (pipe, stock):
        assert LatentTiledUpscalePipeline.from_pipe(source).tile_defaults == pipe.tile_defaults


def test_without_a_file_the_tile_is_the_size_the_model_was_trained_at(folder: Path) -> None:
    defaults = LatentTiledUpscalePipeline.from_pretrained(folder).tile_defaults
    assert (defaults.tile, defaults.overlap) == (16 * 8, 16)
    assert defaults.memory == "none"


@pytest.mark.parametrize("name", supported_hosts())
def test_every_host_has_a_table(name: str) -> None:
    table = host_of(name).table
    assert table.num_inference_steps
    assert table.guidance_scale
    assert 0 < table.overlap < table.tile


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("[]", 'expected an object with "schema": 1'),
        ('{"schema": 2, "tile": 64, "overlap": 8}', 'expected an object with "schema": 1'),
        ('{"schema": 1, "overlap": 8}', "tile is missing"),
        ('{"schema": 1, "tile": 64}', "overlap is missing"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "tyle": 3}', r"unknown settings \['tyle'\]; known are"),
        ('{"schema": 1, "tile": "64", "overlap": 8}', "tile has the wrong type, got '64'"),
        ('{"schema": 1, "tile": true, "overlap": 8}', "tile has the wrong type, got True"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "memory": 3}', "memory has the wrong type, got 3"),
        ('{"schema": 1, "tile": 64, "overlap": 64}', "overlap 64 px is not below"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "scale": 0}', "scale must be between 1 and inf, got 0"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "scale": null}', "scale has the wrong type, got None"),
        ('{"schema": 1, "tile": null, "overlap": 8}', "tile has the wrong type, got None"),
        ('{"schema": 1, "tile": 512.0, "overlap": 8}', "tile has the wrong type, got 512.0"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "memory": "elephant"}', "unknown memory 'elephant'"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "strength": 7}', "strength must be between 0 and 1, got 7"),
        ('{"schema": 1, "tile": 64, "overlap": 8, "num_inference_steps": 2.5}', "has the wrong type, got 2.5"),
    ],
)
def test_bad_files_are_refused(text: str, match: str) -> None:
    with pytest.raises(DefaultsError, match=match):
        parse_defaults(text)


def test_a_round_trip_through_a_file(tmp_path: Path) -> None:
    defaults = ModelDefaults(tile=512, overlap=64, num_inference_steps=8, strength=0.4)
    defaults.save(tmp_path)
    assert parse_defaults((tmp_path / FILE_NAME).read_text()) == defaults


def test_a_bad_file_stops_loading(folder: Path) -> None:
    (folder / FILE_NAME).write_text("{}")
    with pytest.raises(DefaultsError, match="schema"):
        LatentTiledUpscalePipeline.from_pretrained(folder)


def test_defaults_of_a_hub_model_come_from_its_snapshot(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The hub's cache layout, made by hand: what a download leaves behind is read without a network."""
    (folder / FILE_NAME).write_text(json.dumps(OWN))
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder, target_is_directory=True)
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    pipe = LatentTiledUpscalePipeline.from_pretrained("somebody/tiny", **options)
    assert pipe.tile_defaults.scale == 3.0
    (folder / FILE_NAME).unlink()
    assert LatentTiledUpscalePipeline.from_pretrained("somebody/tiny", **options).tile_defaults.scale == 2.0
