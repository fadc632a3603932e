"""`latent-tiles demo`: a bundled photograph, enlarged, with its sidecar and a picture to compare."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tiles.cli import options
from latent_tiles.cli.console import Console
from latent_tiles.errors import FrameFileError

if TYPE_CHECKING:
    from latent_tiles.frames.comparison import TileLayout
    from latent_tiles.frames.files import Frame
    from latent_tiles.frames.picture import Picture
    from latent_tiles.pipelines.report import UpscaleReport
    from latent_tiles.pipelines.sidecar import Source

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "moon", "rocket")
"""Photographs that scikit-image carries in its wheel, so that the demo needs no network."""

_PICTURE = "chelsea"
_SEED = 7
_SCALE = 4.0


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="enlarge a bundled photograph and show what came of it",
        description="Enlarge a photograph that comes with scikit-image. Writes the result, its sidecar and a comparison"
        " of source, bicubic and result with the tiles drawn over the frame. Files of an earlier demo are replaced; "
        "others are not, unless --overwrite is given.",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=options.path, default=Path("demo"), help="folder of the results (default: demo)"
    )
    parser.add_argument(
        "--picture",
        metavar="NAME_OR_FILE",
        default=_PICTURE,
        help=f"{', '.join(PHOTOGRAPHS)}, or a file (default: {_PICTURE})",
    )
    parser.add_argument(
        "--scale", type=float, metavar="K", default=_SCALE, help=f"enlargement, at least 1 (default: {_SCALE:g})"
    )
    options.add_seed_option(parser, default=_SEED)
    options.add_model_options(parser)
    options.add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LatentTilesError: bad input, before the model is loaded; or a failed run.
    """
    console = Console(quiet=arguments.quiet, as_json=arguments.json)
    from latent_tiles.cli.failures import writing
    from latent_tiles.cli.loading import load_model, quiet_libraries, resolve_device
    from latent_tiles.cli.rendering import render, summary
    from latent_tiles.frames.files import Frame, check_writable, write_atomically
    from latent_tiles.frames.picture import scaled_size

    frame, file = _photograph(arguments.picture)
    size = scaled_size(frame.picture.size, arguments.scale)
    stem = f"{file.stem}_x{arguments.scale:g}"
    target, compared = arguments.out / f"{stem}.png", arguments.out / f"{stem}_comparison.png"
    if file.resolve() in (target.resolve(), compared.resolve()):
        raise FrameFileError(f"{file} is where the demo would write; choose another folder with --out")
    if not arguments.overwrite:
        _refuse_foreign(target, compared)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FrameFileError(f"{arguments.out}: cannot make this folder ({error})") from error
    for path in (target, compared):
        check_writable(path, size=size, alpha=False, overwrite=True)
    device = resolve_device(arguments.device)
    with quiet_libraries():
        from latent_tiles.pipelines.sidecar import sidecar, sidecar_path, write_with_sidecar

        origin = _source(arguments.picture, file)
        loaded = load_model(
            arguments.model,
            device=device,
            dtype=arguments.dtype,
            attention=arguments.attention,
            show_downloads=console.shows_progress,
        )
        if not console.shows_progress:
            console.note(f"enlarging {origin.name} x{arguments.scale:g} on {device} with {loaded.identity.name}")
        picture, report = render(
            loaded,
            console,
            image=frame.picture.to_channels(),
            scale=arguments.scale,
            seed=arguments.seed,
            arguments={},
        )
        content = sidecar(report, command="demo", model=loaded.identity, source=origin, runtime=loaded.runtime)
    image = _compare(frame.picture, picture, report, title=origin.name, model=loaded.identity.name)
    encoded, digest = _encoded(image, frame)
    content["comparison"] = {"name": compared.name, "sha256": digest}
    with writing():
        result = Frame(picture=picture, icc_profile=frame.icc_profile, exif=frame.exif)
        content = write_with_sidecar(target, result, content, overwrite=True)
        write_atomically(compared, lambda part: part.write_bytes(encoded))
    files = (target, sidecar_path(target), compared)
    console.result(summary(report, loaded, picture=origin.name, files=files), content)
    return 0


def _photograph(name: str) -> tuple[Frame, Path]:
    """The picture and the file it lies in.

    Raises:
        FrameFileError: no such picture, or scikit-image is missing.
    """
    from latent_tiles.frames.files import read_frame

    if name in PHOTOGRAPHS:
        try:
            import skimage.data as photographs
        except ImportError:
            msg = f"the photograph {name!r} comes with scikit-image; pip install 'latent-tiles[demo]', or name a file"
            raise FrameFileError(msg) from None
        folder = Path(photographs.data_dir)
        file = next((path for path in sorted(folder.glob(f"{name}.*")) if path.suffix in {".png", ".jpg"}), None)
        if file is None:
            raise FrameFileError(f"this scikit-image does not carry the photograph {name!r}; choose another, or a file")
        return read_frame(file), file
    if not Path(name).is_file():
        raise FrameFileError(
            f"{name}: no such file, and no photograph of that name; known are {', '.join(PHOTOGRAPHS)}"
        )
    return read_frame(name), Path(name)


def _source(name: str, file: Path) -> Source:
    from latent_tiles.pipelines.sidecar import Source, file_sha256

    # Where scikit-image lies is this machine's business; what it carries is not.
    return Source(name=f"{name} (scikit-image)" if name in PHOTOGRAPHS else name, sha256=file_sha256(file))


def _refuse_foreign(target: Path, compared: Path) -> None:
    """Only what an earlier demo wrote, and nobody has changed since, may be replaced unasked.

    Raises:
        FrameFileError: a file of one of these names that is not such a one.
    """
    from latent_tiles.pipelines.sidecar import file_sha256, read_sidecar, sidecar_path

    beside = sidecar_path(target)
    content = read_sidecar(target) or {}
    ours = content if content.get("command") == "demo" else {}
    for path, key in ((target, "output"), (compared, "comparison")):
        if path.exists() and ours.get(key, {}).get("sha256") != file_sha256(path):
            raise FrameFileError(
                f"{path} exists already and is not an earlier demo's; give --overwrite or another --out"
            )
    if beside.exists() and not ours:
        raise FrameFileError(f"{beside} exists already and is not an earlier demo's; give --overwrite or another --out")


def _compare(source: Picture, result: Picture, report: UpscaleReport, *, title: str, model: str) -> Any:
    from latent_tiles.frames.comparison import comparison

    settings = report.settings
    return comparison(
        source,
        result,
        _layout(report),
        title=f"{title}, x{settings['scale']:g}",
        notes=(
            model,
            f"{report.model_calls} steps, memory {settings['memory']}, seed {', '.join(map(str, report.seeds or ()))}",
            f"{report.seconds['total']:.1f} s",
        ),
    )


def _layout(report: UpscaleReport) -> TileLayout:
    """The grid in pixels of the output, which a host that enlarges by a factor of its own may have been reduced to."""
    from latent_tiles.frames.comparison import TileLayout

    grid = report.grid
    down, across = (out / made for out, made in zip(report.output_size, grid.content, strict=True))
    return TileLayout(
        rows=tuple(round(top * down) for top in grid.rows),
        columns=tuple(round(left * across) for left in grid.columns),
        tile=(round(grid.tile[0] * down), round(grid.tile[1] * across)),
    )


def _encoded(image: Any, frame: Frame) -> tuple[bytes, str]:
    """The picture as PNG in the source's colour space, and its hash."""
    import hashlib

    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **({} if frame.icc_profile is None else {"icc_profile": frame.icc_profile}))
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()
