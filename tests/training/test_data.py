"""Readers, crops and degradation."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import CropConfig, Pixels, batch_rng, expand, random_crop, read_pictures
from training.degrade import DegradeConfig, add_sensor_noise, compress, degrade
from training.errors import TrainingConfigError, TrainingDataError
from training.words import WORDS, WordConfig, degradation_of, draw_words, prompt_of, target_of


def _tar_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.add(file, file.relative_to(folder).as_posix())
    return path


def test_folder_and_tar_hold_the_same_pictures(tmp_path: Path, picture_folder: Path) -> None:
    """Both readers return every picture, in the same order, and skip other files."""
    from_folder = read_pictures([picture_folder])
    from_tar = read_pictures([_tar_of(picture_folder, tmp_path / "shard.tar")])
    assert len(from_folder) == 4
    assert [name for name, _ in from_folder] == [name for name, _ in from_tar]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(from_folder, from_tar, strict=True))
    assert len(read_pictures([picture_folder], limit=3)) == 3


def test_patterns_name_shards(tmp_path: Path, picture_folder: Path) -> None:
    """A pattern stands for its matches, sorted; one without a match is an error."""
    for number in (1, 0):
        _tar_of(picture_folder, tmp_path / f"train-{number}.tar")
    assert [path.name for path in expand([str(tmp_path / "train-*.tar")])] == ["train-0.tar", "train-1.tar"]
    with pytest.raises(TrainingDataError, match="matches no file"):
        expand([str(tmp_path / "val-*.tar")])


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    """Missing paths, empty folders and damaged files are named."""
    with pytest.raises(TrainingDataError, match="neither a folder"):
        read_pictures([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingDataError, match="no picture in"):
        read_pictures([tmp_path / "empty"])
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(TrainingDataError, match=r"broken\.png cannot be decoded"):
        read_pictures([tmp_path / "broken.png"])


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (96, 96)])
def test_crops_have_the_size_and_follow_the_seed(pictures: list[Pixels], size: tuple[int, int]) -> None:
    """The same generator state gives the same crop."""
    first, second = (random_crop(pictures, size, batch_rng(0, 3)) for _ in range(2))
    assert first.shape == (*size, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert np.array_equal(first, second)


def test_a_picture_smaller_than_the_crop_is_refused(pictures: list[Pixels]) -> None:
    """The message names both sizes."""
    with pytest.raises(TrainingDataError, match="96x96 px is smaller than the crop of 100x100"):
        random_crop(pictures, (100, 100), batch_rng(0))
    with pytest.raises(TrainingConfigError, match="shrink_max"):
        CropConfig(shrink_max=0.5)


@pytest.mark.parametrize("shape", [(64, 64), (61, 83)])
@pytest.mark.parametrize("seed", range(5))
def test_degradation_keeps_shape_and_follows_the_seed(shape: tuple[int, int], seed: int) -> None:
    """Any shape comes back as it was, in range, and the same for the same seed."""
    picture = np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)
    first, second = (degrade(picture, batch_rng(seed)) for _ in range(2))
    assert first.shape == picture.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


def test_reduction_loses_detail_and_nothing_keeps_the_picture() -> None:
    """At full size without noise and JPEG the picture is unchanged; reduced by 4 noise loses most of its variance."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    none = DegradeConfig(full_size_chance=1, largest_chance=0, blur_chance=0, noise_chance=0, jpeg_chance=0)
    assert np.array_equal(degrade(picture, batch_rng(0), none), picture)
    quarter = DegradeConfig(full_size_chance=0, largest_chance=1, noise_chance=0, jpeg_chance=0)
    assert degrade(picture, batch_rng(0), quarter).std() < 0.5 * picture.std()


def test_noise_and_compression_have_their_strength() -> None:
    """Noise has the deviation asked for at mid grey; lower quality is farther from the picture."""
    grey = np.full((128, 128, 3), 128, np.uint8)
    assert add_sensor_noise(grey, 8.0, batch_rng(0)).std() == pytest.approx(8.0, rel=0.05)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.float32)
    picture = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((128, 128)))
    distances = [np.abs(compress(picture, quality).astype(float) - picture).mean() for quality in (20, 60, 95)]
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize(
    "change",
    [
        {"scale": (0.5, 4.0)},
        {"jpeg": (90.0, 20.0)},
        {"noise_chance": 2.0},
        {"largest_chance": 0.9, "full_size_chance": 0.9},
    ],
)
def test_impossible_degradations_are_refused(change: dict[str, object]) -> None:
    """Every range is checked."""
    with pytest.raises(TrainingConfigError, match="choose"):
        DegradeConfig(**change)


def test_words_change_input_or_target(pictures: list[Pixels]) -> None:
    """Two words worsen the input, two change the target, none does both."""
    mild, config = DegradeConfig(), WordConfig()
    assert degradation_of((), mild) == mild
    assert degradation_of(("denoise",), mild).noise[0] > mild.noise[1]
    assert degradation_of(("remove jpeg artifacts",), mild).jpeg[1] < mild.jpeg[0]
    targets = {word: target_of(pictures[0], (word,), batch_rng(0), config) for word in WORDS}
    assert all(np.array_equal(targets[word], pictures[0]) for word in WORDS[:2])
    roughness = {word: np.diff(target.astype(float), axis=0).std() for word, target in targets.items()}
    assert roughness["film grain"] > roughness["denoise"] > roughness["soft"]


def test_prompts_hold_the_words_that_change_the_target() -> None:
    """Words about the input may be withheld, words about the target never."""
    config = WordConfig(chance=1.0, drop=1.0, filler_chance=0.0)
    words = draw_words(batch_rng(0), config)
    assert sorted(words) == sorted(WORDS)
    assert sorted(prompt_of(words, batch_rng(1), config).split(", ")) == ["film grain", "soft"]
    assert prompt_of((), batch_rng(0), config) == ""
    with pytest.raises(TrainingConfigError, match="drop is 2"):
        WordConfig(drop=2.0)


def test_scikit_image_pictures_can_be_read(tmp_path: Path) -> None:
    """A real photograph goes through reader, crop and degradation."""
    data = pytest.importorskip("skimage.data")
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).save(buffer, "JPEG", quality=90)
    (tmp_path / "astronaut.jpg").write_bytes(buffer.getvalue())
    ((name, picture),) = read_pictures([tmp_path])
    crop = random_crop([picture], (128, 96), batch_rng(0))
    assert name == "astronaut.jpg"
    assert degrade(crop, batch_rng(1)).shape == (128, 96, 3)
