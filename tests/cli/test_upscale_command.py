import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_folder
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from latent_tiles.cli.main import main
from latent_tiles.cli.options import size_mib
from latent_tiles.frames import read_frame
from latent_tiles.memory.none import NoMemory
from latent_tiles.pipelines.sidecar import file_sha256

Out = pytest.CaptureFixture[str]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(capsys: Out, message: str, *arguments: str | Path) -> None:
    """The command ends with status 2 and one line."""
    assert main(["upscale", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[-1].startswith("latent-tiles: error: ")
    assert message in lines[-1]
    assert "Traceback" not in captured.err


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model before the input is checked fails the test."""
    from latent_tiles.cli import loading

    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(loading, "_read", load)


def test_a_photo_is_enlarged_and_keeps_profile_and_exif(photo: Path, model: str, capsys: Out) -> None:
    target = photo.with_name("large.png")
    assert main(["upscale", str(photo), str(target), "--model", model, "--seed", "7"]) == 0
    frame = read_frame(target)
    # The scale left out is the model's.
    assert frame.picture.size == (80, 112)
    assert frame.icc_profile == b"a profile"
    assert b"Somebody" in (frame.exif or b"")
    out = capsys.readouterr().out
    for part in ("80 x 112 px, x2", "of 64 x 64 px", "seed", "7", "large.png.json"):
        assert part in out
    assert names(photo.parent) == ["large.png", "large.png.json", "photo.png"]


def test_json_is_the_sidecar_and_nothing_else(photo: Path, model: str, capsys: Out) -> None:
    target = photo.with_name("large.tif")
    options = ["--scale", "3", "--tile", "64x80", "--overlap", "16", "--memory", "pin", "--steps", "1", "--json"]
    assert main(["upscale", str(photo), str(target), "--model", model, *options]) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert captured.err == ""
    assert content == json.loads(target.with_name("large.tif.json").read_text())
    assert content["settings"]["memory"] == "pin"
    assert content["settings"]["tile"] == [64, 80]
    assert content["settings"]["num_inference_steps"] == 1
    assert content["source"] == {"name": str(photo), "sha256": file_sha256(photo), "size": [40, 56]}
    assert content["output"] == {"name": "large.tif", "sha256": file_sha256(target), "size": [120, 168]}
    assert set(content["model"]["weights"]) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_the_reported_seed_repeats_a_run(photo: Path, model: str, capsys: Out) -> None:
    first, second = photo.with_name("first.png"), photo.with_name("second.png")
    assert main(["upscale", str(photo), str(first), "--model", model, "--json"]) == 0
    (seed,) = json.loads(capsys.readouterr().out)["seeds"]
    assert main(["upscale", str(photo), str(second), "--model", model, "--seed", str(seed), "--quiet"]) == 0
    assert file_sha256(first) == file_sha256(second)


def test_quiet_says_nothing(photo: Path, model: str, capsys: Out) -> None:
    assert main(["upscale", str(photo), str(photo.with_name("o.jpg")), "--model", model, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_come_back(tmp_path: Path, model: str, channels: int) -> None:
    levels = np.full((32, 32, channels), 255, np.uint8)
    Image.fromarray(levels.squeeze()).save(tmp_path / "in.png")
    assert main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--model", model, "--quiet"]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == {1: "L", 4: "RGBA"}[channels]


def test_the_reference_model_is_the_default(
    photo: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    from latent_tiles.reference import folder

    monkeypatch.setattr(folder, "_MODEL", Path(model))
    assert main(["upscale", str(photo), str(photo.with_name("o.png")), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"]["name"] == folder.DESCRIPTION
    assert model not in json.dumps(content)


def test_a_terminal_sees_tiles_and_steps(photo: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["upscale", str(photo), str(photo.with_name("o.png")), "--model", model]) == 0
    shown = capsys.readouterr().err
    assert "step 2/2" in shown
    assert "tile/s" in shown or "s/tile" in shown
    assert "Loading" not in shown


@pytest.mark.usefixtures("_no_model")
class TestBadInputIsRefusedBeforeTheModelIsLoaded:
    def test_missing_input(self, tmp_path: Path, capsys: Out) -> None:
        refused(capsys, "no such file", tmp_path / "missing.png", tmp_path / "o.png")

    @pytest.mark.parametrize("content", [b"", b"not a picture"])
    def test_not_an_image(self, tmp_path: Path, capsys: Out, content: bytes) -> None:
        (tmp_path / "in.png").write_bytes(content)
        refused(capsys, "not a picture", tmp_path / "in.png", tmp_path / "o.png")

    def test_result_is_the_source(self, photo: Path, capsys: Out) -> None:
        refused(capsys, "is the source itself", photo, photo, "--overwrite")
        linked = photo.with_name("linked.png")
        os.link(photo, linked)
        refused(capsys, "is the source itself", photo, linked, "--overwrite")

    @pytest.mark.parametrize("taken", ["o.png", "o.png.json"])
    def test_result_exists(self, photo: Path, capsys: Out, taken: str) -> None:
        photo.with_name(taken).write_text("mine")
        refused(capsys, f"{taken} exists already", photo, photo.with_name("o.png"))
        assert photo.with_name(taken).read_text() == "mine"

    def test_unknown_ending(self, photo: Path, capsys: Out) -> None:
        refused(capsys, "cannot write .webp", photo, photo.with_name("o.webp"))

    def test_missing_folder(self, photo: Path, capsys: Out) -> None:
        refused(capsys, "does not exist", photo, photo.parent / "none" / "o.png")

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_folder(self, photo: Path, capsys: Out) -> None:
        photo.parent.chmod(0o500)
        refused(capsys, "is read-only", photo, photo.with_name("o.png"))

    def test_jpeg_has_no_alpha(self, tmp_path: Path, capsys: Out) -> None:
        Image.new("RGBA", (32, 32)).save(tmp_path / "in.png")
        refused(capsys, "JPEG has no alpha", tmp_path / "in.png", tmp_path / "o.jpg")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--memory", "nosuch"), "use one of none, pin"),
            (("--window", "nosuch"), "cosine"),
            (("--scale", "0"), "scale must be a finite number of at least 1"),
            (("--scale", "nan"), "scale must be a finite number of at least 1"),
            (("--tile", "0"), "tile must be at least 1 px"),
            (("--tile", "64", "--overlap", "64"), "overlap 64 px is not below"),
        ],
    )
    def test_settings(self, photo: Path, capsys: Out, options: tuple[str, str], message: str) -> None:
        refused(capsys, message, photo, photo.with_name("o.png"), *options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_missing_device(self, photo: Path, capsys: Out) -> None:
        refused(capsys, "torch finds no such device here", photo, photo.with_name("o.png"), "--device", "cuda")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--tile", "64*64"), "expected pixels such as 512"),
            (("--tile", "1x2x3"), "expected pixels such as 512"),
            (("--overlap", "-1"), "expected"),
            (("--steps", "0"), "expected at least 1"),
            (("--steps", "two"), "expected a whole number"),
            (("--strength", "2"), "expected a value from 0 to 1"),
            (("--guidance", "inf"), "expected at least 0"),
            (("--guidance", "x"), "expected a number"),
            (("--seed", "-1"), "expected a value from 0"),
            (("--noise", "pink"), "invalid choice"),
        ],
    )
    def test_syntax(self, photo: Path, capsys: Out, options: tuple[str, str], message: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["upscale", str(photo), str(photo.with_name("o.png")), *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

    def test_an_empty_name(self, photo: Path, capsys: Out) -> None:
        with pytest.raises(SystemExit):
            main(["upscale", str(photo), ""])
        assert "got an empty one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "supported are"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot load the model"),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short"),
            "cannot load the model",
        ),
    ],
)
def test_a_bad_model_folder_is_named(
    photo: Path, tmp_path: Path, capsys: Out, spoil: Callable[[Path], Any], message: str
) -> None:
    folder = model_folder.save(tmp_path / "model")
    spoil(folder)
    refused(capsys, message, photo, photo.with_name("o.png"), "--model", folder, "--quiet")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/never-cached", "one-word"])
def test_a_missing_model_is_named(photo: Path, capsys: Out, name: str) -> None:
    refused(capsys, name, photo, photo.with_name("o.png"), "--model", name)


def test_an_option_the_model_lacks_is_named(photo: Path, model: str, capsys: Out) -> None:
    options = ("--model", model, "--strength", "1")
    refused(capsys, "takes no argument 'strength'", photo, photo.with_name("o.png"), *options)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "lower --tile-batch"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower --tile-batch"),
    ],
)
def test_a_run_that_ends_in_the_middle_leaves_nothing(
    photo: Path,
    model: str,
    capsys: Out,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    raising_on_third_tile(monkeypatch, error)
    assert main(["upscale", str(photo), str(photo.with_name("o.png")), "--model", model]) == status
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert names(photo.parent) == ["photo.png"]


def test_an_unexpected_error_keeps_its_traceback(photo: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raising_on_third_tile(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["upscale", str(photo), str(photo.with_name("o.png")), "--model", model, "--quiet"])
    assert names(photo.parent) == ["photo.png"]


def raising_on_third_tile(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    seen: list[int] = []
    original = NoMemory.see

    def see(self: NoMemory, index: int, tile: Any) -> Any:
        seen.append(index)
        if len(seen) == 3:
            raise error
        return original(self, index, tile)

    monkeypatch.setattr(NoMemory, "see", see)


def test_nan_is_a_failed_run(photo: Path, tmp_path: Path, capsys: Out) -> None:
    pipe = tiny.host_pipeline("StableDiffusionInstructPix2PixPipeline")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "model")
    model_folder.DEFAULTS.save(tmp_path / "model")
    target = photo.with_name("o.png")
    assert main(["upscale", str(photo), str(target), "--model", str(tmp_path / "model"), "--quiet"]) == 1
    assert "NaN or infinite values in float32" in capsys.readouterr().err
    assert not target.exists()


def test_a_disk_that_fails_is_a_failed_run(
    photo: Path, model: str, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert main(["upscale", str(photo), str(photo.with_name("o.png")), "--model", model, "--quiet"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert names(photo.parent) == ["photo.png"]


def test_the_autoencoders_tiles_and_budgets_change_nothing_but_the_plan(
    photo: Path, model: str, tmp_path: Path, capsys: Out
) -> None:
    results = list[Any]()
    folder = tmp_path / "spill"
    folder.mkdir()
    for name, extra in (
        ("a.png", ()),
        ("b.png", ("--vae-tile", "16", "--ram-budget", "0k", "--spill-budget", "64MiB", "--spill-dir", str(folder))),
        ("c.png", ("--vae", "stock")),
    ):
        target = photo.with_name(name)
        given = ["upscale", str(photo), str(target), "--model", model, "--seed", "7", "--json", *extra]
        assert main(given) == 0
        results.append((read_frame(target).picture.rgb, json.loads(capsys.readouterr().out)))
    (exact, told), (spilled, spilled_told), (stock, stock_told) = results
    # One 8-bit level where rounding to it falls on the other side.
    assert float((exact - spilled).abs().max()) <= 1.01 / 255
    assert float((exact - stock).abs().max()) <= 1.01 / 255
    assert [entry["plan"]["spill_mib"] > 0 for entry in spilled_told["run"]["vae"]] == [True, True]
    assert [entry["plan"]["direction"] for entry in told["run"]["vae"]] == ["encode", "decode"]
    assert stock_told["run"]["vae"] == []
    assert (told["settings"]["vae"], stock_told["settings"]["vae"]) == ("exact", "stock")
    assert list(folder.iterdir()) == []


def test_budgets_that_cannot_be_met_leave_nothing(photo: Path, model: str, capsys: Out) -> None:
    target = photo.with_name("large.png")
    refused(capsys, "give device_budget_mib >=", photo, target, "--model", model, "--device-budget", "1KiB")
    refused(capsys, "is not a folder", photo, target, "--model", model, "--spill-dir", photo.with_name("none"))
    assert names(photo.parent) == ["photo.png"]


@pytest.mark.parametrize("text", ["8", "GiB", "-1MiB", "8XiB", "infGiB", ""])
def test_sizes_that_are_none_are_refused(text: str, capsys: Out) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["upscale", "in.png", "out.png", f"--ram-budget={text}"])
    assert caught.value.code == 2
    assert "expected a size such as 800MiB or 8GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "mib"), [("800MiB", 800), ("8GiB", 8192), ("1.5g", 1536), ("512K", 0.5), ("1TB", 2**20)]
)
def test_sizes_are_read_in_binary_units(text: str, mib: float) -> None:
    assert size_mib(text) == mib
