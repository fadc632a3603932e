"""Picture files: what is kept, what is refused, and what is left behind when writing fails."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from latent_tiles.errors import FrameFileError
from latent_tiles.frames.files import Frame, check_writable, read_frame, write_atomically, write_frame
from latent_tiles.frames.inputs import as_picture
from latent_tiles.geometry import Size

LOSSLESS = (".png", ".tif", ".tiff")
ENDINGS = (*LOSSLESS, ".jpg", ".jpeg")
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
PROFILE = bytes(range(256)) * 3


def levels(channels: int, height: int = 16, width: int = 17) -> np.ndarray:
    ramp = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    return np.stack([np.roll(ramp, 31 * k, axis=1) ^ (k * 85) for k in range(channels)], axis=-1).astype(np.uint8)


def image(mode: str = "RGB", **size: int) -> Image.Image:
    array = levels(MODES[mode], **size)
    return Image.fromarray(array[..., 0] if mode == "L" else array)


def camera_exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.DateTime] = "2020:01:01 00:00:00"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


def parsed(data: bytes | None) -> Image.Exif:
    assert data is not None
    exif = Image.Exif()
    exif.load(data)
    return exif


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Pixels


@pytest.mark.parametrize("ending", LOSSLESS)
@pytest.mark.parametrize("mode", MODES)
def test_eight_bits_make_the_round_trip_unharmed(tmp_path: Path, mode: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    write_frame(path, Frame(picture=as_picture(image(mode))))
    with Image.open(path) as written:
        assert written.mode == mode
        assert np.array_equal(np.asarray(written), np.asarray(image(mode)))
    frame = read_frame(path)
    assert np.array_equal(np.asarray(frame.picture.export("pil")[0]), np.asarray(image(mode)))
    assert frame.icc_profile is None
    assert frame.exif is None
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_close_and_not_subsampled(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.jpg"
    smooth = image(mode).resize((170, 160), Image.Resampling.BICUBIC)
    write_frame(path, Frame(picture=as_picture(smooth)))
    with Image.open(path) as written:
        assert written.format == "JPEG"
        assert written.mode == mode
        difference = np.abs(np.asarray(written, dtype=int) - np.asarray(smooth, dtype=int))
        assert difference.mean() < 2
        if mode == "RGB":
            assert [layer[1:3] for layer in written.layer] == [(1, 1)] * 3


def test_tiff_is_compressed(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_frame(path, Frame(picture=as_picture(np.zeros((300, 300, 3), np.uint8))))
    assert path.stat().st_size < 10_000


@pytest.mark.parametrize("ending", [".png", ".tif", ".gif", ".bmp", ".webp"])
def test_other_eight_bit_files_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    options = {"lossless": True} if ending == ".webp" else {}
    image("L").convert("RGB").save(path, **options)
    assert np.array_equal(np.asarray(read_frame(path).picture.export("pil")[0].convert("L")), np.asarray(image("L")))  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["1", "P"])
def test_bits_and_palettes_are_read(tmp_path: Path, mode: str) -> None:
    source = image().quantize(8) if mode == "P" else image("L").convert("1")
    source.save(tmp_path / "a.png")
    frame = read_frame(tmp_path / "a.png")
    assert np.array_equal(
        np.asarray(frame.picture.export("pil")[0]), np.asarray(source.convert("RGB" if mode == "P" else "L"))
    )


def test_a_transparent_palette_is_read(tmp_path: Path) -> None:
    image().quantize(8).save(tmp_path / "a.png", transparency=2)
    assert read_frame(tmp_path / "a.png").picture.alpha is not None


# What the file says


@pytest.mark.parametrize("target", ENDINGS)
@pytest.mark.parametrize("source", [".png", ".tif", ".jpg"])
def test_profile_and_exif_are_carried_over(tmp_path: Path, source: str, target: str) -> None:
    given = tmp_path / f"given{source}"
    image().save(given, icc_profile=PROFILE, exif=camera_exif().tobytes())
    frame = read_frame(given)
    # The result has another size: nothing of the source's layout may come along.
    result = Frame(picture=frame.picture.resized(Size(40, 50)), icc_profile=frame.icc_profile, exif=frame.exif)
    write_frame(tmp_path / f"result{target}", result)
    again = read_frame(tmp_path / f"result{target}")
    assert again.picture.size == Size(40, 50)
    for one in (frame, again):
        assert one.icc_profile == PROFILE
        exif = parsed(one.exif)
        assert exif[ExifTags.Base.Make] == "Maker"
        assert exif[ExifTags.Base.DateTime] == "2020:01:01 00:00:00"
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == pytest.approx(0.01)
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
        assert ExifTags.Base.ImageWidth not in exif
        assert ExifTags.Base.StripOffsets not in exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
def test_orientation_is_applied_once(tmp_path: Path, ending: str, orientation: int) -> None:
    corners = Image.new("L", (48, 32))
    corners.paste(255, (0, 0, 16, 16))
    path = tmp_path / f"a{ending}"
    corners.save(path, exif=camera_exif(orientation).tobytes())
    frame = read_frame(path)
    assert frame.picture.size == (Size(32, 48) if orientation < 5 else Size(48, 32))
    # Where the white corner goes, by the EXIF standard: row 0 and column 0 of the file are at ...
    top = orientation in (1, 2, 5, 6)
    left = orientation in (1, 4, 5, 8)
    bright = frame.picture.rgb[0, 0]
    assert float(bright[0 if top else -1, 0 if left else -1]) > 0.9
    assert float(bright[-1 if top else 0, -1 if left else 0]) < 0.1
    assert ExifTags.Base.Orientation not in parsed(frame.exif)

    write_frame(tmp_path / "again.png", frame)
    assert torch.equal(read_frame(tmp_path / "again.png").picture.rgb.round(), frame.picture.rgb.round())


def test_orientation_alone_leaves_no_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image().save(tmp_path / "a.jpg", exif=exif)
    frame = read_frame(tmp_path / "a.jpg")
    assert frame.exif is None
    assert frame.picture.size == Size(17, 16)


# Files that cannot be read


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrameFileError, match=r"none\.png: no such file"):
        read_frame(tmp_path / "none.png")
    with pytest.raises(FrameFileError, match="is a folder"):
        read_frame(str(tmp_path))


def test_of_several_pages_the_first_is_taken_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    frame = read_frame(tmp_path / "pages.tif")
    assert frame.picture.rgb[0, :, 0, 0].tolist() == [1, 0, 0]
    assert "holds 2 pictures; the first is taken" in caplog.text


@pytest.mark.parametrize("content", [b"", b"This is no picture.\n", bytes(1000)], ids=["empty", "text", "zeros"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_files_that_are_no_pictures_are_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(FrameFileError, match=f"a{ending}: not a picture in a known format"):
        read_frame(path)


def encoded(path: Path, **options: Any) -> bytes:
    image(height=40, width=40).save(path, exif=camera_exif().tobytes(), **options)
    return path.read_bytes()


# PIL warns about damaged tags and goes on; what it cannot go on with is an error.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_truncated_files_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    whole = encoded(path)
    # PIL stores a TIFF's pixels in front of its tags, and the end of a PNG or JPEG holds no pixels.
    for length in np.linspace(1, len(whole) - 40, 40).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(FrameFileError, match=r"damaged or unreadable|not a picture in a known format"):
            read_frame(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_damage_never_shows_as_another_error(tmp_path: Path, ending: str) -> None:
    """Bytes changed at random, in the tags above all: a picture or a FrameFileError."""
    path = tmp_path / f"a{ending}"
    whole = encoded(path)
    generator = np.random.default_rng(0)
    head = 400
    for trial in range(300):
        damaged = bytearray(whole)
        first = 0 if trial % 2 else len(whole) - head
        for place in generator.integers(first, first + head, 3):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(FrameFileError):
            read_frame(path)


@pytest.mark.parametrize(
    ("ending", "dtype"), [(".png", np.uint16), (".tif", np.uint16), (".tif", np.int32), (".tif", np.float32)]
)
def test_deep_grey_files_are_refused(tmp_path: Path, ending: str, dtype: type) -> None:
    Image.fromarray(np.arange(12).reshape(3, 4).astype(dtype)).save(tmp_path / f"a{ending}")
    with pytest.raises(FrameFileError, match=r"(16|32) bits a channel; files of up to 8 bits can be read, convert it"):
        read_frame(tmp_path / f"a{ending}")


def sixteen_bit_png() -> bytes:
    """A 1 x 1 px RGB PNG of 16 bits, which PIL opens as 8-bit RGB without a word."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\x00" + struct.pack(">3H", 1, 2, 3))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def sixteen_bit_tiff() -> bytes:
    """A 1 x 1 px RGB TIFF of 16 bits."""

    tags = [
        (256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 206), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6), (284, 3, 1, 1),
    ]  # fmt: skip
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    data += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    return data.ljust(200, b"\0") + struct.pack("<6H", 16, 16, 16, 1, 2, 3)


