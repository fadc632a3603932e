"""Picture files, 8 bits a channel: PNG, JPEG, TIFF. Profile and EXIF are carried over."""

from __future__ import annotations

import logging
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from latent_tiles.errors import FrameFileError
from latent_tiles.frames.convert import PIL_MODES, from_pil
from latent_tiles.frames.picture import Picture
from latent_tiles.geometry import Size

_LOG = logging.getLogger(__name__)

WRITABLE: dict[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
"""File name endings that can be written, and PIL's name of the format."""

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "TIFF": {"compression": "tiff_deflate"},
}
_JPEG_LIMIT = 65500
"""Longest side that libjpeg writes."""

_READABLE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
"""Formats of which it is known when they hold more than 8 bits; PIL opens others, such as PPM, as 8-bit in silence."""

_BITS_PER_SAMPLE = 258
_ORIENTATION = 274
_ABOUT_THE_PICTURE = frozenset(
    {
        ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model,
        ExifTags.Base.XResolution, ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit,
        ExifTags.Base.Software, ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright,
        ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo,
    }
)  # fmt: skip
"""What is kept of a TIFF's own tags; the others say where in that file its strips lie."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture and what its file said about it.

    Args:
        picture: the pixels, upright.
        icc_profile: the colour profile's bytes, or None. Pixels stay in that profile's space.
        exif: EXIF bytes without orientation, or None.
    """

    picture: Picture
    icc_profile: bytes | None = None
    exif: bytes | None = None


def read_frame(path: str | PathLike[str]) -> Frame:
    """Read a picture of 8 bits a channel; EXIF orientation is applied.

    Raises:
        FrameFileError: no such file, not a picture, damaged, or more than 8 bits a channel.
    """
    if not Path(path).is_file():
        raise FrameFileError(f"{path}: {'is a folder' if Path(path).is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            # Frames above PIL's warning limit are what this library is for; its hard limit still holds.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # From a stream: of a path PIL maps uncompressed TIFFs into memory, and then turns them wrongly.
            with Path(path).open("rb") as file, Image.open(file, formats=_READABLE_FORMATS) as image:
                _refuse_deep(path, image)
                pages = getattr(image, "n_frames", 1)
                if pages > 1:
                    _LOG.warning("%s holds %d pictures; the first is taken", path, pages)
                exif = _exif(image)
                return Frame(
                    picture=from_pil(ImageOps.exif_transpose(image)),
                    icc_profile=image.info.get("icc_profile"),
                    exif=exif,
                )
    except UnidentifiedImageError:
        raise FrameFileError(f"{path}: not a picture in a known format") from None
    except Image.DecompressionBombError as error:
        raise FrameFileError(f"{path}: {error}") from error
    except FrameFileError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        # PIL reports damage, in pixels or tags, in any of these.
        raise FrameFileError(f"{path}: damaged or unreadable ({error})") from error


def check_writable(path: str | PathLike[str], *, size: Size, alpha: bool, overwrite: bool) -> Path:
    """Check before any work that a picture of this size can be written.

    Raises:
        FrameFileError: an ending that is not supported, a format that cannot hold the picture, a missing or read-only
            folder, or a file that exists already.
    """
    target = Path(path)
    if target.suffix.lower() not in WRITABLE:
        raise FrameFileError(
            f"{target}: cannot write {target.suffix or 'a file without ending'}; use {', '.join(WRITABLE)}"
        )
    if WRITABLE[target.suffix.lower()] == "JPEG":
        if alpha:
            raise FrameFileError(f"{target}: JPEG has no alpha channel; write PNG or TIFF")
        if max(size) > _JPEG_LIMIT:
            raise FrameFileError(
                f"{target}: JPEG ends at {_JPEG_LIMIT} px a side, the picture has {max(size)}; write TIFF"
            )
    if not target.parent.is_dir():
        raise FrameFileError(f"{target}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise FrameFileError(f"{target}: the folder {target.parent} is read-only")
    if target.exists() and not overwrite:
        raise FrameFileError(f"{target} exists already; choose another name or allow overwriting")
    return target


def write_frame(path: str | PathLike[str], frame: Frame, *, overwrite: bool = False) -> None:
    """Write one picture, 8 bits a channel; it appears under its name only when complete.

    JPEG is written at quality 95 without chroma subsampling, TIFF with lossless deflate, or uncompressed where it
    carries EXIF, which PIL cannot put into a compressed TIFF.

    Raises:
        FrameFileError: see `check_writable`; or the format cannot hold the picture, or writing failed.
    """
    picture = frame.picture
    target = check_writable(path, size=picture.size, alpha=picture.alpha is not None, overwrite=overwrite)
    if picture.items != 1:
        raise FrameFileError(f"{target}: a file holds one picture, got {picture.items}")
    image: Any = picture.export("pil")[0]
    form = WRITABLE[target.suffix.lower()]
    options: dict[str, Any] = dict(_SAVE_OPTIONS[form])
    if frame.icc_profile is not None:
        options["icc_profile"] = frame.icc_profile
    if frame.exif is not None:
        options["exif"] = frame.exif
        options.pop("compression", None)
    write_atomically(target, lambda part: image.save(part, format=form, **options))


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `target`, then rename it.

    Raises:
        FrameFileError: writing failed; nothing is left under either name.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(descriptor)
    except OSError as error:
        raise FrameFileError(f"{target}: cannot write there ({error})") from error
    part = Path(name)
    try:
        # mkstemp makes files private; a picture gets what any new file would get.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        write(part)
        part.replace(target)
    except (OSError, ValueError, RuntimeError) as error:
        # PIL reports what a format cannot hold, such as EXIF above 64 KiB in JPEG, in any of the three.
        raise FrameFileError(f"{target}: writing failed ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def _exif(image: Any) -> bytes | None:
    """EXIF bytes without orientation; read before the pixels, after which PIL has closed a TIFF's file."""
    exif = Image.Exif()  # a copy: the image's own still has to say how it is turned
    exif.load(image.getexif().tobytes())
    for tag in list(exif):
        if tag == _ORIENTATION or (image.format == "TIFF" and tag not in _ABOUT_THE_PICTURE):
            del exif[tag]
    return exif.tobytes() if len(exif) else None


def _refuse_deep(path: str | PathLike[str], image: Any) -> None:
    """PIL opens 16-bit colour as 8-bit without a word; the lost levels would never come back."""
    bits: tuple[int, ...] = (8,)
    if image.format == "PNG":
        with Path(path).open("rb") as file:
            bits = (file.read(25)[24],)
    elif image.format == "TIFF":
        bits = tuple(np.atleast_1d(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))).tolist())
    if max(bits) > 8 or image.mode.startswith(("I", "F")):
        raise FrameFileError(f"{path}: {max(bits)} bits a channel; files of up to 8 bits can be read, convert it first")
    if image.mode not in PIL_MODES:
        raise FrameFileError(
            f"{path}: colour mode {image.mode} is not supported; convert it to RGB with its profile first"
        )
