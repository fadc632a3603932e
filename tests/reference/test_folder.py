import hashlib
from pathlib import Path

import pytest

from latent_tiles.errors import ModelFolderError
from latent_tiles.reference import reference_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "model_index.json").write_text("{}")
    names = ("unet/weights.safetensors", "model_index.json")
    lines = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    return tmp_path


def test_a_folder_as_shipped_comes_back(folder: Path) -> None:
    assert reference_model(folder=folder) == folder


def test_files_are_hashed_once_a_process(folder: Path) -> None:
    reference_model(folder=folder)
    (folder / "model_index.json").write_text("changed")
    assert reference_model(folder=folder) == folder


def test_binary_marks_of_sha256sum_are_read(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  ", " *"))
    assert reference_model(folder=folder) == folder


def test_a_changed_file_is_named_with_both_hashes_and_the_fix(folder: Path) -> None:
    (folder / "unet" / "weights.safetensors").write_bytes(b"other")
    expected, found = (hashlib.sha256(content).hexdigest() for content in (b"weights", b"other"))
    message = f"weights.safetensors has SHA-256 {found}, expected {expected}; reinstall"
    with pytest.raises(ModelFolderError, match=message):
        reference_model(folder=folder)


@pytest.mark.parametrize("name", ["unet/weights.safetensors", "SHA256SUMS"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=f"{name} is missing; reinstall"):
        reference_model(folder=folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="none is not a folder; reinstall"):
        reference_model(folder=tmp_path / "none")


@pytest.mark.parametrize(("text", "message"), [("", "lists no file"), ("abc  model_index.json\n", "line 1: expected")])
def test_a_list_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "SHA256SUMS").write_text(text)
    with pytest.raises(ModelFolderError, match=message):
        reference_model(folder=folder)
