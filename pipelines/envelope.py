"""What happens around one call of a host pipeline.

The host keeps its loop, scheduler, guidance, LoRA, adapters and offload. Around one call we enlarge the image, pad it
to what the model needs, give the host our noise, replace the denoiser's forward by a tiled one, and put all of it back.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from latent_tiles.denoiser import Clock, TiledDenoiser
from latent_tiles.errors import CanvasError
from latent_tiles.geometry import Size, TileGrid
from latent_tiles.memory import build_memory
from latent_tiles.noise import NoiseField
from latent_tiles.patches import patched
from latent_tiles.pipelines.defaults import ModelDefaults
from latent_tiles.pipelines.hosts import Host
from latent_tiles.pipelines.job import (
    Job,
    Request,
    effective_settings,
    finish,
    host_arguments,
    host_image,
    noise_of,
    prepare,
)
from latent_tiles.pipelines.noise_scope import field_noise
from latent_tiles.pipelines.report import GridReport, Progress, UpscaleReport, peak_host_mib
from latent_tiles.pipelines.tiled_model import denoiser_of, tiled_forward
from latent_tiles.pipelines.timing import Stopwatch, Timed
from latent_tiles.vae.exact import ExactVae, exact_vae
from latent_tiles.windows import resolve_window

_LOG = logging.getLogger(__name__)


def upscale(
    pipe: Any, host: Host, defaults: ModelDefaults, call_host: Callable[..., Any], request: Request
) -> tuple[Any, UpscaleReport]:
    """Run one tiled call of a host.

    Args:
        pipe: the host pipeline.
        host: what is particular to its class.
        defaults: settings where the request has none.
        call_host: the host's own `__call__`, bound.
        request: the caller's arguments.

    Returns:
        The images in the requested form, and the report.

    Raises:
        LatentTilesError: one of its leaves, for bad input; before any model has run.
    """
    job = prepare(pipe, host, defaults, call_host, request)
    if getattr(pipe, "watermarker", None) is not None:
        # The x4 host marks only what it makes a PIL image of itself, which is 8 bits deep.
        _LOG.warning("the pipeline's watermarker is not applied to tiled results")
    device = torch.device(pipe._execution_device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch, clock = Stopwatch(device), Clock()
    noise, seeds, generator = noise_of(job, request)
    denoiser = TiledDenoiser(
        plan_grid=lambda canvas: _planned(job, canvas),
        window=resolve_window(job.tiling.window),
        memory=build_memory(job.tiling.memory or "none"),
        tile_batch=job.tiling.tile_batch,
        scheduler=pipe.scheduler,
        noise=noise,
        branches=lambda: host.branches(pipe, job.arguments),
        clock=clock,
        on_tiles=_progress(pipe, job, clock, request.progress or _tell_nobody),
    )
    image = host_image(job, host)
    # The autoencoder first, so that noise and watch, which wrap its methods, wrap those that run.
    with exact_vae(pipe.vae, job.vae) as exact, installed(pipe, denoiser, noise, watch):
        if exact is not None:
            _foresee(exact, job, host, rows=image.shape[0], device=device, decodes=request.output_type != "latent")
        output = call_host(
            image=image,
            generator=generator if noise is None else _spare_generator(host),
            output_type="latent" if request.output_type == "latent" else "pt",
            return_dict=True,
            **host_arguments(host, job),
        )
    images = output.images if request.output_type == "latent" else finish(output.images, job, request.output_type)
    nsfw = getattr(output, "nsfw_content_detected", None)
    report = UpscaleReport(
        host=host.name,
        source_size=job.source.size,
        output_size=job.target,
        grid=GridReport.of(job.grid, pixels_per_latent=job.units.pixels_per_latent, content=job.working),
        seeds=seeds,
        settings=effective_settings(job),
        model_calls=clock.model_calls,
        tiles_run=clock.tiles,
        seconds=watch.finish(),
        vae=() if exact is None else tuple(exact.reports),
        peak_device_mib=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        peak_host_mib=peak_host_mib(),
        nsfw=None if nsfw is None else tuple(bool(flag) for flag in nsfw),
    )
    return images, report


def _foresee(exact: ExactVae, job: Job, host: Host, *, rows: int, device: torch.device, decodes: bool) -> None:
    """Plan the whole call's work of the autoencoder before any of it: a budget must not fail after an hour's denoising.

    Raises:
        BudgetError: one cannot be met.
    """
    dtype = torch.float32 if getattr(exact.vae.config, "force_upcast", False) else None
    if not host.enlarges:
        exact.plan("encode", *job.padded, rows=rows, device=device, dtype=dtype)
    if decodes:
        latents = (length // job.units.pixels_per_latent for length in job.padded)
        exact.plan("decode", *latents, rows=rows, device=device, dtype=dtype)


def _planned(job: Job, canvas: Size) -> TileGrid:
    """The grid, for the canvas it was planned for."""
    if canvas != job.grid.frame:
        raise CanvasError(f"the host's canvas of {tuple(canvas)} latents is not the planned {tuple(job.grid.frame)}")
    return job.grid


def _spare_generator(host: Host) -> torch.Generator | None:
    """The x4 host draws noise in its own body, which the field replaces where it is used: not from torch's global."""
    return torch.Generator() if host.enlarges else None


@contextmanager
def installed(
    pipe: Any, denoiser: TiledDenoiser, noise: NoiseField | None, watch: Stopwatch
) -> Generator[None, None, None]:
    """Everything that is replaced for the length of a call; left in reverse order, also when the call raises."""
    clock, original_step = denoiser.clock, pipe.scheduler.step

    # `wraps`: hosts read the signature of `step` to learn what it takes.
    @functools.wraps(original_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original_step(*args, **kwargs)
        clock.stepped()
        watch.stepped()
        return result

    with ExitStack() as stack:
        stack.enter_context(watch.watching(pipe.vae, "encode"))
        stack.enter_context(watch.watching(pipe.vae, "decode"))
        stack.enter_context(patched(pipe.scheduler, "step", step))
        if noise is not None:
            stack.enter_context(field_noise(pipe, noise, clock))
        stack.enter_context(tiled_forward(denoiser_of(pipe), Timed(denoiser=denoiser, watch=watch)))
        yield


def _tell_nobody(progress: Progress) -> None:
    del progress


def _progress(pipe: Any, job: Job, clock: Clock, tell: Callable[[Progress], None]) -> Callable[[int], None]:
    def on_tiles(count: int) -> None:
        del count
        # Image-to-image hosts run only the last part of the schedule and say how much.
        steps = int(getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps))
        total = steps * len(job.grid)
        step = min(clock.model_calls + 1, steps)
        tell(Progress(step=step, steps=steps, tiles=min(clock.tiles, total), tiles_total=total))

    return on_tiles
