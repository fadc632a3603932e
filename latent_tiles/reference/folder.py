"""Where the reference model lies, and whether it is what was shipped."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from latent_tiles.errors import ModelFolderError

CHECKSUMS = "SHA256SUMS"
"""List of the model's files in the form that `sha256sum` writes and checks."""

DESCRIPTION = "latent-tiles reference model 1 (small, still undertrained)"
"""What the command line says about the model it runs by default."""

_MODEL = Path(__file__).parent / "model"
_FIX = "reinstall latent-tiles"


def reference_model(*, folder: Path | None = None) -> Path:
    """The reference model's folder, after every file in it was found to be as shipped.

    Files are hashed once a process.

    Args:
        folder: another folder with a SHA256SUMS, instead of the one in the package.

    Returns:
        The folder, for `LatentTiledUpscalePipeline.from_pretrained`.

    Raises:
        ModelFolderError: the folder, its SHA256SUMS or a file is missing, or a file was changed.

    Example:
        >>> from latent_tiles import LatentTiledUpscalePipeline
        >>> pipe = LatentTiledUpscalePipeline.from_pretrained(reference_model())  # doctest: +SKIP
    """
    return _verified(_MODEL if folder is None else folder)


@functools.cache
def _verified(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelFolderError(f"the reference model is missing: {folder} is not a folder; {_FIX}")
    for name, expected in _listed(folder / CHECKSUMS).items():
        path = folder / name
        if not path.is_file():
            raise ModelFolderError(f"the reference model is incomplete: {path} is missing; {_FIX}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            msg = f"the reference model was changed: {path} has SHA-256 {found}, expected {expected}; {_FIX}"
            raise ModelFolderError(msg)
    return folder


def _listed(path: Path) -> Mapping[str, str]:
    """Relative path and hash of every file that a SHA256SUMS names."""
    if not path.is_file():
        raise ModelFolderError(f"the reference model is incomplete: {path} is missing; {_FIX}")
    listed: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        digest, _, name = line.partition(" ")
        # The second character after the hash is a space (text) or an asterisk (binary).
        if len(digest) != 64 or len(name) < 2:
            raise ModelFolderError(f"{path}, line {number}: expected '<SHA-256>  <file>', got {line!r}; {_FIX}")
        listed[name[1:]] = digest.lower()
    if not listed:
        raise ModelFolderError(f"{path} lists no file; {_FIX}")
    return listed
