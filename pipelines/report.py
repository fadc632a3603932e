"""What a call reports about itself."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from latent_tiles.geometry import TileGrid
from latent_tiles.vae.report import VaeReport


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a call stands.

    Args:
        step: which call of the model is running, from 1.
        steps: calls of the model in all.
        tiles: tiles that are finished, over all steps.
        tiles_total: tiles in all, over all steps.
    """

    step: int
    steps: int
    tiles: int
    tiles_total: int


@dataclass(frozen=True, kw_only=True)
class GridReport:
    """The grid of a call; lengths in pixels of what the model made.

    That is the output, padded at the lower right, and for hosts that always enlarge by their own factor before it is
    reduced to the output's size.

    Args:
        frame: height and width, padded.
        content: height and width without the padding; the output's, unless it was reduced afterwards.
        tile: height and width of a tile.
        rows: top of each row of tiles.
        columns: left of each column of tiles.
        tiles: number of tiles.
        cost: latent pixels through the model over latent pixels of the frame.
    """

    frame: tuple[int, int]
    content: tuple[int, int]
    tile: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tiles: int
    cost: float

    @classmethod
    def of(cls, grid: TileGrid, *, pixels_per_latent: int, content: tuple[int, int]) -> GridReport:
        """The report of a grid of latents over a frame with this content."""

        def px(latents: int) -> int:
            return latents * pixels_per_latent

        return cls(
            frame=(px(grid.frame.height), px(grid.frame.width)),
            content=content,
            tile=(px(grid.tile.height), px(grid.tile.width)),
            rows=tuple(px(span.start) for span in grid.rows),
            columns=tuple(px(span.start) for span in grid.columns),
            tiles=len(grid),
            cost=grid.cost,
        )


@dataclass(frozen=True, kw_only=True)
class UpscaleReport:
    """What a call did.

    Args:
        host: class of the diffusers pipeline.
        source_size: height and width of the source.
        output_size: height and width of the result.
        grid: where the tiles lay.
        seeds: seeds of the noise field, one for each item; None where the host drew its own noise.
        settings: effective settings, defaults filled in.
        model_calls: calls of the denoiser that the host made.
        tiles_run: tiles that went through the model, over all calls.
        seconds: time for "encode", "denoise", "decode" and "total".
        vae: what each encode and decode cost and measured; empty where the autoencoder was left alone.
        peak_device_mib: peak memory on the accelerator, or None on a CPU.
        peak_host_mib: peak memory of the process so far, or None where the system does not tell.
        nsfw: the host's safety checker's finding for each result, or None.
    """

    host: str
    source_size: tuple[int, int]
    output_size: tuple[int, int]
    grid: GridReport
    seeds: tuple[int, ...] | None
    settings: dict[str, Any]
    model_calls: int
    tiles_run: int
    seconds: dict[str, float]
    vae: tuple[VaeReport, ...]
    peak_device_mib: float | None
    peak_host_mib: float | None
    nsfw: tuple[bool, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def peak_host_mib() -> float | None:
    """Peak resident memory of this process in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
