"""Pictures that the tests of training share."""

from pathlib import Path

import pytest
from PIL import Image
from training_tiny import fresh_accelerator, make_pictures

from training.data import Pixels


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    fresh_accelerator()


@pytest.fixture
def pictures() -> list[Pixels]:
    """Four pictures of 96 x 96 px."""
    return make_pictures()


@pytest.fixture
def picture_folder(tmp_path: Path, pictures: list[Pixels]) -> Path:
    """The same pictures as PNG files in nested folders, beside a file that is no picture."""
    folder = tmp_path / "pictures"
    for index, picture in enumerate(pictures):
        path = folder / f"part{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    (folder / "notes.txt").write_text("not a picture")
    return folder
