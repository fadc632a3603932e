"""Pictures in memory: every form in, the same levels out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from latent_tiles.errors import FrameFileError, ImageError, SettingError
from latent_tiles.frames.inputs import as_picture
from latent_tiles.frames.picture import Picture, pad_to, resize, scaled_size
from latent_tiles.geometry import Size

HEIGHT, WIDTH = 16, 17
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def levels(channels: int) -> np.ndarray:
    """All 256 levels in every channel, in another order in each."""
    ramp = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    return np.stack([np.roll(ramp, 31 * k, axis=1) ^ (k * 85) for k in range(channels)], axis=-1).astype(np.uint8)


def pil(channels: int) -> Image.Image:
    array = levels(channels)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def forms(channels: int) -> dict[str, Any]:
    """One picture in every form that is accepted."""
    array = levels(channels)
    batch_first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    found = {
        "pil": pil(channels),
        "uint8": array,
        "uint8 batch": array[None],
        "uint16": array.astype(np.uint16) * 257,
        "float16": (array / 255).astype(np.float16),
        "float32": (array / 255).astype(np.float32),
        "float64": array / 255,
        "read-only": np.asarray(pil(channels)),
        "flipped twice": np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
        "fortran": np.asfortranarray(array),
        "tensor uint8": batch_first,
        "tensor float32": batch_first.float() / 255,
        "tensor float64": batch_first.double() / 255,
        "tensor float16": (batch_first.double() / 255).half(),
        "tensor batch": (batch_first.float() / 255)[None],
        "list of pil": [pil(channels)],
        "tuple of arrays": (array,),
        "list of tensors": [batch_first],
    }
    if channels == 1:
        found["height x width"] = array[..., 0]
    return found


CASES = [(mode, form) for mode, channels in MODES.items() for form in forms(channels)]


@pytest.mark.parametrize(("mode", "form"), CASES)
def test_eight_bits_make_the_round_trip_unharmed(mode: str, form: str) -> None:
    channels = MODES[mode]
    picture = as_picture(forms(channels)[form])
    assert picture.size == Size(HEIGHT, WIDTH)
    assert picture.items == 1
    assert picture.rgb.dtype == torch.float32
    assert picture.grey == (channels < 3)
    assert (picture.alpha is not None) == (channels in (2, 4))
    expected = levels(channels)

    (image,) = picture.export("pil")
    assert isinstance(image, Image.Image)
    assert image.mode == mode
    assert np.array_equal(np.asarray(image).reshape(expected.shape), expected)

    array = picture.export("np")
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert array.shape == (1, HEIGHT, WIDTH, channels)
    assert np.array_equal(np.rint(array[0] * 255), expected)

    tensor = picture.export("pt")
    assert isinstance(tensor, Tensor)
    assert tensor.shape == (1, channels, HEIGHT, WIDTH)
    assert np.array_equal((tensor[0] * 255).round().permute(1, 2, 0).numpy(), expected)
    assert float(tensor.min()) >= 0
    assert float(tensor.max()) <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_batches_and_lists_are_one_batch(channels: int) -> None:
    arrays = [levels(channels), 255 - levels(channels)]
    images: list[Any] = [
        arrays,
        np.stack(arrays),
        [Image.fromarray(array[..., 0] if channels == 1 else array) for array in arrays],
        torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2),
        [arrays[0], torch.from_numpy(arrays[1]).permute(2, 0, 1)],
    ]
    for image in images:
        picture = as_picture(image)
        assert picture.items == 2
        exported = picture.export("pil")
        assert len(exported) == 2
        for one, expected in zip(exported, arrays, strict=True):
            assert np.array_equal(np.asarray(one).reshape(expected.shape), expected)


def test_sixteen_bits_keep_their_levels() -> None:
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    values = as_picture(array).rgb[0, 0]
    assert np.array_equal(np.rint(values.double().numpy() * 65535).astype(np.uint16), array)


def test_bits_are_black_and_white() -> None:
    image = Image.fromarray(levels(1)[..., 0]).point(lambda level: 255 * (level > 99), mode="1")
    picture = as_picture(image)
    assert picture.grey
    assert picture.alpha is None
    assert np.array_equal(picture.rgb[0, 0].numpy() > 0.5, np.asarray(image))
    assert set(picture.rgb.unique().tolist()) == {0.0, 1.0}


def test_palettes_become_their_colours() -> None:
    image = pil(3).quantize(16)
    picture = as_picture(image)
    assert not picture.grey
    assert picture.alpha is None
    assert np.array_equal(np.asarray(picture.export("pil")[0]), np.asarray(image.convert("RGB")))


def test_transparent_palettes_get_their_alpha() -> None:
    image = pil(3).quantize(16)
    image.info["transparency"] = 3
    picture = as_picture(image)
    assert picture.alpha is not None
    assert np.array_equal(picture.alpha[0, 0].numpy() == 0, np.asarray(image) == 3)
    assert set(picture.alpha.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("mode", "key"), [("RGB", (0, 85, 170)), ("L", 7), ("1", 0)])
def test_a_transparent_colour_becomes_alpha(mode: str, key: Any) -> None:
    image = Image.new(mode, (4, 3), 255 if mode != "RGB" else (9, 9, 9))
    image.putpixel((1, 2), key)
    image.info["transparency"] = key
    picture = as_picture(image)
    assert picture.alpha is not None
    assert picture.grey == (mode != "RGB")
    expected = torch.ones(3, 4)
    expected[2, 1] = 0
    assert torch.equal(picture.alpha[0, 0], expected)


@pytest.mark.parametrize(("mode", "channels"), [("La", 2), ("PA", 4), ("RGBa", 4), ("RGBX", 3)])
def test_rare_modes(mode: str, channels: int) -> None:
    assert as_picture(Image.new(mode, (4, 3))).to_channels().shape == (1, channels, 3, 4)


def test_premultiplied_colour_becomes_straight() -> None:
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 128)).convert("RGBa")
    picture = as_picture(image)
    assert picture.alpha is not None
    assert float(picture.alpha[0, 0, 0, 0]) == pytest.approx(128 / 255)
    assert picture.rgb[0, :, 0, 0].tolist() == pytest.approx([200 / 255, 100 / 255, 50 / 255], abs=2 / 255)


@pytest.mark.parametrize("as_string", [True, False])
def test_a_path_is_read(tmp_path: Path, as_string: bool) -> None:
    path = tmp_path / "a.png"
    pil(3).save(path)
    picture = as_picture(str(path) if as_string else path)
    assert np.array_equal(np.asarray(picture.export("pil")[0]), levels(3))
    assert as_picture([path, path]).items == 2


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrameFileError, match="no such file"):
        as_picture(tmp_path / "none.png")


def spoilt(value: float, dtype: type = np.float32) -> np.ndarray:
    array = np.full((4, 5, 3), 0.5, dtype=dtype)
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (spoilt(np.nan), "array has 3 NaN or infinite values; replace them first"),
        (spoilt(np.inf), "array has 3 NaN or infinite values"),
        (spoilt(-np.inf, np.float64), "array has 3 NaN or infinite values"),
        (torch.tensor(spoilt(np.nan)).permute(2, 0, 1), "tensor has 3 NaN or infinite values"),
        (spoilt(1.5), r"array has values from 0.5 to 1.5; expected 0 to 1, so scale or clamp it"),
        (spoilt(-0.25), "array has values from -0.25 to 0.5"),
        (torch.tensor(spoilt(255)).permute(2, 0, 1), "tensor has values from 0.5 to 255"),
        (np.zeros((0, 5, 3), np.uint8), r"array of shape \(1, 3, 0, 5\) is empty"),
        (np.zeros((5, 0), np.float32), "is empty"),
        (torch.zeros(3, 0, 4), r"tensor of shape \(1, 3, 0, 4\) is empty"),
        (torch.zeros(0, 3, 4, 4), r"tensor of shape \(0, 3, 4, 4\) is empty"),
        (np.zeros((4, 4, 5), np.uint8), "expected 1 to 4 channels"),
        (np.zeros((4, 4, 0), np.uint8), "expected 1 to 4 channels"),
        (torch.zeros(5, 4, 4), r"tensor of shape \(1, 5, 4, 4\): expected 1 to 4 channels"),
        (torch.zeros(4, 4), r"tensor of shape \(1, 4, 4\): expected 1 to 4 channels"),
        (torch.zeros(1, 1, 3, 4, 4), "expected 1 to 4 channels"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), r"array of shape \(1, 1, 4, 4, 3\) is not \(height, width"),
        (np.zeros(7, np.uint8), r"array of shape \(7,\) is not \(height, width"),
        (np.float32(3.0) * np.ones(()), "expected a PIL image|is not"),
        (np.zeros((4, 4, 3), np.int32), "array of dtype int32 is not supported; use uint8, uint16 or float in"),
        (np.zeros((4, 4, 3), bool), "array of dtype bool is not supported"),
        (np.zeros((4, 4, 3), np.complex64), "array of dtype complex64 is not supported"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "tensor of dtype torch.int64 is not supported; use uint8 or float"),
        (Image.new("RGB", (0, 4)), "image of 4 x 0 px is empty"),
        (Image.new("I", (4, 4)), "PIL image of mode I: PIL cannot say its range; pass a uint16 or float array"),
        (Image.new("I;16", (4, 4)), "PIL image of mode I;16: PIL cannot say its range"),
        (Image.new("F", (4, 4)), "PIL image of mode F: PIL cannot say its range"),
        (Image.new("CMYK", (4, 4)), "PIL image of mode CMYK is not supported; convert it to RGB first"),
        (Image.new("LAB", (4, 4)), "PIL image of mode LAB is not supported"),
        (Image.new("YCbCr", (4, 4)), "PIL image of mode YCbCr is not supported"),
        (Image.new("HSV", (4, 4)), "PIL image of mode HSV is not supported"),
        ([], "the list of images is empty"),
        ((), "the list of images is empty"),
        ([pil(3), pil(3).resize((5, 6))], r"must have one size, got \(16, 17\) and \(6, 5\)"),
        ([pil(3), pil(1)], "must all be grey or colour, and all with or without alpha"),
        ([pil(3), pil(4)], "must all be grey or colour, and all with or without alpha"),
        ([pil(3), None], "got NoneType"),
        (None, "expected a PIL image, numpy array, tensor, path or list of these, got NoneType"),
        (3, "expected a PIL image.*got int"),
        (b"bytes", "expected a PIL image.*got bytes"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        as_picture(image)


def test_the_callers_image_is_not_changed() -> None:
    array = (levels(3) / 255).astype(np.float32)
    copy = array.copy()
    picture = as_picture(array)
    picture.resized(Size(8, 8)).export("pil")
    picture.export("pil")
    assert np.array_equal(array, copy)


def test_grey_goes_back_to_one_channel_by_luma() -> None:
    colour = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    result = Picture(rgb=colour, grey=True).to_channels()
    assert result.shape == (1, 1, 1, 1)
    assert float(result) == pytest.approx(0.299 + 0.5 * 0.587 + 0.25 * 0.114)


def test_copies_lie_next_to_each_other() -> None:
    picture = as_picture(np.stack([levels(4), 255 - levels(4)])).repeated(2)
    assert picture.items == 4
    assert picture.alpha is not None
    assert torch.equal(picture.rgb[0], picture.rgb[1])
    assert torch.equal(picture.alpha[2], picture.alpha[3])
    assert not torch.equal(picture.rgb[1], picture.rgb[2])


def test_resizing_to_the_same_size_is_the_identity() -> None:
    values = torch.rand(2, 3, 9, 7)
    assert resize(values, Size(9, 7)) is values
    picture = as_picture(levels(4))
    assert torch.equal(picture.resized(picture.size).to_channels(), picture.to_channels())


@pytest.mark.parametrize("size", [Size(40, 36), Size(5, 4), Size(1, 1), Size(33, 3)])
def test_resizing_stays_in_range_and_keeps_every_channel(size: Size) -> None:
    checks = (torch.arange(HEIGHT)[:, None] + torch.arange(WIDTH)) % 2
    array = np.repeat(checks.numpy().astype(np.uint8)[..., None] * 255, 4, axis=-1)
    resized = as_picture(array).resized(size)
    assert resized.size == size
    channels = resized.to_channels()
    assert channels.shape == (1, 4, *size)
    assert 0 <= float(channels.min()) <= float(channels.max()) <= 1
    assert torch.equal(channels[:, 3], channels[:, 0])


@pytest.mark.parametrize("size", [Size(40, 36), Size(5, 4)])
def test_resizing_keeps_constants(size: Size) -> None:
    torch.testing.assert_close(resize(torch.full((1, 1, 12, 13), 0.3), size), torch.full((1, 1, *size), 0.3))


def test_resizing_is_pils_bicubic() -> None:
    """The same filter, Keys with a = -0.5, in both directions; PIL's is rounded to 8 bits."""
    smooth = Image.fromarray(levels(1)[..., 0]).resize((WIDTH * 4, HEIGHT * 4), Image.Resampling.BICUBIC)
    for size in (Size(100, 90), Size(20, 30)):
        ours = as_picture(smooth).resized(size).rgb[0, 0] * 255
        theirs = torch.from_numpy(np.array(smooth.resize((size.width, size.height), Image.Resampling.BICUBIC)))
        # PIL rounds to 8 bits between its two passes as well.
        assert float((ours - theirs.float()).abs().max()) < 1.6


