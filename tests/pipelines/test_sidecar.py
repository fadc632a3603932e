import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_tiles.errors import FrameFileError
from latent_tiles.frames import Frame, as_picture, read_frame
from latent_tiles.pipelines.report import GridReport, UpscaleReport
from latent_tiles.pipelines.sidecar import (
    ModelIdentity,
    Runtime,
    Source,
    check_sidecar,
    file_sha256,
    identify_model,
    read_sidecar,
    sidecar,
    sidecar_path,
    write_sidecar,
    write_with_sidecar,
)

REPORT = UpscaleReport(
    host="StableDiffusionImg2ImgPipeline",
    source_size=(30, 40),
    output_size=(60, 80),
    grid=GridReport(frame=(64, 80), content=(60, 80), tile=(64, 64), rows=(0,), columns=(0, 16), tiles=2, cost=1.6),
    seeds=(7,),
    settings={"scale": 2.0, "tile": 64, "prompt": ""},
    model_calls=3,
    tiles_run=6,
    seconds={"encode": 0.1, "denoise": 0.2, "decode": 0.3, "total": 0.7},
    vae=(),
    peak_device_mib=None,
    peak_host_mib=512.0,
    nsfw=None,
)
MODEL = ModelIdentity(name="some/model", commit="0" * 40)
RUNTIME = Runtime(device="cpu", dtype="float32", attention="sdpa")


def frame(height: int = 60, width: int = 80) -> Frame:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Frame(picture=as_picture(levels))


def content(**changes: Any) -> dict[str, Any]:
    made = sidecar(REPORT, command="upscale", model=MODEL, source=Source(name="in.png", sha256="ab"), runtime=RUNTIME)
    return {**made, **changes}


def test_content_tells_how_to_repeat_the_run() -> None:
    made = json.loads(json.dumps(content()))
    assert made["schema"] == 1
    assert set(made["versions"]) == {"latent-tiles", "torch", "diffusers", "transformers", "python", "platform"}
    assert made["model"] == {"host": REPORT.host, "name": "some/model", "commit": "0" * 40, "weights": {}}
    assert made["source"] == {"name": "in.png", "sha256": "ab", "size": [30, 40]}
    assert made["settings"] == {"scale": 2.0, "tile": 64, "prompt": ""}
    assert made["seeds"] == [7]
    assert made["grid"]["columns"] == [0, 16]
    assert made["run"]["seconds"] == REPORT.seconds
    assert made["run"]["attention"] == "sdpa"


def test_result_and_sidecar_belong_together(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    written = write_with_sidecar(target, frame(), content())
    assert written["output"] == {"name": "out.png", "sha256": file_sha256(target), "size": [60, 80]}
    assert read_sidecar(target) == json.loads(json.dumps(written))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.png.json"]


@pytest.mark.parametrize("taken", ["out.png", "out.png.json"])
def test_existing_files_are_kept(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(FrameFileError, match=f"{taken} exists already"):
        write_with_sidecar(tmp_path / "out.png", frame(), content())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "mine")]


def test_overwriting_replaces_both(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    write_with_sidecar(target, frame(10, 10), content())
    write_with_sidecar(target, frame(20, 10), content(), overwrite=True)
    assert read_frame(target).picture.size == (20, 10)
    assert (read_sidecar(target) or {})["output"]["sha256"] == file_sha256(target)


def test_nothing_is_left_where_the_sidecar_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_with_sidecar(tmp_path / "out.png", frame(), content(extra=float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(FrameFileError, match="writing failed"):
        write_with_sidecar(tmp_path / "out.png", frame(), content(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_folder_under_the_sidecars_name_is_refused(tmp_path: Path) -> None:
    sidecar_path(tmp_path / "out.png").mkdir()
    with pytest.raises(FrameFileError, match="taken by a folder"):
        check_sidecar(tmp_path / "out.png", overwrite=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FrameFileError):
        write_with_sidecar(tmp_path / "out.png", frame(), content())


def test_what_is_no_sidecar_reads_as_none(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "out.png") is None
    (tmp_path / "out.png.json").write_text("[1]")
    assert read_sidecar(tmp_path / "out.png") is None
    write_sidecar(tmp_path / "out.png", {"schema": 99})
    assert read_sidecar(tmp_path / "out.png") is None


def test_local_models_are_known_by_their_weights(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model_index.json").write_text("{}")
    found = identify_model(tmp_path, name="mine")
    assert found.name == "mine"
    assert found.weights == {"unet/model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_a_hub_model_that_is_not_cached_has_no_commit() -> None:
    assert identify_model("nobody/never-cached") == ModelIdentity(name="nobody/never-cached")


def test_an_unreadable_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FrameFileError, match="cannot be read"):
        Source.of_file(tmp_path / "missing.png")
