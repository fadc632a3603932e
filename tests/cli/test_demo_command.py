import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from latent_tiles.cli.demo import PHOTOGRAPHS, _photograph
from latent_tiles.cli.main import main
from latent_tiles.pipelines.sidecar import file_sha256

Out = pytest.CaptureFixture[str]
FILES = ["photo_x2.png", "photo_x2.png.json", "photo_x2_comparison.png"]


def demo(photo: Path, model: str, *options: str) -> int:
    folder = photo.parent / "demo"
    return main(["demo", "--picture", str(photo), "--out", str(folder), "--scale", "2", "--model", model, *options])


def names(photo: Path) -> list[str]:
    return sorted(path.name for path in (photo.parent / "demo").iterdir())


def test_it_writes_result_sidecar_and_comparison_and_says_so(photo: Path, model: str, capsys: Out) -> None:
    assert demo(photo, model) == 0
    assert names(photo) == FILES
    captured = capsys.readouterr()
    for part in ("40 x 56 px", "80 x 112 px", model, "s/MP", "seed", *FILES):
        assert part in captured.out
    with Image.open(photo.parent / "demo" / FILES[2]) as image:
        assert image.info["icc_profile"] == b"a profile"


def test_it_can_be_repeated_with_the_same_result(photo: Path, model: str, capsys: Out) -> None:
    assert demo(photo, model, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    result, compared = photo.parent / "demo" / FILES[0], photo.parent / "demo" / FILES[2]
    assert content["command"] == "demo"
    assert content["seeds"] == [7]
    assert content["comparison"] == {"name": FILES[2], "sha256": file_sha256(compared)}
    assert demo(photo, model, "--quiet") == 0
    assert file_sha256(result) == content["output"]["sha256"]


@pytest.mark.parametrize("taken", FILES)
def test_files_that_it_did_not_write_are_kept(photo: Path, model: str, taken: str, capsys: Out) -> None:
    mine = photo.parent / "demo" / taken
    mine.parent.mkdir()
    mine.write_text("mine")
    assert demo(photo, model, "--quiet") == 2
    assert f"{taken} exists already and is not an earlier demo's" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert demo(photo, model, "--quiet", "--overwrite") == 0
    assert names(photo) == FILES


def test_a_result_that_somebody_retouched_is_kept(photo: Path, model: str, capsys: Out) -> None:
    assert demo(photo, model, "--quiet") == 0
    result = photo.parent / "demo" / FILES[0]
    Image.new("RGB", (8, 8)).save(result)
    kept = result.read_bytes()
    assert demo(photo, model, "--quiet") == 2
    assert result.read_bytes() == kept


def test_an_unknown_picture_lists_the_known(tmp_path: Path, capsys: Out) -> None:
    assert main(["demo", "--picture", "nosuch", "--out", str(tmp_path / "demo")]) == 2
    assert "known are astronaut, camera, chelsea" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_missing_scikit_image_names_the_command(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install 'latent-tiles[demo]'" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_refused(photo: Path, model: str, capsys: Out) -> None:
    (photo.parent / "demo").write_text("mine")
    assert demo(photo, model) == 2
    assert "cannot make this folder" in capsys.readouterr().err


def test_the_source_is_never_overwritten(photo: Path, model: str, capsys: Out) -> None:
    # The only way to meet the source: a symbolic link under the result's name.
    (photo.parent / "demo").mkdir()
    (photo.parent / "demo" / FILES[0]).symlink_to(photo)
    assert demo(photo, model, "--overwrite") == 2
    assert "is where the demo would write" in capsys.readouterr().err


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_every_photograph_comes_with_scikit_image(name: str) -> None:
    pytest.importorskip("skimage")
    frame, _ = _photograph(name)
    assert frame.picture.size.area > 100_000