@pytest.mark.parametrize(("ending", "content"), [(".png", sixteen_bit_png()), (".tif", sixteen_bit_tiff())])
def test_deep_colour_files_are_refused_rather_than_cut(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(FrameFileError, match="16 bits a channel; files of up to 8 bits can be read, convert it first"):
        read_frame(path)


def test_formats_that_pil_would_cut_to_eight_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    with pytest.raises(FrameFileError, match="not a picture in a known format"):
        read_frame(path)


@pytest.mark.parametrize("ending", [".jpg", ".tif"])
def test_cmyk_is_refused(tmp_path: Path, ending: str) -> None:
    image().convert("CMYK").save(tmp_path / f"a{ending}")
    with pytest.raises(FrameFileError, match="colour mode CMYK is not supported; convert it to RGB with its profile"):
        read_frame(tmp_path / f"a{ending}")


def test_large_frames_do_not_warn_but_pils_hard_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert read_frame(tmp_path / "a.png").picture.size == Size(16, 17)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(FrameFileError, match="exceeds limit of"):
        read_frame(tmp_path / "a.png")


# Files that cannot be written


@pytest.mark.parametrize(
    ("name", "size", "alpha", "message"),
    [
        ("a.webp", (5, 5), False, "cannot write .webp; use .png, .jpg, .jpeg, .tif, .tiff"),
        ("a", (5, 5), False, "cannot write a file without ending; use .png"),
        ("a.jpg", (5, 5), True, "JPEG has no alpha channel; write PNG or TIFF"),
        ("a.JPEG", (65501, 5), False, "JPEG ends at 65500 px a side, the picture has 65501; write TIFF"),
        ("a.jpg", (5, 70000), False, "JPEG ends at 65500 px a side, the picture has 70000"),
        ("none/a.png", (5, 5), False, "none does not exist"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, name: str, size: tuple[int, int], alpha: bool, message: str
) -> None:
    with pytest.raises(FrameFileError, match=message):
        check_writable(tmp_path / name, size=Size(*size), alpha=alpha, overwrite=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.Jpg", "a.tiff"])
def test_what_can_be_written_is_only_checked(tmp_path: Path, name: str) -> None:
    path = check_writable(str(tmp_path / name), size=Size(65500, 65500), alpha=False, overwrite=False)
    assert path == tmp_path / name
    assert names(tmp_path) == []


def test_the_longest_jpeg_that_is_promised_can_be_written(tmp_path: Path) -> None:
    write_frame(tmp_path / "a.jpg", Frame(picture=as_picture(np.zeros((1, 65500), np.uint8))))
    assert read_frame(tmp_path / "a.jpg").picture.size == Size(1, 65500)


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # whoever runs the tests may be root
    with pytest.raises(FrameFileError, match="is read-only"):
        check_writable(tmp_path / "a.png", size=Size(5, 5), alpha=False, overwrite=False)


def test_an_existing_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    frame = Frame(picture=as_picture(image()))
    with pytest.raises(FrameFileError, match=r"a\.png exists already; choose another name or allow overwriting"):
        write_frame(path, frame)
    assert path.read_bytes() == b"precious"
    write_frame(path, frame, overwrite=True)
    assert read_frame(path).picture.size == Size(16, 17)
    assert names(tmp_path) == ["a.png"]


def test_a_file_holds_one_picture(tmp_path: Path) -> None:
    with pytest.raises(FrameFileError, match="a file holds one picture, got 2"):
        write_frame(tmp_path / "a.png", Frame(picture=as_picture([image(), image()])))
    assert names(tmp_path) == []


def test_jpeg_refuses_alpha_when_writing(tmp_path: Path) -> None:
    with pytest.raises(FrameFileError, match="JPEG has no alpha channel"):
        write_frame(tmp_path / "a.jpg", Frame(picture=as_picture(image("RGBA"))))
    assert names(tmp_path) == []


def test_exif_that_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    frame = Frame(picture=as_picture(image()), exif=exif.tobytes())
    with pytest.raises(FrameFileError, match=r"a\.jpg: writing failed \(EXIF data is too long\)"):
        write_frame(tmp_path / "a.jpg", frame)
    assert names(tmp_path) == []


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), RuntimeError("bad")])
def test_nothing_is_left_when_writing_fails(tmp_path: Path, error: Exception, existing: bool) -> None:
    target = tmp_path / "a.png"
    if existing:
        target.write_bytes(b"precious")

    def write(part: Path) -> None:
        assert part.parent == tmp_path, "beside the target, so that the renaming cannot leave the disk"
        part.write_bytes(b"half")
        raise error

    with pytest.raises(FrameFileError, match=r"a\.png: writing failed") as caught:
        write_atomically(target, write)
    assert caught.value.__cause__ is error
    assert names(tmp_path) == (["a.png"] if existing else [])
    assert not existing or target.read_bytes() == b"precious"


def test_nothing_is_left_when_the_user_interrupts(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", write)
    assert names(tmp_path) == []


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrameFileError, match="cannot write there"):
        write_atomically(tmp_path / "none" / "a.png", lambda part: None)


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_frame(tmp_path / "a.png", Frame(picture=as_picture(image())))
    assert (tmp_path / "a.png").stat().st_mode == plain.stat().st_mode
