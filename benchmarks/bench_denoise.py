"""What tiled denoising costs.

Two questions, each answered by ratios within one run:

1. Machinery: a tiled prediction over a canvas of many tiles, against the same model calls on tiles that lie ready cut.
2. The job: one frame through the tiled pipeline, through one untiled call, and through the plain loop that people write
   by hand (one host call for each tile, run to the end, blended in pixels), with the same tile, overlap and window.

Run: python benchmarks/bench_denoise.py [--json figures.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, table
from torch import Tensor

from latent_tiles import LatentTiledUpscalePipeline, Size, Tiling, plan_grid
from latent_tiles.canvas import TileCanvas
from latent_tiles.denoiser import TiledDenoiser
from latent_tiles.families import family_of
from latent_tiles.frames import as_picture
from latent_tiles.memory import build_memory
from latent_tiles.noise import NoiseField
from latent_tiles.windows import cosine, tile_weights

SEED = 7


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an InstructPix2Pix model; the shipped reference model by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grid", type=int, default=8, help="tiles on a side in the first question")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile in output pixels")
    parser.add_argument(
        "--side", type=int, default=1024, help="side of the frame in the second question, output pixels"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.model is None:
        from latent_tiles import reference_model

        options.model = str(reference_model())
    pipe = LatentTiledUpscalePipeline.from_pretrained(options.model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    clock = _Clock(device)
    with torch.inference_mode():
        machinery = [
            # Quick and near the noise of a shared machine: many more rounds.
            measure_machinery(pipe, clock, options.grid, options.tile, batch, memory, 4 * options.repeats)
            for memory, batch in (("none", 1), ("none", 4), ("pin", 1))
        ]
    job = measure_job(pipe, clock, options.side, options.tile, options.repeats)
    figures = {"environment": environment(device, dtype), "machinery": machinery, "job": job}
    print(render(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, work: Callable[[], Any]) -> float:
        """Seconds of one run, the device's work included."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def alternate(clock: _Clock, works: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds of each work, run in turn, so that a machine whose speed drifts drifts for all; one warm-up each."""
    for work in works:
        work()
    rounds = [[clock(work) for work in works] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def measure_machinery(
    pipe: Any, clock: _Clock, side: int, tile_px: int, batch: int, memory: str, repeats: int
) -> dict[str, Any]:
    """One prediction over side x side tiles, against the bare model calls."""
    unet, factor = pipe.unet, int(pipe.vae_scale_factor)
    tile = tile_px // factor
    overlap = tile // 8
    multiple = pipe._host.units(pipe).multiple_of
    length = tile + (side - 1) * ((tile - overlap) // multiple * multiple)
    grid = plan_grid((length, length), tile, overlap, multiple_of=multiple)
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    sample = random(1, unet.config.in_channels, length, length)
    text = random(1, 16, unet.config.cross_attention_dim)
    pipe.scheduler.set_timesteps(8, device=unet.device)
    timestep = pipe.scheduler.timesteps[4]
    cut = [sample[:, :, box.top : box.bottom, box.left : box.right].contiguous() for box in grid]
    ready = [torch.cat(cut[start : start + batch]) for start in range(0, len(cut), batch)]

    def bare() -> None:
        for tiles in ready:
            unet(
                sample=tiles,
                timestep=timestep,
                encoder_hidden_states=text.expand(len(tiles), -1, -1),
                return_dict=False,
            )

    denoiser = TiledDenoiser(
        plan_grid=lambda canvas: grid,
        window=cosine,
        memory=build_memory(memory),
        tile_batch=batch,
        scheduler=pipe.scheduler,
        noise=NoiseField(seeds=(SEED,)),
        branches=lambda: (1.0,),
    )

    def tiled() -> None:
        arguments = {"encoder_hidden_states": text, "return_dict": False}
        denoiser.clock.stepped()
        denoiser.predict(family_of(unet)(unet, unet.forward, (sample, timestep), arguments))

    bare_seconds, tiled_seconds = alternate(clock, [bare, tiled], repeats)
    ratios = [with_tiles / without for with_tiles, without in zip(tiled_seconds, bare_seconds, strict=True)]
    return {
        "memory": memory,
        "tiles": len(grid),
        "tile_batch": batch,
        "tile_latents": tile,
        "bare_seconds": statistics.median(bare_seconds),
        "tiled_seconds": statistics.median(tiled_seconds),
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
        "overhead_percent_range": [100 * (min(ratios) - 1), 100 * (max(ratios) - 1)],
    }


def measure_job(pipe: Any, clock: _Clock, side: int, tile: int, repeats: int) -> dict[str, Any]:
    """One frame in three ways."""
    from skimage import data

    source = as_picture(data.astronaut()).resized(Size(side // 4, side // 4)).rgb
    arguments = {"scale": 4, "seed": SEED, "output_type": "pt"}
    tiling = Tiling(tile=tile, overlap=tile // 8)

    def untiled() -> Any:
        return pipe(source, tiling=Tiling(tile=side, overlap=0), **arguments)

    def tiled() -> Any:
        return pipe(source, tiling=tiling, **arguments)

    def pinned() -> Any:
        return pipe(source, tiling=Tiling(tile=tile, overlap=tile // 8, memory="pin"), **arguments)

    def plain_loop() -> Tensor:
        frame = as_picture(source).resized(Size(side, side)).rgb
        grid = plan_grid((side, side), tile, tile // 8, multiple_of=pipe._host.units(pipe).multiple_px)
        canvas = TileCanvas(rows=1, channels=3, size=grid.frame)
        for index, box in enumerate(grid):
            rows, columns = box.to_slices()
            out = pipe(
                frame[:, :, rows, columns], scale=1, seed=SEED, output_type="pt", tiling=Tiling(tile=tile, overlap=0)
            )
            canvas.add(box, out.images.cpu(), tile_weights(grid, index, cosine))
        return canvas.finish()

    works = {"untiled": untiled, "tiled": tiled, "tiled, pin": pinned, "plain loop": plain_loop}
    seconds = dict(zip(works, alternate(clock, list(works.values()), repeats), strict=True))
    oracle = untiled().images.cpu()
    images = {"tiled": tiled().images, "tiled, pin": pinned().images, "plain loop": plain_loop()}
    report = tiled().report
    return {
        "side_px": side,
        "tile_px": tile,
        "tiles": report.grid.tiles,
        "cost": report.grid.cost,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_to_untiled": {
            name: statistics.median(a / b for a, b in zip(values, seconds["untiled"], strict=True))
            for name, values in seconds.items()
        },
        "psnr_to_untiled_db": {name: psnr(image.cpu(), oracle) for name, image in images.items()},
    }


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * math.log10(float(((image - reference) ** 2).mean()))


def span(ends: list[float]) -> str:
    """A range of percentages."""
    return " to ".join(f"{end:+.1f}" for end in ends)


def render(figures: dict[str, Any]) -> str:
    """The tables."""
    rows = [
        [
            entry["memory"],
            f"{entry['tiles']} x {entry['tile_latents']}^2",
            str(entry["tile_batch"]),
            f"{entry['bare_seconds']:.2f} s",
            f"{entry['overhead_percent']:+.1f} % ({span(entry['overhead_percent_range'])})",
        ]
        for entry in figures["machinery"]
    ]
    job = figures["job"]
    ways = [
        [
            name,
            f"{job['seconds'][name]:.2f} s",
            f"{job['ratio_to_untiled'][name]:.2f}",
            f"{job['psnr_to_untiled_db'][name]:.1f} dB" if name in job["psnr_to_untiled_db"] else "-",
        ]
        for name in job["seconds"]
    ]
    return "\n\n".join(
        [
            f"{figures['environment']}",
            table(["memory", "tiles, latents", "tile batch", "bare model calls", "machinery on top"], rows),
            f"{job['side_px']} px, {job['tiles']} tiles of {job['tile_px']} px, {job['cost']:.2f} x latent pixels",
            table(["way", "time", "against untiled", "PSNR to untiled"], ways),
        ]
    )


if __name__ == "__main__":
    main()
