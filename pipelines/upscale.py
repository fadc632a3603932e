"""`LatentTiledUpscalePipeline`: any supported diffusers pipeline, for frames that no model fits."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor

from latent_tiles.errors import ModelFolderError, UnsupportedHostError
from latent_tiles.pipelines.defaults import FILE_NAME, ModelDefaults, parse_defaults
from latent_tiles.pipelines.envelope import upscale
from latent_tiles.pipelines.hosts import HOST_NAMES, Host, host_of
from latent_tiles.pipelines.job import Request
from latent_tiles.pipelines.report import Progress, UpscaleReport
from latent_tiles.tiling import Tiling
from latent_tiles.vae.options import VaeOptions

_KEEPS_DTYPES: ContextVar[bool] = ContextVar("keeps_dtypes", default=False)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


@dataclass
class UpscaleOutput(BaseOutput):
    """Result of a call.

    Args:
        images: the results: a list of PIL images, an array (items, height, width, channels) or a tensor (items,
            channels, height, width) in [0, 1], or the latents.
        report: what the call did.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    report: UpscaleReport

    @property
    def nsfw_content_detected(self) -> list[bool] | None:
        """The host's safety checker's finding for each result, under the name diffusers uses."""
        return None if self.report.nsfw is None else list(self.report.nsfw)


