"""Tile the denoiser of any diffusers pipeline whose denoiser is supported, for as long as a block runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from latent_tiles.denoiser import Clock, TiledDenoiser
from latent_tiles.errors import SettingError, UnsupportedHostError
from latent_tiles.geometry import Size, TileGrid, as_size
from latent_tiles.memory import build_memory
from latent_tiles.noise import NoiseField
from latent_tiles.parameterisation import require_levels
from latent_tiles.patches import patched
from latent_tiles.pipelines.defaults import ModelDefaults, for_tile
from latent_tiles.pipelines.envelope import installed
from latent_tiles.pipelines.hosts import HOST_NAMES, Host, host_of, two_branches
from latent_tiles.pipelines.job import draw_seeds, seeds_of
from latent_tiles.pipelines.report import GridReport
from latent_tiles.pipelines.tiled_model import training_side_px, units_of
from latent_tiles.pipelines.timing import Stopwatch
from latent_tiles.pipelines.upscale import LatentTiledUpscalePipeline
from latent_tiles.tiling import LatentUnits, Tiling
from latent_tiles.vae.exact import exact_vae
from latent_tiles.vae.options import VaeOptions
from latent_tiles.vae.report import VaeReport
from latent_tiles.windows import check_window, resolve_window

_DEFAULTS = ModelDefaults(tile=512, overlap=64)
_BINNING = "use_resolution_binning"


@dataclass(frozen=True, kw_only=True)
class TilingReport:
    """What one call of a tiled pipeline did.

    Args:
        grid: where the tiles lay, in pixels; None where the model was never called.
        seeds: seeds of the noise field; None where the pipeline drew its own noise.
        model_calls: calls of the denoiser that the pipeline made.
        tiles_run: tiles that went through the model, over all calls.
        seconds: time for "encode", "denoise", "decode" and "total".
        vae: what each encode and decode cost and measured; empty where the autoencoder was left alone.
    """

    grid: GridReport | None
    seeds: tuple[int, ...] | None
    model_calls: int
    tiles_run: int
    seconds: dict[str, float]
    vae: tuple[VaeReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class TilingSession:
    """Runs the calls of one pipeline inside a `latent_tiling` block.

    Args:
        pipe: the pipeline.
        tiling: how its canvas is cut, nothing left open.
        units: what its denoiser needs of latents.
        seed: seeds of the noise field, or None to draw one for each call.
        vae_options: how its autoencoder is run.

    Attributes:
        reports: what each finished call did.
    """

    pipe: Any
    tiling: Tiling
    units: LatentUnits
    seed: tuple[int, ...] | None
    vae_options: VaeOptions
    reports: list[TilingReport] = field(default_factory=list[TilingReport])

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline, tiled.

        Raises:
            LatentTilesError: what the tiling, memory, noise or autoencoder refuses.
        """
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        self._check_memory(arguments)
        seeds = self._seeds(arguments.get("generator"))
        noise = None if seeds is None else NoiseField(seeds=seeds, origin=self.units.origin(self.tiling))
        clock, watch = Clock(), Stopwatch(torch.device(self.pipe._execution_device))
        grids = list[TileGrid]()
        denoiser = TiledDenoiser(
            plan_grid=lambda canvas: self._planned(canvas, grids),
            window=resolve_window(self.tiling.window),
            memory=build_memory(self.tiling.memory or "none"),
            tile_batch=self.tiling.tile_batch,
            scheduler=self.pipe.scheduler,
            noise=noise,
            branches=lambda: _branches(self.pipe, arguments),
            clock=clock,
        )
        if _BINNING in arguments and _BINNING not in kwargs:
            # Else the host draws at the nearest size of its training, which is what tiles are for, and enlarges that.
            kwargs = {**kwargs, _BINNING: False}
        with (
            exact_vae(self.pipe.vae, self.vae_options) as exact,
            installed(self.pipe, denoiser, noise, watch),
            shifted_for_tile(self.pipe, self._tile_tokens, given=arguments.get("mu")),
        ):
            result = call(*args, **kwargs)
        self.reports.append(
            TilingReport(
                grid=self._grid_report(grids),
                seeds=seeds,
                model_calls=clock.model_calls,
                tiles_run=clock.tiles,
                seconds=watch.finish(),
                vae=() if exact is None else tuple(exact.reports),
            )
        )
        return result

    @property
    def _tile_tokens(self) -> int:
        """Tokens of a tile, where the denoiser is a transformer."""
        patch_px = self.units.pixels_per_latent * self.units.multiple_of
        height, width = as_size(self.tiling.tile or 0)
        return (height // patch_px) * (width // patch_px)

    def _planned(self, canvas: Size, grids: list[TileGrid]) -> TileGrid:
        grid = self.units.grid(canvas, self.tiling)
        check_window(grid, resolve_window(self.tiling.window))
        grids.append(grid)
        return grid

    def _grid_report(self, grids: list[TileGrid]) -> GridReport | None:
        if not grids:
            return None
        factor = self.units.pixels_per_latent
        content = Size(*(side * factor for side in grids[-1].frame))
        return GridReport.of(grids[-1], pixels_per_latent=factor, content=content)

    def _check_memory(self, arguments: Mapping[str, Any]) -> None:
        """Whatever a memory would refuse in the middle of a call is refused before it."""
        name = self.tiling.memory or "none"
        if not build_memory(name).uses_levels_and_noise:
            return
        if self.tiling.noise != "field":
            raise SettingError(f"memory {name!r} needs the shared noise field; use noise='field'")
        if arguments.get("latents") is not None:
            raise SettingError(f"memory {name!r} needs the noise that the run starts from; leave out latents")
        require_levels(self.pipe.scheduler)
        if _known_host(self.pipe) is None and not hasattr(type(self.pipe), "do_classifier_free_guidance"):
            msg = f"memory {name!r} needs the weights of the guidance branches, which {type(self.pipe).__name__} keeps "
            raise SettingError(msg + "to itself; use memory='none'")

    def _seeds(self, generator: Any) -> tuple[int, ...] | None:
        if self.tiling.noise == "host":
            return None
        if self.seed is not None:
            return self.seed
        return tuple(draw_seeds(generator))


@contextmanager
def latent_tiling(
    pipe: Any,
    tiling: Tiling | None = None,
    *,
    seed: int | list[int] | tuple[int, ...] | None = None,
    vae_options: VaeOptions | None = None,
) -> Generator[TilingSession, None, None]:
    """Within the block, calls of a diffusers pipeline denoise their canvas tile by tile.

    For text-to-image canvases that no model was trained at, inpainting, editing: the pipeline, its scheduler, LoRA and
    callbacks stay as they are. For enlarging a photograph, `LatentTiledUpscalePipeline` also brings the image to the
    size and the result back to its form.

    Args:
        pipe: a diffusers pipeline with a supported denoiser.
        tiling: how the canvas is cut; the model's training size, an eighth of it as overlap, and no memory by default.
        seed: seeds of the noise field, one or one for each result. None: drawn in each call from its `generator`, or
            from torch's, and told in the report.
        vae_options: how the autoencoder is run; exactly, in tiles, by default.

    Yields:
        The session, with a report for each call.

    Raises:
        UnsupportedHostError: the pipeline has no denoiser or no autoencoder, or tiles by itself.
        FamilyError: its denoiser cannot be tiled.
        TilingError: a tile or overlap that does not fit the model.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> pipe = StableDiffusionPipeline.from_pretrained("path/to/model")  # doctest: +SKIP
        >>> with latent_tiling(pipe, Tiling(tile=512, overlap=64)) as session:  # doctest: +SKIP
        ...     wide = pipe("a valley at dawn", height=1024, width=4096).images[0]
    """
    base: Any = type(pipe)
    if isinstance(pipe, LatentTiledUpscalePipeline):
        raise UnsupportedHostError(f"this {base.__name__} tiles by itself; pass tiling= to its call")
    units = units_of(pipe)
    defaults = for_tile(_DEFAULTS, training_side_px(pipe))
    tiling = units.resolve(tiling or Tiling(), tile=defaults.tile, overlap=defaults.overlap, memory=defaults.memory)
    session = TilingSession(
        pipe=pipe,
        tiling=tiling,
        units=units,
        seed=None if seed is None else tuple(seeds_of(seed)),
        vae_options=vae_options or VaeOptions(),
    )
    units.origin(session.tiling)
    original: Callable[..., Any] = base.__call__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return session.run(functools.partial(original, self), args, kwargs)

    # Python looks `__call__` up in the class. Its name and module stay, since diffusers writes them into files.
    pipe.__class__ = type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})
    try:
        yield session
    finally:
        pipe.__class__ = base


