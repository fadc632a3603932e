"""What happens around one call of a host pipeline.

The host keeps its loop, scheduler, guidance, LoRA, adapters and offload. Around one call we enlarge the image, pad it to
what the model needs, give the host our noise, replace the denoiser's forward by a tiled one, and put everything back.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_tiles.denoiser import Clock, TiledDenoiser
from latent_tiles.errors import ImageError, SettingError
from latent_tiles.frames.picture import Picture, as_picture, pad_to, resize, scaled_size
from latent_tiles.geometry import Size, TileGrid
from latent_tiles.memory import build_memory
from latent_tiles.noise import NoiseField
from latent_tiles.pipelines.defaults import ModelDefaults
from latent_tiles.pipelines.hosts import Host
from latent_tiles.pipelines.noise_scope import field_noise
from latent_tiles.pipelines.patches import patched
from latent_tiles.pipelines.report import GridReport, Progress, UpscaleReport, peak_host_mib
from latent_tiles.pipelines.tiled_model import tiled_forward
from latent_tiles.pipelines.timing import Stopwatch
from latent_tiles.tiling import LatentUnits, Tiling
from latent_tiles.windows import resolve_window

_LOG = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_OWNED = frozenset({"self", "image", "return_dict", "output_type", "args", "kwargs"})
_MASKS = "ip_adapter_masks"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of one upscaling call.

    Args:
        image: see `as_picture`.
        scale: enlargement; None for the model's default.
        tiling: how to cut; None for the model's defaults.
        seed: one seed, or one for each item of the batch.
        progress: told after every batch of tiles.
        output_type: "pil", "np", "pt" or "latent".
        arguments: everything else, for the host.
    """

    image: Any
    scale: float | None
    tiling: Tiling | None
    seed: int | Sequence[int] | None
    progress: Callable[[Progress], None] | None
    output_type: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request whose defaults are filled in and whose geometry is settled."""

    source: Picture
    target: Size
    working: Size
    """What the model makes, before a last reduction to `target`; differs from it only for hosts that enlarge."""
    padded: Size
    units: LatentUnits
    tiling: Tiling
    grid: TileGrid
    scale: float
    arguments: dict[str, Any]


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
    job = _prepare(pipe, host, defaults, call_host, request)
    device = torch.device(pipe._execution_device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch, clock = Stopwatch(device), Clock()
    noise, seeds, generator = _noise(job, request)
    denoiser = TiledDenoiser(
        plan_grid=lambda canvas: job.units.grid(canvas, job.tiling),
        window=resolve_window(job.tiling.window),
        memory=build_memory(job.tiling.memory or "none"),
        tile_batch=job.tiling.tile_batch,
        scheduler=pipe.scheduler,
        noise=noise,
        branches=lambda: host.branches(pipe, job.arguments),
        clock=clock,
    )
    if request.progress is not None:
        denoiser.on_tiles = _progress(pipe, job, clock, request.progress)
    with _installed(pipe, denoiser, noise, watch):
        output = call_host(
            image=_host_image(job, host),
            generator=generator,
            output_type="latent" if request.output_type == "latent" else "pt",
            return_dict=True,
            **_host_arguments(pipe, host, job),
        )
    images = output.images if request.output_type == "latent" else _finish(output.images, job, request.output_type)
    nsfw = getattr(output, "nsfw_content_detected", None)
    report = UpscaleReport(
        host=host.name,
        source_size=tuple(job.source.size),
        output_size=tuple(job.target),
        grid=GridReport.of(job.grid, job.units.pixels_per_latent),
        seeds=seeds,
        settings=_settings(job),
        model_calls=clock.model_calls,
        tiles_run=clock.tiles,
        seconds=watch.finish(),
        peak_device_mib=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        peak_host_mib=peak_host_mib(),
        nsfw=None if nsfw is None else tuple(bool(flag) for flag in nsfw),
    )
    return images, report


@contextmanager
def _installed(pipe: Any, denoiser: TiledDenoiser, noise: NoiseField | None, watch: Stopwatch) -> Iterator[None]:
    """Everything that is replaced for the length of a call; left in reverse order, also when the call raises."""
    clock = denoiser.clock
    original_step, predict = pipe.scheduler.step, denoiser.predict

    def step(*args: Any, **kwargs: Any) -> Any:
        result = original_step(*args, **kwargs)
        clock.stepped()
        watch.stepped()
        return result

    # Hosts read the signature of `step` to learn what it takes.
    step.__signature__ = inspect.signature(original_step)  # pyright: ignore[reportFunctionMemberAccess]

    def timed_predict(call: Any) -> Any:
        watch.denoising()
        return predict(call)

    denoiser.predict = timed_predict
    with ExitStack() as stack:
        stack.enter_context(watch.watching(pipe.vae, "encode"))
        stack.enter_context(watch.watching(pipe.vae, "decode"))
        stack.enter_context(patched(pipe.scheduler, "step", step))
        if noise is not None:
            stack.enter_context(field_noise(pipe, noise, clock))
        stack.enter_context(tiled_forward(pipe.unet, denoiser))
        yield


def _prepare(
    pipe: Any, host: Host, defaults: ModelDefaults, call_host: Callable[..., Any], request: Request
) -> Job:
    if request.output_type not in OUTPUT_TYPES:
        msg = f"unknown output_type {request.output_type!r}; use one of {', '.join(OUTPUT_TYPES)}"
        raise SettingError(msg)
    if request.image is None:
        raise ImageError("image is missing; pass a PIL image, numpy array, tensor or path")
    arguments = _fill_arguments(host, defaults, call_host, request.arguments)
    units = host.units(pipe)
    source = as_picture(request.image)
    scale = defaults.scale if request.scale is None else request.scale
    target = scaled_size(source.size, scale)
    working = _working_size(source.size, target, units.pixels_per_latent) if host.enlarges else target
    tiling = units.resolve(
        request.tiling or Tiling(), tile=defaults.tile, overlap=defaults.overlap, memory=defaults.memory
    )
    build_memory(tiling.memory or "none")
    units.origin(tiling)
    padded = units.padded(working)
    canvas = Size(*(length // units.pixels_per_latent for length in padded))
    return Job(
        source=source,
        target=target,
        working=working,
        padded=padded,
        units=units,
        tiling=tiling,
        grid=units.grid(canvas, tiling),
        scale=scale,
        arguments=arguments,
    )


def _working_size(source: Size, target: Size, factor: int) -> Size:
    """What a host that always enlarges by `factor` should make: at least the target, from at least the source."""
    return Size(*(max(side, -(-goal // factor)) * factor for side, goal in zip(source, target, strict=True)))


def _fill_arguments(
    host: Host, defaults: ModelDefaults, call_host: Callable[..., Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    known = {name: entry.default for name, entry in inspect.signature(call_host).parameters.items()}
    for name, value in given.items():
        if value is not None and (name not in known or name in _OWNED):
            names = ", ".join(sorted(set(known) - _OWNED))
            raise SettingError(f"{host.name} takes no argument {name!r}; it takes {names}")
    filled = {name: default for name, default in known.items() if name not in _OWNED and default is not inspect.Parameter.empty}
    filled.update({name: value for name, value in defaults.host_arguments().items() if name in known})
    filled.update({name: value for name, value in given.items() if value is not None})
    for name in ("num_inference_steps", "guidance_scale", "strength"):
        value = filled.get(name)
        if value is not None and value < 0:
            raise SettingError(f"{name} must not be negative, got {value}")
    return filled


def _host_image(job: Job, host: Host) -> Tensor:
    factor = job.units.pixels_per_latent if host.enlarges else 1
    image = job.source.rgb
    size = Size(*(side // factor for side in job.working))
    padded = Size(*(side // factor for side in job.padded))
    image = pad_to(resize(image, size), padded)
    # The host repeats images for several results a prompt in another order than prompts; ours are already in place.
    return image if host.enlarges else image.repeat_interleave(_copies(job), dim=0)


def _copies(job: Job) -> int:
    return int(job.arguments.get("num_images_per_prompt") or 1)


def _host_arguments(pipe: Any, host: Host, job: Job) -> dict[str, Any]:
    arguments = dict(job.arguments)
    arguments.pop("generator", None)
    if arguments.get("prompt_embeds") is None:
        prompt = arguments.get("prompt")
        arguments["prompt"] = _per_item("prompt", "" if prompt is None else prompt, job.source.items)
    if host.enlarges and job.source.items > 1 and _copies(job) > 1:
        raise SettingError(f"{host.name} mixes up several images with num_images_per_prompt > 1; call it once an image")
    if len(job.grid) > 1:
        arguments.update(host.extra_arguments(_tile_px(job), arguments))
    cross_attention = arguments.get("cross_attention_kwargs")
    if cross_attention and cross_attention.get(_MASKS) is not None:
        arguments["cross_attention_kwargs"] = {
            **cross_attention,
            _MASKS: _fit_masks(cross_attention[_MASKS], job),
        }
    return arguments


def _tile_px(job: Job) -> Size:
    return Size(*(side * job.units.pixels_per_latent for side in job.grid.tile))


def _per_item(name: str, prompt: str | Sequence[str], items: int) -> str | Sequence[str]:
    if isinstance(prompt, str):
        return prompt if items == 1 else [prompt] * items
    if len(prompt) != items:
        raise SettingError(f"{len(prompt)} entries in {name} for {items} images; give one for each, or one for all")
    return prompt


def _fit_masks(masks: Any, job: Job) -> list[Tensor | None]:
    """Bring IP-Adapter masks, drawn for the whole frame at any size, to the padded frame."""
    as_list: list[Tensor | None] = masks if isinstance(masks, list) else list(masks.unsqueeze(1))
    fitted: list[Tensor | None] = []
    for mask in as_list:
        if mask is None or Size(*mask.shape[-2:]) == job.padded:
            fitted.append(mask)
            continue
        frame = F.interpolate(mask.float(), size=tuple(job.working), mode="bilinear", antialias=True)
        fitted.append(pad_to(frame, job.padded).to(mask.dtype))
    return fitted


def _noise(job: Job, request: Request) -> tuple[NoiseField | None, tuple[int, ...] | None, Any]:
    """The noise field and its seeds, or the generator for a host that draws its own."""
    generator = request.arguments.get("generator")
    if generator is not None and request.seed is not None:
        raise SettingError("give either seed or generator, not both")
    given = [request.seed] if isinstance(request.seed, int) else request.seed
    results = job.source.items * _copies(job)
    if given is not None and len(given) not in (1, results):
        raise SettingError(f"{len(given)} seeds for {results} results; give one for each, or one for all")
    if job.tiling.noise == "host":
        if given is None:
            return None, None, generator
        generators = [torch.Generator().manual_seed(seed) for seed in given]
        return None, tuple(given), generators if len(generators) > 1 else generators[0]
    if given is None:
        generators = generator if isinstance(generator, list) else [generator]
        given = [_draw_seed(source) for source in generators]
    return NoiseField(seeds=tuple(given), origin=job.units.origin(job.tiling)), tuple(given), None


def _draw_seed(generator: torch.Generator | None) -> int:
    """A seed from a generator, so that a second call with it differs from the first, as callers of diffusers expect.

    Without one, from torch's global generator: `torch.manual_seed` then fixes the result here too, and the report tells
    the seed.
    """
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**63 - 1, (1,), generator=generator, device=device))


def _progress(pipe: Any, job: Job, clock: Clock, tell: Callable[[Progress], None]) -> Callable[[int], None]:
    def on_tiles(count: int) -> None:
        del count
        # Image-to-image hosts run only the last part of the schedule and say how much.
        steps = int(getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps))
        total = steps * len(job.grid)
        tell(Progress(step=clock.model_calls, steps=steps, tiles=min(clock.tiles, total), tiles_total=total))

    return on_tiles


def _finish(images: Tensor, job: Job, output_type: Any) -> Any:
    height, width = job.working
    images = resize(images.float()[:, :, :height, :width], job.target)
    source = job.source.repeated(images.shape[0] // job.source.items)
    alpha = None if source.alpha is None else resize(source.alpha, job.target).to(images.device)
    return Picture(rgb=images, alpha=alpha, grey=source.grey).export(output_type)


def _settings(job: Job) -> dict[str, Any]:
    tiling = job.tiling
    window = tiling.window if isinstance(tiling.window, str) else getattr(tiling.window, "__name__", "callable")
    shown = {name: value for name, value in job.arguments.items() if _is_plain(value)}
    return {
        "scale": job.scale,
        "tile": tiling.tile,
        "overlap": tiling.overlap,
        "window": window,
        "memory": tiling.memory,
        "tile_batch": tiling.tile_batch,
        "noise": tiling.noise,
        "origin": tiling.origin,
        **shown,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, str | int | float | bool)