class LatentTiledUpscalePipeline:
    """Upscales an image of any size with a diffusers model, tile by tile in latent space.

    `from_pretrained` reads a model's `model_index.json`, picks the host pipeline that runs it, and returns an object of
    a subclass of both this class and the host, named after the host: LoRA, IP-Adapter, offload, `from_pipe`,
    `save_pretrained` and `isinstance` work as they do there.

    Example:
        >>> pipe = LatentTiledUpscalePipeline.from_pretrained("path/to/model")  # doctest: +SKIP
        >>> out = pipe("photo.jpg", scale=4, seed=7)  # doctest: +SKIP
        >>> out.images[0].save("large.png")  # doctest: +SKIP
    """

    _host: ClassVar[Host]
    _model_defaults: ModelDefaults | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse the bare class, which has no model.

        Raises:
            UnsupportedHostError: called on the class itself.
        """
        del args, kwargs
        if cls is LatentTiledUpscalePipeline:
            msg = (
                "LatentTiledUpscalePipeline has no model of its own; use .from_pretrained(...) or .from_pipe(pipeline)"
            )
            raise UnsupportedHostError(msg)
        return super().__new__(cls)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model from a folder or the hub.

        Args:
            pretrained_model_name_or_path: folder of a diffusers pipeline, or its id on the hub.
            **kwargs: what `DiffusionPipeline.from_pretrained` takes: `torch_dtype`, `variant`, components, ...

        Returns:
            A pipeline; see the class.

        Raises:
            ModelFolderError: the folder is missing or is not a diffusers pipeline.
            UnsupportedHostError: no host runs this kind of model; the message lists the supported ones.
            DefaultsError: the model's `latent_tiles.json` is not valid.
        """
        name = os.fspath(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        if cls is not LatentTiledUpscalePipeline:
            pipe: Any = super().from_pretrained(name, **kwargs)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
            pipe._model_defaults = _read_defaults(name, hub)
            return pipe
        if not _is_hub_id(name) and not (Path(name) / "model_index.json").is_file():
            problem = "has no model_index.json" if Path(name).is_dir() else "does not exist"
            raise ModelFolderError(f"{name} {problem}; give the folder of a diffusers pipeline or an id on the hub")
        try:
            config: Any = DiffusionPipeline.load_config(name, **hub)
        except OSError as error:
            msg = f"{name} is neither a folder nor a model that the hub gave ({str(error).splitlines()[0]})"
            raise ModelFolderError(msg) from error
        return pipeline_class(str(config.get("_class_name"))).from_pretrained(name, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Share the models of a loaded diffusers pipeline.

        Args:
            pipeline: a supported diffusers pipeline.
            **kwargs: what `DiffusionPipeline.from_pipe` takes. Unlike there, dtypes stay unless one is given.

        Raises:
            UnsupportedHostError: no host runs this kind of pipeline.
        """
        if cls is LatentTiledUpscalePipeline:
            return pipeline_class(type(pipeline).__name__).from_pipe(pipeline, **kwargs)
        # diffusers casts every model to one dtype, float32 unless told otherwise; the caller's pipeline shares them.
        cast = "torch_dtype" in kwargs or "dtype" in kwargs
        token = _KEEPS_DTYPES.set(not cast)
        try:
            pipe: Any = super().from_pipe(pipeline, **kwargs)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        finally:
            _KEEPS_DTYPES.reset(token)
        pipe._model_defaults = getattr(pipeline, "_model_defaults", None)
        if pipe._model_defaults is None and Path(str(pipeline.name_or_path or "")).is_dir():
            pipe._model_defaults = _read_defaults(str(pipeline.name_or_path), {})
        return pipe

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the models, as the host does."""
        return self if _KEEPS_DTYPES.get() else super().to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as the host does, and the model's tiling defaults, where it has some, beside it."""
        if self._model_defaults is not None:
            # First, because the host may upload the folder at the end.
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self._model_defaults.save(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

    @property
    def tile_defaults(self) -> ModelDefaults:
        """Settings that a call uses where it is given none."""
        return self._model_defaults or self._host.defaults(self)


@functools.cache
def pipeline_class(name: str) -> Any:
    """The tiled subclass of the host that runs a model of a named pipeline class.

    Raises:
        UnsupportedHostError: no host does.
    """
    host = host_of(name)
    base: Any = getattr(diffusers, host.name)
    namespace = {
        "__call__": _tiled_call(base),
        "__doc__": f"{host.name} that works tile by tile; see LatentTiledUpscalePipeline.",
        "__module__": __name__,
        "_host": host,
    }
    # Named after the host: diffusers writes the class's name into model_index.json and looks it up again.
    return type(host.name, (LatentTiledUpscalePipeline, base), namespace)


def __getattr__(name: str) -> Any:
    """The tiled subclass of a host under the host's name, where pickle looks for it."""
    if name in HOST_NAMES:
        return pipeline_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _tiled_call(base: Any) -> Callable[..., Any]:
    host_call: Callable[..., Any] = base.__call__

    def call(
        self: Any,
        image: Any = None,
        prompt: str | list[str] | None = None,
        *,
        scale: float | None = None,
        tiling: Tiling | None = None,
        seed: int | Sequence[int] | None = None,
        progress: Callable[[Progress], None] | None = None,
        vae_options: VaeOptions | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **host_arguments: Any,
    ) -> UpscaleOutput | tuple[Any, UpscaleReport]:
        """Upscale an image.

        Args:
            self: the pipeline.
            image: PIL image, numpy array, tensor, path, or a list of these of one size. Grey and alpha come back as
                they went in.
            prompt: what to ask of the model; empty by default.
            scale: enlargement, at least 1 (1 only restores).
            tiling: how the frame is cut; what it leaves open comes from the model's defaults.
            seed: one seed, or one for each result. None: drawn, and told in the report.
            progress: called after every batch of tiles.
            vae_options: how the autoencoder is run, and within which budgets; exactly, in tiles, by default.
            output_type: "pil", "np", "pt" or "latent" (of the padded frame).
            return_dict: False gives a tuple (images, report).
            **host_arguments: every other argument of the host's call.

        Returns:
            An `UpscaleOutput`.

        Raises:
            LatentTilesError: bad input; before any model has run.
        """
        request = Request(
            image=image,
            scale=scale,
            tiling=tiling,
            seed=seed,
            progress=progress,
            output_type=output_type,
            vae=vae_options or VaeOptions(),
            arguments={"prompt": prompt, **host_arguments},
        )
        images, report = upscale(self, self._host, self.tile_defaults, functools.partial(host_call, self), request)
        return UpscaleOutput(images=images, report=report) if return_dict else (images, report)

    call.__signature__ = _merged_signature(call, host_call)  # pyright: ignore[reportFunctionMemberAccess]
    call.__name__, call.__qualname__ = "__call__", f"{base.__name__}.__call__"
    return call


def _merged_signature(own: Callable[..., Any], host: Callable[..., Any]) -> inspect.Signature:
    """Our arguments, then the host's others: callers and tools read off it what the pipeline takes."""
    mine = inspect.signature(own)
    named = [entry for entry in mine.parameters.values() if entry.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {entry.name for entry in named}
    theirs = [
        entry.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for entry in inspect.signature(host).parameters.values()
        if entry.name not in taken and entry.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return mine.replace(parameters=[*named, *theirs])


def _is_hub_id(name: str) -> bool:
    return not Path(name).is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _read_defaults(name: str, hub: dict[str, Any]) -> ModelDefaults | None:
    """A model's own `latent_tiles.json`, or None where it has none."""
    if not _is_hub_id(name):
        path = Path(name) / FILE_NAME
        return parse_defaults(path.read_text(encoding="utf-8")) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    hub = {key: value for key, value in hub.items() if key != "proxies"}
    try:
        return parse_defaults(Path(hf_hub_download(name, FILE_NAME, **hub)).read_text(encoding="utf-8"))
    except EntryNotFoundError:
        return None
