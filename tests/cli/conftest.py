from pathlib import Path

import model_folder
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[315] = "Somebody"
    Image.fromarray(levels).save(tmp_path / "photo.png", icc_profile=b"a profile", exif=exif)
    return tmp_path / "photo.png"
