"""The diffusers pipelines that a tiled upscale can be built on, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from latent_tiles.errors import UnsupportedHostError
from latent_tiles.geometry import Size
from latent_tiles.pipelines.defaults import ModelDefaults, for_tile
from latent_tiles.pipelines.tiled_model import training_side_px, units_of
from latent_tiles.tiling import LatentUnits

Arguments = Mapping[str, Any]


def _no_extra(tile: Size, arguments: Arguments) -> dict[str, Any]:
    del tile, arguments
    return {}


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host class.

    Args:
        name: class name in diffusers.
        loads: class names in a `model_index.json` that this host can run.
        enlarges: the host itself makes an output larger than its image, by its VAE's factor.
        branches: weight of each guidance branch in the guided prediction, in the order of the batch, from the running
            pipeline and the arguments of its call.
        table: defaults where the model folder has none.
        extra_arguments: arguments that follow from the tile's size, given where the frame has several tiles.
    """

    name: str
    loads: tuple[str, ...]
    enlarges: bool = False
    branches: Callable[[Any, Arguments], tuple[float, ...]]
    table: ModelDefaults
    extra_arguments: Callable[[Size, Arguments], dict[str, Any]] = _no_extra

    def units(self, pipe: Any) -> LatentUnits:
        """Pixels per latent of this pipeline's VAE, and what its U-Net needs tiles to be multiples of."""
        # A host that enlarges cuts its small image to whole multiples of the factor.
        return units_of(pipe, canvas_multiple_of=int(pipe.vae_scale_factor) if self.enlarges else 1)

    def defaults(self, pipe: Any) -> ModelDefaults:
        """Defaults from the table, with the size that the U-Net was trained at as tile."""
        return for_tile(self.table, training_side_px(pipe))


def two_branches(pipe: Any, arguments: Arguments) -> tuple[float, ...]:
    """Without and with text, where the pipeline guides at all."""
    del arguments
    guided = getattr(pipe, "do_classifier_free_guidance", False)
    return _guided(pipe.guidance_scale) if guided else (1.0,)


def _two_branches_from_arguments(pipe: Any, arguments: Arguments) -> tuple[float, ...]:
    """The x4 host keeps its guidance in a local variable."""
    del pipe
    return _guided(arguments["guidance_scale"]) if arguments["guidance_scale"] > 1 else (1.0,)


def _three_branches(pipe: Any, arguments: Arguments) -> tuple[float, ...]:
    """Text, image, neither: eq. 3 of InstructPix2Pix (Brooks et al., arXiv 2211.09800)."""
    del arguments
    if not pipe.do_classifier_free_guidance:
        return (1.0,)
    text, image = pipe.guidance_scale, pipe.image_guidance_scale
    return (text, image - text, 1 - image)


def _guided(scale: float) -> tuple[float, ...]:
    return (1 - scale, scale)


def _sdxl_sizes(tile: Size, arguments: Arguments) -> dict[str, Any]:
    """Each tile is shown to SDXL as a whole picture of its size, as in training; a frame's size it never saw."""
    return {name: tuple(tile) for name in ("original_size", "target_size") if arguments.get(name) is None}


_HOSTS = (
    Host(
        name="StableDiffusionImg2ImgPipeline",
        loads=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        branches=two_branches,
        table=ModelDefaults(tile=512, overlap=64, num_inference_steps=30, guidance_scale=7.5, strength=0.35, scale=2.0),
    ),
    Host(
        name="StableDiffusionXLImg2ImgPipeline",
        loads=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        branches=two_branches,
        table=ModelDefaults(
            tile=1024, overlap=128, num_inference_steps=30, guidance_scale=5.0, strength=0.35, scale=2.0
        ),
        extra_arguments=_sdxl_sizes,
    ),
    Host(
        name="StableDiffusionUpscalePipeline",
        loads=("StableDiffusionUpscalePipeline",),
        enlarges=True,
        branches=_two_branches_from_arguments,
        table=ModelDefaults(
            tile=512, overlap=64, num_inference_steps=50, guidance_scale=9.0, noise_level=20, scale=4.0
        ),
    ),
    Host(
        name="StableDiffusionInstructPix2PixPipeline",
        loads=("StableDiffusionInstructPix2PixPipeline",),
        branches=_three_branches,
        table=ModelDefaults(
            tile=512, overlap=64, num_inference_steps=30, guidance_scale=7.5, image_guidance_scale=1.5, scale=2.0
        ),
    ),
)


HOST_NAMES = tuple(host.name for host in _HOSTS)
"""Class names of the hosts themselves."""


def supported_hosts() -> tuple[str, ...]:
    """Class names that `from_pretrained` and `from_pipe` accept."""
    return tuple(name for host in _HOSTS for name in host.loads)


def host_of(class_name: str) -> Host:
    """The host that runs a model whose folder, or pipeline, names this class.

    Raises:
        UnsupportedHostError: none does; the message lists the supported classes.
    """
    for host in _HOSTS:
        if class_name in host.loads:
            return host
    raise UnsupportedHostError(f"{class_name} is not supported; supported are {', '.join(supported_hosts())}")
