"""Feed an unchanged host pipeline the noise of a `NoiseField`.

Hosts and schedulers draw with `torch.randn`, through diffusers' `randn_tensor`. Within a scope those draws are answered
by the field instead. Scopes are opened round the host's preparation and the scheduler's `step` alone, never round the
model: an open scope costs about a microsecond for every operation.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from latent_tiles.denoiser import Clock
from latent_tiles.errors import NoiseError
from latent_tiles.geometry import Box
from latent_tiles.noise import NoiseField, Purpose
from latent_tiles.patches import patched

_UNKEYED_DRAWS = frozenset({torch.normal, torch.Tensor.normal_, torch.rand, torch.rand_like})


class FieldDraws(TorchFunctionMode):
    """Answers `torch.randn` and `torch.randn_like` from a field while it is active.

    Args:
        field: the noise.
        purpose: what draws in this scope are for.
        step: number of the solver's step, for purpose "step".

    Raises:
        NoiseError: inside the scope, a draw that is not (items, channels, height, width), or of another kind.
    """

    def __init__(self, field: NoiseField, purpose: Purpose, *, step: int = 0) -> None:
        super().__init__()
        self._field, self._step = field, step
        self._purpose: Purpose = purpose

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a draw, pass everything else on."""
        kwargs = kwargs or {}
        if func is torch.randn:
            sizes = kwargs.get("size", args)
            shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)
            return self._answer(shape, kwargs.get("device"), kwargs.get("dtype"))
        if func is torch.randn_like:
            like: Tensor = args[0]
            return self._answer(
                tuple(like.shape), kwargs.get("device") or like.device, kwargs.get("dtype") or like.dtype
            )
        if func in _UNKEYED_DRAWS:
            name = getattr(func, "__name__", str(func))
            raise NoiseError(f"the noise field cannot answer a draw by {name}; use noise='host'")
        return func(*args, **kwargs)

    def _answer(self, shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> Tensor:
        if len(shape) != 4:
            msg = f"the noise field answers draws of (items, channels, height, width), not {shape}; use noise='host'"
            raise NoiseError(msg)
        items, channels, height, width = shape
        box = Box(0, 0, height, width)
        noise = self._field.sample(self._purpose, items=items, channels=channels, box=box, step=self._step)
        return noise.to(device=device or "cpu", dtype=dtype or torch.get_default_dtype())


def require_keyed_draws(scheduler: Any) -> None:
    """Refuse schedulers whose noise does not come from `torch.randn` in `step`.

    Raises:
        NoiseError: the scheduler integrates along a Brownian tree of its own.
    """
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "BrownianTreeNoiseSampler"):
        msg = (
            f"{type(scheduler).__name__} draws its noise from a Brownian tree, past the noise field; use noise='host', "
        )
        raise NoiseError(msg + "or DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'")


@contextmanager
def field_noise(pipe: Any, field: NoiseField, clock: Clock) -> Generator[None, None, None]:
    """Within the block, a field answers the draws of a host's preparation, its VAE's posterior and its solver's steps.

    Args:
        pipe: a diffusers pipeline with `scheduler` and `prepare_latents`.
        field: the noise.
        clock: says which step the solver is in.

    Raises:
        NoiseError: see `require_keyed_draws`.
    """
    require_keyed_draws(pipe.scheduler)
    with ExitStack() as stack:
        stack.enter_context(_scoped(pipe, "prepare_latents", lambda: FieldDraws(field, "initial")))
        stack.enter_context(_scoped(pipe.scheduler, "step", lambda: FieldDraws(field, "step", step=clock.steps)))
        stack.enter_context(_posterior(pipe.vae, field))
        low_res_scheduler = getattr(pipe, "low_res_scheduler", None)
        if low_res_scheduler is not None:
            stack.enter_context(_low_res(low_res_scheduler, field))
        yield


def _scoped(target: Any, name: str, scope: Callable[[], FieldDraws]) -> AbstractContextManager[None]:
    original = getattr(target, name)

    # `wraps`: hosts read the signature of `scheduler.step` to learn what it takes.
    @functools.wraps(original)
    def within(*args: Any, **kwargs: Any) -> Any:
        with scope():
            return original(*args, **kwargs)

    return patched(target, name, within)


def _posterior(vae: Any, field: NoiseField) -> AbstractContextManager[None]:
    original = vae.encode

    @functools.wraps(original)
    def encode(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            draw = posterior.sample

            @functools.wraps(draw)
            def sample(*args: Any, **kwargs: Any) -> Tensor:
                with FieldDraws(field, "posterior"):
                    return draw(*args, **kwargs)

            posterior.sample = sample
        return output

    return patched(vae, "encode", encode)


def _low_res(scheduler: Any, field: NoiseField) -> AbstractContextManager[None]:
    """The x4 host draws this noise in its own body; it is replaced where it is added."""
    original = scheduler.add_noise

    @functools.wraps(original)
    def add_noise(original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        items, channels, height, width = noise.shape
        own = field.sample("low_res", items=items, channels=channels, box=Box(0, 0, height, width))
        return original(original_samples, own.to(noise), timesteps)

    return patched(scheduler, "add_noise", add_noise)
