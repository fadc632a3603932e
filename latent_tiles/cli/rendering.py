"""One tiled call as the commands make it, and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tiles.cli.failures import RunError
from latent_tiles.cli.progress import TileBar

if TYPE_CHECKING:
    from latent_tiles.cli.console import Console
    from latent_tiles.cli.loading import LoadedModel
    from latent_tiles.frames.picture import Picture
    from latent_tiles.pipelines.report import UpscaleReport


def render(
    loaded: LoadedModel, console: Console, *, image: Any, scale: float, seed: int, arguments: Mapping[str, Any]
) -> tuple[Picture, UpscaleReport]:
    """Upscale one picture.

    Args:
        loaded: the model.
        console: whether a bar is drawn.
        image: anything that the pipeline takes; one picture.
        scale: enlargement.
        seed: of the noise.
        arguments: everything else for the call, `tiling` among it.

    Raises:
        LatentTilesError: bad input; before the model has run.
        RunError: the model computed NaN or infinite values.
    """
    from latent_tiles.frames.inputs import as_picture

    with TileBar(shown=console.shows_progress) as bar:
        output = loaded.pipe(image, scale=scale, seed=seed, progress=bar, output_type="pt", **arguments)
    images = output.images.float().cpu()
    if not bool(images.isfinite().all()):
        msg = f"the model computed NaN or infinite values in {loaded.runtime.dtype}; use --dtype float32"
        raise RunError(msg)
    return as_picture(images), output.report


def summary(
    report: UpscaleReport, loaded: LoadedModel, *, picture: str, files: Sequence[Path]
) -> list[tuple[str, str]]:
    """Rows of the table that a person reads at the end."""
    grid, seconds = report.grid, report.seconds
    phases = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("encode", "denoise", "decode"))
    megapixels = report.output_size[0] * report.output_size[1] / 1e6
    memory = [
        f"{amount:.0f} MiB {place}"
        for place, amount in (("host", report.peak_host_mib), ("device", report.peak_device_mib))
        if amount is not None
    ]
    rows = [
        ("picture", f"{picture}, {_px(report.source_size)}"),
        ("result", f"{_px(report.output_size)}, x{report.settings['scale']:g}"),
        ("model", f"{loaded.identity.name} ({loaded.runtime.device}, {loaded.runtime.dtype})"),
        ("tiles", f"{grid.tiles} ({len(grid.rows)} x {len(grid.columns)}) of {_px(grid.tile)}"),
        ("steps", str(report.model_calls)),
        ("time", f"{seconds['total']:.1f} s, {seconds['total'] / megapixels:.1f} s/MP ({phases})"),
        ("memory", ", ".join(memory) or "unknown"),
        ("seed", ", ".join(map(str, report.seeds or ())) or "the host's own"),
    ]
    if report.nsfw and any(report.nsfw):
        rows.append(("warning", "the model's safety checker found the result not safe for work"))
    return [*rows, *((("files" if index == 0 else ""), str(file)) for index, file in enumerate(files))]


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"