def test_padding_repeats_the_last_row_and_column() -> None:
    values = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to(values, Size(4, 5))
    expected = torch.tensor([[0, 1, 2, 2, 2], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5.0]])
    assert torch.equal(padded[0, 0], expected)
    assert pad_to(values, Size(2, 3)) is values


@given(height=st.integers(1, 20), width=st.integers(1, 20), data=st.data())
def test_padding_keeps_what_was_there(height: int, width: int, data: st.DataObject) -> None:
    values = torch.rand(2, 3, height, width)
    size = Size(height + data.draw(st.integers(0, 70)), width + data.draw(st.integers(0, 70)))
    padded = pad_to(values, size)
    assert padded.shape == (2, 3, *size)
    assert torch.equal(padded[..., :height, :width], values)


@pytest.mark.parametrize(
    ("scale", "expected"), [(1, Size(33, 47)), (4, Size(132, 188)), (1.5, Size(50, 70)), (2.34, Size(77, 110))]
)
def test_sizes_are_rounded_to_whole_pixels(scale: float, expected: Size) -> None:
    assert scaled_size(Size(33, 47), scale) == expected


@pytest.mark.parametrize("scale", [0, -1, 0.99, float("nan"), float("inf")])
def test_scales_below_one_are_refused(scale: float) -> None:
    with pytest.raises(SettingError, match="scale must be a finite number of at least 1, got"):
        scaled_size(Size(33, 47), scale)


def test_padding_to_a_smaller_size_is_refused() -> None:
    with pytest.raises(ImageError, match=r"cannot pad \(4, 4\) to the smaller \(3, 6\)"):
        pad_to(torch.zeros(1, 1, 4, 4), Size(3, 6))
