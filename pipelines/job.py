"""A call's arguments, brought to what a host needs, and its result, brought to what the caller asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_tiles.errors import CanvasError, ImageError, MemoryStrategyError, SettingError
from latent_tiles.frames.inputs import as_picture
from latent_tiles.frames.picture import Picture, pad_to, resize, scaled_size
from latent_tiles.geometry import Size, TileGrid
from latent_tiles.memory import build_memory
from latent_tiles.noise import NoiseField, check_seed
from latent_tiles.parameterisation import require_levels
from latent_tiles.pipelines.defaults import ModelDefaults
from latent_tiles.pipelines.hosts import Host
from latent_tiles.pipelines.report import Progress
from latent_tiles.tiling import LatentUnits, Tiling
from latent_tiles.vae.options import VaeOptions
from latent_tiles.windows import check_window, resolve_window

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_OWNED = frozenset({"self", "image", "return_dict", "output_type", "args", "kwargs"})
"""Arguments of a host's call that are ours to set."""
_PLUMBING = frozenset({"callback_on_step_end_tensor_inputs", "callback_steps"})
"""Arguments that nobody sets to repeat a result."""
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
        vae: how the autoencoder is run.
        arguments: everything else, for the host.
    """

    image: Any
    scale: float | None
    tiling: Tiling | None
    seed: Any
    progress: Callable[[Progress], None] | None
    output_type: str
    vae: VaeOptions
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
    vae: VaeOptions
    arguments: dict[str, Any]


def prepare(pipe: Any, host: Host, defaults: ModelDefaults, call_host: Callable[..., Any], request: Request) -> Job:
    """Check a request, fill in defaults and settle its geometry.

    Raises:
        LatentTilesError: one of its leaves, for bad input.
    """
    if request.output_type not in OUTPUT_TYPES:
        msg = f"unknown output_type {request.output_type!r}; use one of {', '.join(OUTPUT_TYPES)}"
        raise SettingError(msg)
    if request.image is None:
        raise ImageError("image is missing; pass a PIL image, numpy array, tensor or path")
    arguments = _fill_arguments(host, defaults, call_host, request.arguments)
    units = host.units(pipe)
    source = as_picture(request.image)
    scale = _number("scale", defaults.scale if request.scale is None else request.scale)
    target = scaled_size(source.size, scale)
    working = _working_size(source.size, target, units.pixels_per_latent) if host.enlarges else target
    tiling = units.resolve(
        request.tiling or Tiling(), tile=defaults.tile, overlap=defaults.overlap, memory=defaults.memory
    )
    _check_memory(tiling, pipe.scheduler, arguments)
    units.origin(tiling)
    padded = units.padded(working)
    grid = units.grid(Size(*(length // units.pixels_per_latent for length in padded)), tiling)
    check_window(grid, resolve_window(tiling.window))
    return Job(
        source=source,
        target=target,
        working=working,
        padded=padded,
        units=units,
        tiling=tiling,
        grid=grid,
        scale=scale,
        vae=request.vae,
        arguments=arguments,
    )


def _check_memory(tiling: Tiling, scheduler: Any, arguments: Mapping[str, Any]) -> None:
    """Whatever a memory would refuse in the middle of a call is refused before it."""
    name = tiling.memory or "none"
    if not build_memory(name).uses_levels_and_noise:
        return
    if tiling.noise != "field":
        raise MemoryStrategyError(f"memory {name!r} needs the shared noise field; use noise='field'")
    for argument in ("latents", "denoising_start"):
        if arguments.get(argument) is not None:
            msg = f"memory {name!r} needs the noise that the run starts from, which {argument} replaces; leave one out"
            raise MemoryStrategyError(msg)
    require_levels(scheduler)


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
    filled = {
        name: default
        for name, default in known.items()
        if name not in _OWNED and default is not inspect.Parameter.empty
    }
    filled.update({name: value for name, value in defaults.host_arguments().items() if name in known})
    filled.update({name: value for name, value in given.items() if value is not None})
    _check_steps(filled)
    copies = filled.get("num_images_per_prompt")
    if copies is not None and copies < 1:
        raise SettingError(f"num_images_per_prompt must be at least 1, got {copies}")
    return filled


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SettingError(f"{name} must be a number, got {value!r}") from None


def _check_steps(arguments: Mapping[str, Any]) -> None:
    steps, strength = arguments.get("num_inference_steps"), arguments.get("strength")
    if steps is not None and steps < 1:
        raise SettingError(f"num_inference_steps must be at least 1, got {steps}")
    # Where the caller states the schedule or its part, the host goes by that.
    if strength is None or any(arguments.get(name) is not None for name in ("denoising_start", "timesteps", "sigmas")):
        return
    if not 0 < strength <= 1:
        raise SettingError(f"strength must be above 0 and at most 1, got {strength}")
    # Image-to-image hosts run the last `strength` of the schedule, rounded down.
    if steps is not None and int(steps * strength) < 1:
        fix = f"use at least {math.ceil(1 / strength)} steps, or a higher strength"
        raise SettingError(f"strength {strength} of {steps} steps leaves no step to run; {fix}")


def host_image(job: Job, host: Host) -> Tensor:
    """The image that the host is given: enlarged where the host does not do it, padded, one for each result."""
    factor = job.units.pixels_per_latent if host.enlarges else 1
    image = job.source.rgb
    size = Size(*(side // factor for side in job.working))
    padded = Size(*(side // factor for side in job.padded))
    image = pad_to(resize(image, size), padded)
    # The host repeats images for several results a prompt in another order than prompts; ours are already in place.
    # Only where needed: a repeated tensor has other strides, and convolutions then round otherwise than the host's.
    return image if host.enlarges or _copies(job) == 1 else image.repeat_interleave(_copies(job), dim=0)


def _copies(job: Job) -> int:
    return int(job.arguments.get("num_images_per_prompt") or 1)


def host_arguments(host: Host, job: Job) -> dict[str, Any]:
    """The host's other arguments, with one prompt for each image and masks in the padded frame.

    Raises:
        SettingError: prompts and images, or images and results, do not fit.
    """
    arguments = dict(job.arguments)
    arguments.pop("generator", None)
    if arguments.get("prompt_embeds") is None and arguments.get("prompt") is None:
        arguments["prompt"] = ""
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        if arguments.get(name) is not None:
            arguments[name] = _per_item(name, arguments[name], job.source.items)
    embeds = arguments.get("prompt_embeds")
    if embeds is not None and len(embeds) != job.source.items:
        raise SettingError(f"prompt_embeds has {len(embeds)} rows for {job.source.items} images; give one for each")
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


def noise_of(job: Job, request: Request) -> tuple[NoiseField | None, tuple[int, ...] | None, Any]:
    """The noise field and its seeds, or the generator for a host that draws its own.

    Raises:
        SettingError: both seed and generator, or not one seed for each result.
        NoiseError: a seed out of range.
    """
    generator = request.arguments.get("generator")
    if generator is not None and request.seed is not None:
        raise SettingError("give either seed or generator, not both")
    results = job.source.items * _copies(job)
    given = None if request.seed is None else seeds_of(request.seed)
    for name, sources in (("seeds", given), ("generators", generator if isinstance(generator, list) else None)):
        if sources is not None and len(sources) not in (1, results):
            raise SettingError(f"{len(sources)} {name} for {results} results; give one for each, or one for all")
    if job.tiling.noise == "host":
        if given is None:
            return None, None, generator
        generators = [torch.Generator().manual_seed(seed) for seed in given]
        return None, tuple(given), generators if len(generators) > 1 else generators[0]
    if given is None:
        given = draw_seeds(generator)
    return NoiseField(seeds=tuple(given), origin=job.units.origin(job.tiling)), tuple(given), None


def seeds_of(seed: Any) -> list[int]:
    """One seed or several, as a checked list.

    Raises:
        NoiseError: one is out of range.
    """
    return [check_seed(one) for one in (seed if isinstance(seed, list | tuple) else [seed])]


def draw_seeds(generator: torch.Generator | list[torch.Generator] | None) -> list[int]:
    """A seed from each of one or several generators."""
    return [_draw_seed(source) for source in (generator if isinstance(generator, list) else [generator])]


def _draw_seed(generator: torch.Generator | None) -> int:
    """A seed from a generator, so that a second call with it differs from the first, as callers of diffusers expect.

    Without one, from torch's global generator, as in diffusers: `torch.manual_seed` fixes the result, and without that
    every fresh process draws the same. The report tells the seed.
    """
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**63 - 1, (1,), generator=generator, device=device))


def finish(images: Tensor, job: Job, output_type: Any) -> Any:
    """Crop the host's images to the frame, give them the source's channels back, and bring them to an output type."""
    height, width = job.working
    if Size(*images.shape[-2:]) != job.padded:
        raise CanvasError(f"the host made {tuple(images.shape[-2:])} px where {tuple(job.padded)} were expected")
    images = resize(images.float()[:, :, :height, :width], job.target)
    source = job.source.repeated(images.shape[0] // job.source.items)
    alpha = None if source.alpha is None else resize(source.alpha, job.target).to(images.device)
    return Picture(rgb=images, alpha=alpha, grey=source.grey).export(output_type)


def effective_settings(job: Job) -> dict[str, Any]:
    """What the call used, as plain values."""
    tiling = job.tiling
    window = tiling.window if isinstance(tiling.window, str) else getattr(tiling.window, "__name__", "callable")
    shown = {name: value for name, value in job.arguments.items() if _is_plain(value) and name not in _PLUMBING}
    return {
        "scale": job.scale,
        "tile": tiling.tile,
        "overlap": tiling.overlap,
        "window": window,
        "memory": tiling.memory,
        "tile_batch": tiling.tile_batch,
        "noise": tiling.noise,
        "origin": tiling.origin,
        "vae": job.vae.mode,
        **shown,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, str | int | float | bool)
