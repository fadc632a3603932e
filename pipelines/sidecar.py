"""What a result on disk says about itself: `photo.png` has `photo.png.json` beside it.

Enough to repeat the run, and to notice when anything that went into it, or the picture itself, was changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from latent_tiles.errors import FrameFileError
from latent_tiles.frames.files import Frame, check_writable, write_atomically, write_frame
from latent_tiles.pipelines.report import UpscaleReport

SCHEMA = 1
_LIBRARIES = ("latent-tiles", "torch", "diffusers", "transformers")
_COMMIT_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model made a result.

    Args:
        name: what the user asked for: an id on the hub, a folder as typed, or a name in words.
        commit: commit of the snapshot, for models of the hub where it is known.
        weights: SHA-256 of every weight file by its path in the folder, for local models.
    """

    name: str
    commit: str | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a result was made from.

    Args:
        name: the file as typed, or a name in words.
        sha256: of the file, or None where there is none.
    """

    name: str
    sha256: str | None = None

    @classmethod
    def of_file(cls, path: str | PathLike[str]) -> Source:
        """The identity of a file.

        Raises:
            FrameFileError: it cannot be read.
        """
        return cls(name=os.fspath(path), sha256=file_sha256(Path(path)))


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where the models ran.

    Args:
        device: kind of device, e.g. "cuda".
        dtype: of the denoiser's weights, e.g. "float16".
        attention: kernel of the attention.
    """

    device: str
    dtype: str
    attention: str


def sidecar(
    report: UpscaleReport, *, command: str, model: ModelIdentity, source: Source, runtime: Runtime
) -> dict[str, Any]:
    """The sidecar of a result, but for the result's own name and hash.

    Args:
        report: what the call did.
        command: which command of ours made it, e.g. "upscale".
        model: which model.
        source: from what.
        runtime: where.

    Returns:
        Plain values for JSON. Lengths are pixels, times seconds; lists of two are [height, width].
    """
    versions = {name: version(name) for name in _LIBRARIES}
    return {
        "schema": SCHEMA,
        "command": command,
        "versions": {**versions, "python": platform.python_version(), "platform": platform.platform()},
        "model": {"host": report.host, **asdict(model)},
        "source": {**asdict(source), "size": list(report.source_size)},
        "output": {"size": list(report.output_size)},
        "seeds": None if report.seeds is None else list(report.seeds),
        "settings": report.settings,
        "grid": asdict(report.grid),
        "run": {
            **asdict(runtime),
            "model_calls": report.model_calls,
            "tiles_run": report.tiles_run,
            "seconds": report.seconds,
            "vae": [entry.as_dict() for entry in report.vae],
            "peak_device_mib": report.peak_device_mib,
            "peak_host_mib": report.peak_host_mib,
        },
        "nsfw": None if report.nsfw is None else list(report.nsfw),
    }


def sidecar_path(result: str | PathLike[str]) -> Path:
    """Where the sidecar of a result lies: the same name with `.json` behind it."""
    path = Path(result)
    return path.with_name(path.name + ".json")


def check_sidecar(result: str | PathLike[str], *, overwrite: bool) -> Path:
    """Check before any work that the sidecar of a result can be written.

    Raises:
        FrameFileError: a file of that name exists already, or the name is a folder's.
    """
    path = sidecar_path(result)
    if path.is_dir():
        raise FrameFileError(f"{path}: the sidecar's name is taken by a folder")
    if path.exists() and not overwrite:
        raise FrameFileError(f"{path} exists already; choose another name or allow overwriting")
    return path


def read_sidecar(result: str | PathLike[str]) -> dict[str, Any] | None:
    """The sidecar of a result; None where there is none, or what lies there is not one of ours."""
    try:
        content: Any = json.loads(sidecar_path(result).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None


def write_sidecar(result: str | PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write the sidecar of a result; it appears under its name only when complete.

    Raises:
        FrameFileError: writing failed.
    """
    path = sidecar_path(result)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path


def write_with_sidecar(
    target: str | PathLike[str], frame: Frame, content: Mapping[str, Any], *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a result and its sidecar so that no picture stands under its name incomplete or without its sidecar.

    The picture is written under a hidden name and hashed, then the sidecar with that hash appears, and last the picture
    under its own name. Killed in between, a sidecar is left whose hash fits no picture, which anyone can tell; the
    other order would leave a picture of which nobody knows how it was made.

    Args:
        target: file of the result.
        frame: the result.
        content: see `sidecar`.
        overwrite: whether files of these names may be replaced.

    Returns:
        The content with the result's name and SHA-256, as it was written.

    Raises:
        FrameFileError: see `write_frame`; nothing new is left under either name.
    """
    size, alpha = frame.picture.size, frame.picture.alpha is not None
    path = check_writable(target, size=size, alpha=alpha, overwrite=overwrite)
    had_sidecar = check_sidecar(path, overwrite=overwrite).exists()
    hidden = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    placed = False
    try:
        write_frame(hidden, frame)
        output = {"name": path.name, "sha256": file_sha256(hidden), "size": list(size)}
        complete = {**content, "output": output}
        write_sidecar(path, complete)
        hidden.replace(path)
        placed = True
    except OSError as error:
        if isinstance(error, FrameFileError):
            raise
        raise FrameFileError(f"{path}: writing failed ({error})") from error
    finally:
        hidden.unlink(missing_ok=True)
        if not placed and not had_sidecar:
            sidecar_path(path).unlink(missing_ok=True)
    return complete


def identify_model(model: str | PathLike[str], *, name: str | None = None) -> ModelIdentity:
    """Name, commit and weights of a model, to be told apart from any other.

    Args:
        model: folder of a diffusers pipeline, or its id on the hub, already loaded once.
        name: what to call it; the folder or id as given by default.
    """
    text = os.fspath(model)
    folder = Path(text)
    if folder.is_dir():
        files = sorted(folder.rglob("*.safetensors"))
        weights = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        return ModelIdentity(name=name or text, weights=weights)
    return ModelIdentity(name=name or text, commit=_cached_commit(text))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        FrameFileError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FrameFileError(f"{path}: cannot be read ({error})") from error


def _cached_commit(hub_id: str) -> str | None:
    """The commit of a hub model's snapshot, which the cache names its folder after."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "model_index.json")
    commit = Path(path).parent.name if isinstance(path, str) else ""
    return commit if len(commit) == _COMMIT_LENGTH else None
