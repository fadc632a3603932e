"""Which kernel computes attention: torch's own, or xformers where it is installed and runs."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch

from latent_tiles.errors import SettingError

_LOG = logging.getLogger(__name__)

AttentionChoice = Literal["auto", "sdpa", "xformers"]

# No package (ImportError), a damaged or foreign binary (OSError, AttributeError), no kernel for this device and dtype
# (NotImplementedError, ValueError), one that was not built for this GPU (RuntimeError).
_CANNOT_RUN = (ImportError, OSError, AttributeError, NotImplementedError, ValueError, RuntimeError)


def select_attention(pipe: Any, choice: AttentionChoice = "auto") -> str:
    """Choose the attention kernel of a pipeline's models.

    That xformers is installed does not say that it runs: it may lack a kernel for this GPU, dtype or torch. So it
    computes one tiny attention where the pipeline's models will run, and is taken only if that works.

    Args:
        pipe: a diffusers pipeline; models are already where they will run.
        choice: "sdpa" for torch's scaled_dot_product_attention; "xformers"; "auto" for xformers where it runs and sdpa
            otherwise.

    Returns:
        "sdpa" or "xformers", which is also logged.

    Raises:
        SettingError: an unknown choice, or "xformers" where it cannot run; the message gives the reason.
    """
    if choice not in get_args(AttentionChoice):
        raise SettingError(f"unknown attention {choice!r}; use one of {', '.join(get_args(AttentionChoice))}")
    if choice == "sdpa":
        if _runs_on_xformers(pipe):
            pipe.disable_xformers_memory_efficient_attention()
        return _selected("sdpa", "asked for")
    obstacle = _obstacle(pipe)
    if obstacle is None:
        return _selected("xformers", "it runs here")
    if choice == "xformers":
        raise SettingError(f"attention 'xformers' cannot run here: {obstacle}; use 'sdpa' or 'auto'")
    return _selected("sdpa", f"xformers cannot run here: {obstacle}")


def _obstacle(pipe: Any) -> str | None:
    """Switch the pipeline to xformers; why that is not possible, or None where it was."""
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        # (items, positions, heads, channels), the smallest call that picks a kernel.
        probe = torch.zeros((1, 8, 1, 32), device=pipe._execution_device, dtype=pipe.unet.dtype)
        memory_efficient_attention(probe, probe, probe)
        pipe.enable_xformers_memory_efficient_attention()
    except _CANNOT_RUN as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _runs_on_xformers(pipe: Any) -> bool:
    return any("XFormers" in type(processor).__name__ for processor in pipe.unet.attn_processors.values())


def _selected(name: str, reason: str) -> str:
    _LOG.info("attention: %s (%s)", name, reason)
    return name


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
