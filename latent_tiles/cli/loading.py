"""From `--model`, `--device`, `--dtype` and `--attention` to a pipeline that is ready to run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latent_tiles.errors import LatentTilesError, ModelFolderError, SettingError

if TYPE_CHECKING:
    from latent_tiles.pipelines.sidecar import ModelIdentity, Runtime

_CHATTY = r"(accelerate|diffusers|huggingface_hub|torch|transformers)(\.|$)"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A pipeline on its device.

    Args:
        pipe: the pipeline.
        identity: which model it is.
        runtime: where it runs.
    """

    pipe: Any
    identity: ModelIdentity
    runtime: Runtime


def resolve_device(choice: str) -> str:
    """The device that `--device` asks for.

    Raises:
        SettingError: it is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        return next(name for name, present in there.items() if present)
    if not there[choice]:
        present = ", ".join(name for name, found in there.items() if found)
        raise SettingError(f"--device {choice}: torch finds no such device here; it finds {present}")
    return choice


def load_model(
    model: str | None, *, device: str, dtype: str, attention: str, show_downloads: bool = False
) -> LoadedModel:
    """Load a model for the length of a command.

    Args:
        model: folder or id; None for the reference model.
        device: from `resolve_device`.
        dtype: as `--dtype`.
        attention: as `--attention`.
        show_downloads: let the hub draw its bars, where somebody watches.

    Raises:
        LatentTilesError: no such model, no host for it, or settings that cannot hold here.
    """
    import torch

    from latent_tiles.pipelines.attention import select_attention
    from latent_tiles.pipelines.sidecar import Runtime, identify_model
    from latent_tiles.reference import DESCRIPTION, reference_model

    location = os.fspath(reference_model()) if model is None else model
    if dtype == "auto":
        # The reference model is small and was trained in float32; others are usually made for half precision.
        dtype = "float16" if device == "cuda" and model is not None else "float32"
    pipe = _read(location, getattr(torch, dtype), show_downloads=show_downloads).to(device)
    pipe.set_progress_bar_config(disable=True)
    selected = select_attention(pipe, attention)  # pyright: ignore[reportArgumentType]  # argparse holds the choices
    return LoadedModel(
        pipe=pipe,
        identity=identify_model(location, name=DESCRIPTION if model is None else None),
        runtime=Runtime(device=device, dtype=dtype, attention=selected),
    )


def _read(location: str, dtype: Any, *, show_downloads: bool) -> Any:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from safetensors import SafetensorError

    from latent_tiles.pipelines.upscale import LatentTiledUpscalePipeline

    were_disabled = are_progress_bars_disabled()
    if not show_downloads:
        disable_progress_bars()
    try:
        return LatentTiledUpscalePipeline.from_pretrained(location, dtype=dtype)
    except LatentTilesError:
        raise
    except (OSError, HFValidationError, SafetensorError) as error:
        # diffusers and the hub report a missing folder, file, id or network as one of these.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        msg = (
            f"cannot load the model {location}: {reason} (give the folder of a diffusers pipeline or an id on the hub)"
        )
        raise ModelFolderError(msg) from error
    finally:
        if not show_downloads and not were_disabled:
            enable_progress_bars()


@contextmanager
def quiet_libraries() -> Generator[None, None, None]:
    """Within the block, the libraries below keep their advice to developers to themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    spoken = transformers_logging.get_verbosity()
    # Before diffusers is imported: its import already makes transformers talk.
    transformers_logging.set_verbosity_error()
    from diffusers.utils import logging as diffusers_logging

    heard = diffusers_logging.get_verbosity()
    bars = [(library, library.is_progress_bar_enabled()) for library in (transformers_logging, diffusers_logging)]
    diffusers_logging.set_verbosity_error()
    for library, _ in bars:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_CHATTY)
            yield
    finally:
        transformers_logging.set_verbosity(spoken)
        diffusers_logging.set_verbosity(heard)
        for library, enabled in bars:
            if enabled:
                library.enable_progress_bar()
