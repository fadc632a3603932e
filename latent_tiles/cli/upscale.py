"""`latent-tiles upscale`: one picture file in, a larger one and its sidecar out."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import Any

from latent_tiles.cli import options
from latent_tiles.cli.console import Console
from latent_tiles.errors import FrameFileError

_DRAWN_SEED_BITS = 32
"""Short enough to be typed again."""


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "upscale",
        help="enlarge a photograph",
        description="Enlarge a photograph tile by tile. OUT.json, beside the result, tells how it was made. "
        "PNG, JPEG and TIFF of 8 bits a channel; profile, EXIF and alpha are kept. Sizes are height x width.",
        epilog="example: latent-tiles upscale photo.jpg photo_x4.png --scale 4 --seed 7",
    )
    parser.add_argument("source", metavar="IN", type=options.path, help="picture to enlarge")
    parser.add_argument("target", metavar="OUT", type=options.path, help="result: .png, .jpg or .tif")
    parser.add_argument("--scale", type=float, metavar="K", help="enlargement, at least 1 (default: the model's)")
    options.add_model_options(parser)
    options.add_sampling_options(parser)
    options.add_tiling_options(parser)
    options.add_vae_options(parser)
    options.add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LatentTilesError: bad input, before the model is loaded where that is possible; or a failed run.
    """
    console = Console(quiet=arguments.quiet, as_json=arguments.json)
    source, target = arguments.source, arguments.target
    _refuse_same_file(source, target)
    from latent_tiles.cli.failures import writing
    from latent_tiles.cli.loading import load_model, quiet_libraries, resolve_device
    from latent_tiles.cli.rendering import render, summary
    from latent_tiles.frames.files import Frame, check_writable, read_frame
    from latent_tiles.frames.picture import scaled_size

    frame = read_frame(source)
    alpha = frame.picture.alpha is not None

    def check_target(scale: float) -> None:
        size = scaled_size(frame.picture.size, scale)
        check_writable(target, size=size, alpha=alpha, overwrite=arguments.overwrite)

    check_target(1 if arguments.scale is None else arguments.scale)
    tiling, vae_options = options.tiling_of(arguments), options.vae_options_of(arguments)
    device = resolve_device(arguments.device)
    with quiet_libraries():
        from latent_tiles.pipelines.sidecar import Source, check_sidecar, sidecar, sidecar_path, write_with_sidecar

        check_sidecar(target, overwrite=arguments.overwrite)
        # Hashed now: the file may be changed while the model runs.
        origin = Source.of_file(source)
        loaded = load_model(
            arguments.model,
            device=device,
            dtype=arguments.dtype,
            attention=arguments.attention,
            show_downloads=console.shows_progress,
        )
        scale = loaded.pipe.tile_defaults.scale if arguments.scale is None else arguments.scale
        check_target(scale)
        seed = secrets.randbits(_DRAWN_SEED_BITS) if arguments.seed is None else arguments.seed
        if not console.shows_progress:
            console.note(f"enlarging {source} x{scale:g} on {device}, seed {seed}")
        picture, report = render(
            loaded,
            console,
            image=frame.picture.to_channels(),
            scale=scale,
            seed=seed,
            arguments={"tiling": tiling, "vae_options": vae_options, **options.host_arguments_of(arguments)},
        )
        content = sidecar(report, command="upscale", model=loaded.identity, source=origin, runtime=loaded.runtime)
    with writing():
        result = Frame(picture=picture, icc_profile=frame.icc_profile, exif=frame.exif)
        content = write_with_sidecar(target, result, content, overwrite=arguments.overwrite)
    console.result(summary(report, loaded, picture=str(source), files=(target, sidecar_path(target))), content)
    return 0


def _refuse_same_file(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve() or (source.exists() and target.exists() and source.samefile(target)):
        raise FrameFileError(f"{target} is the source itself; write the result to another file")