@contextmanager
def shifted_for_tile(pipe: Any, tokens: int, *, given: float | None) -> Generator[None, None, None]:
    """Within the block, a flow scheduler shifts its timesteps for a tile, and not for the canvas.

    The shift grows with the number of tokens that the model sees at once. That is a tile's, however large the canvas:
    extrapolated to the canvas of a large frame it presses all noise levels together near the top.

    Args:
        pipe: the pipeline.
        tokens: of a tile.
        given: the caller's own shift, which is left alone.

    Source:
        Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 5.3.2, as linear interpolation
        over tokens in diffusers' `calculate_shift`; a canvas smaller than a tile keeps its own.
    """
    scheduler = pipe.scheduler
    if given is not None or not scheduler.config.get("use_dynamic_shifting", False):
        yield
        return
    original, config = scheduler.set_timesteps, scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    own = low + (high - low) * (tokens - few) / (many - few)

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("mu") is not None:
            kwargs["mu"] = min(kwargs["mu"], own)
        return original(*args, **kwargs)

    with patched(scheduler, "set_timesteps", set_timesteps):
        yield


def _known_host(pipe: Any) -> Host | None:
    """What is particular to the pipeline's class, where it is one of the hosts or derived from one."""
    return next((host_of(kind.__name__) for kind in type(pipe).__mro__ if kind.__name__ in HOST_NAMES), None)


def _branches(pipe: Any, arguments: Mapping[str, Any]) -> tuple[float, ...]:
    """Weight of each guidance branch in the guided prediction."""
    host = _known_host(pipe)
    return two_branches(pipe, arguments) if host is None else host.branches(pipe, arguments)
