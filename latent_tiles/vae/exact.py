"""Encode and decode images of any size in bounded memory, equal to one untiled pass."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.errors import VaeError
from latent_tiles.executor.maps import Map, Sink, Source
from latent_tiles.executor.plan import Plan, Work, plan
from latent_tiles.executor.program import Program
from latent_tiles.executor.speed import measured_speed
from latent_tiles.executor.spill import MapStore
from latent_tiles.geometry import Box, Size
from latent_tiles.patches import patched
from latent_tiles.vae.budgets import budget_of
from latent_tiles.vae.check import check_program
from latent_tiles.vae.family import VaeFamily
from latent_tiles.vae.measured import MeasuredRun
from latent_tiles.vae.options import VaeOptions
from latent_tiles.vae.registry import vae_family
from latent_tiles.vae.report import Direction, VaePlan, VaeReport
from latent_tiles.vae.sampled import with_patches

_LOG = logging.getLogger(__name__)


class ExactVae:
    """Runs one autoencoder by windows.

    Args:
        vae: a diffusers autoencoder of a supported class; stays as it is.
        options: mode and budgets; not mode "stock".

    Attributes:
        reports: what each encode and decode did, in order.

    Raises:
        VaeError: the class is not supported, or the mode is "stock".

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> exact = ExactVae(AutoencoderTiny(), VaeOptions())
        >>> exact.plan("decode", 1024, 1536).output_size
        (8192, 12288)
    """

    def __init__(self, vae: Any, options: VaeOptions) -> None:
        if options.mode == "stock":
            raise VaeError("mode='stock' leaves the autoencoder alone: there is nothing to run")
        self.vae: Any = getattr(vae, "_orig_mod", vae)  # what torch.compile wraps
        self.options = options
        self.family: VaeFamily = vae_family(self.vae)
        self.reports = list[VaeReport]()
        self._planned: dict[tuple[Any, ...], Plan] = {}

    def plan(
        self,
        direction: Direction,
        height: int,
        width: int,
        *,
        rows: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> VaePlan:
        """What an encode or decode would cost.

        Args:
            direction: "encode" or "decode".
            height: of the image to encode, or of the latents to decode.
            width: likewise.
            rows: images at once.
            device: where it will run; None: where the autoencoder is now.
            dtype: what it will run in; None: that of the autoencoder's weights.

        Raises:
            BudgetError: no plan meets the budgets.
        """
        program = self._encoder() if direction == "encode" else self._decoder({}).program
        made = self._plan(
            program, (Size(height, width),), rows=rows, dtype=dtype or self.vae.dtype, device=device or self._device
        )
        return self._summary(made, program, direction)

    def encode(self, pixels: Float[Tensor, "rows channels *frame height width"]) -> Any:
        """What the autoencoder's `encode` returns.

        Args:
            pixels: as `encode` takes them, range -1 to 1.

        Raises:
            LatentTilesError: an input that does not fit, or a budget that cannot be met.
        """
        flat = self._flat(pixels)
        return self.encode_from(Map(flat, flat.device), like=flat)

    def encode_from(self, source: Source, *, like: Tensor | None = None) -> Any:
        """What `encode` returns, of an image that is read region by region.

        Args:
            source: gives regions (rows, channels, height, width), range -1 to 1.
            like: a tensor with the device and dtype to work in; None: those of the autoencoder's weights.
        """
        self._load()
        like = torch.empty(0, device=self._device, dtype=self.vae.dtype) if like is None else like
        check_program(self, "encode", like)
        first = source.read(Box(0, 0, 1, 1))
        output = self._run(self._encoder(), [source], "encode", like=like, rows=first.shape[0])
        return self.family.encoded(self._deep(output))

    def decode(self, latents: Float[Tensor, "rows channels *frame height width"], **arguments: Any) -> Any:
        """What the autoencoder's `decode` returns.

        Args:
            latents: as `decode` takes them.
            **arguments: what else `decode` takes.
        """
        flat = self._flat(latents)
        self._load()
        check_program(self, "decode", flat)
        return self.family.decoded(self._deep(self._decode(flat, None, arguments)))

    def decode_to(self, latents: Float[Tensor, "rows channels *frame height width"], sink: Sink) -> None:
        """Decode into a sink, region by region; the image is never whole in memory.

        Args:
            latents: as `decode` takes them.
            sink: takes regions in bands from top to bottom, range -1 to 1 as the autoencoder makes them.
        """
        flat = self._flat(latents)
        self._load()
        check_program(self, "decode", flat)
        self._decode(flat, sink, {})

    def _decode(self, latents: Tensor, sink: Sink | None, arguments: dict[str, Any]) -> Tensor:
        decoder = self._decoder(arguments)
        sources = [Map(values, latents.device) for values in (latents, *decoder.extras)]
        return self._run(decoder.program, sources, "decode", like=latents, rows=latents.shape[0], sink=sink)

    def run_small(self, direction: Direction, values: Tensor) -> Tensor:
        """One encode or decode of a small input in several windows, as a tensor; for a check."""
        plain = ExactVae(self.vae, VaeOptions())
        program = plain._encoder() if direction == "encode" else plain._decoder({}).program
        rows, sizes = values.shape[0], (Size(*values.shape[2:]),)
        made = plain._plan(program, sizes, rows=rows, dtype=values.dtype, device=values.device, window_values=4096)
        return plain._execute(made, program, [Map(values, values.device)], like=values, rows=rows, sink=None)[0]

    def _run(
        self,
        program: Program,
        sources: list[Any],
        direction: Direction,
        *,
        like: Tensor,
        rows: int,
        sink: Sink | None = None,
    ) -> Tensor:
        start = time.perf_counter()
        sizes = tuple(source.size for source in sources)
        made = self._plan(program, sizes, rows=rows, dtype=like.dtype, device=like.device)
        summary = self._summary(made, program, direction)
        _LOG.info("%s", summary)
        output, run = self._execute(made, program, sources, like=like, rows=rows, sink=sink, direction=direction)
        report = VaeReport(
            plan=summary,
            seconds=time.perf_counter() - start,
            residual=run.residual,
            attention_error=run.attention_error,
        )
        self.reports.append(report)
        if report.residual is not None and report.residual > self.options.residual_limit:
            _LOG.warning(
                "the sampled statistics of this %s differ from those of the whole frame by %.1e standard deviations, "
                "more than residual_limit=%g; tone may be off by several levels: use mode='exact'",
                direction,
                report.residual,
                self.options.residual_limit,
            )
        return output

    @torch.no_grad()
    def _execute(
        self,
        made: Plan,
        program: Program,
        sources: list[Any],
        *,
        like: Tensor,
        rows: int,
        sink: Sink | None,
        direction: Direction | None = None,
    ) -> tuple[Tensor, MeasuredRun]:
        whole = torch.empty(0)
        if sink is None:
            shape = (rows, program.nodes[program.output].channels, *made.sizes[program.output])
            whole = torch.empty(shape, dtype=like.dtype, device=like.device)
            sink = Map(whole, like.device)
        tell, options = self.options.progress, self.options
        folder = None if options.spill_dir is None else Path(options.spill_dir)
        with MapStore(like.device, folder) as store:
            run = MeasuredRun(
                program=program,
                plan=made,
                inputs={node: _Working(source, like) for node, source in zip(program.inputs, sources, strict=True)},
                sink=sink,
                store=store,
                dtype=like.dtype,
                rows=rows,
                progress=None if tell is None or direction is None else functools.partial(tell, direction),
                sampled=options.mode == "sampled",
                attention_keys=options.attention_keys,
            )
            run()
        return whole, run

    def _plan(
        self,
        program: Program,
        inputs: tuple[Size, ...],
        *,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        window_values: int | None = None,
    ) -> Plan:
        # Free memory may change between a plan that was announced and its run; what was announced holds.
        shape = tuple((node.channels, node.statistic, node.maps) for node in program.nodes)
        key = (shape, inputs, rows, dtype, device, window_values)
        if key in self._planned:
            return self._planned[key]
        work = Work(
            program=program,
            sizes=program.sizes(dict(zip(program.inputs, inputs, strict=True))),
            rows=rows,
            itemsize=dtype.itemsize,
            keys=self.options.attention_keys,
            sampled=self.options.mode == "sampled",
        )
        budgets = budget_of(self.options, work, device, window_values=window_values)
        speed = measured_speed(device, dtype)
        self._planned[key] = with_patches(plan(work, budgets, speed), work, budgets, speed)
        return self._planned[key]

    def _summary(self, made: Plan, program: Program, direction: Direction) -> VaePlan:
        return VaePlan.of(
            made, direction=direction, mode=self.options.mode, inputs=program.inputs[0], output=program.output
        )

    def _encoder(self) -> Program:
        return self.family.encoder(self.vae)

    def _decoder(self, arguments: dict[str, Any]) -> Any:
        return self.family.decoder(self.vae, arguments)

    @property
    def _device(self) -> torch.device:
        """Where the autoencoder runs, which is not where an offloaded one's weights lie."""
        hook = getattr(self.vae, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.vae.device)

    def _load(self) -> None:
        """What diffusers' `apply_forward_hook` does: bring an offloaded model to its device."""
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self.vae)

    def _flat(self, values: Tensor) -> Tensor:
        """(rows, channels, height, width) of what may have an axis of frames."""
        if values.requires_grad and torch.is_grad_enabled():
            raise VaeError("an exact tiled pass gives no gradients; use mode='stock', or call it on .detach()")
        wanted = 5 if self.family.video else 4
        if values.ndim != wanted:
            raise VaeError(f"{self.family.name} takes tensors of {wanted} axes, got {tuple(values.shape)}")
        if self.family.video and values.shape[2] != 1:
            msg = f"{self.family.name} is run exactly for single frames, got {values.shape[2]}; "
            raise VaeError(msg + "pass one frame at a time, or use mode='stock'")
        return values.squeeze(2) if self.family.video else values

    def _deep(self, values: Tensor) -> Tensor:
        return values.unsqueeze(2) if self.family.video else values


class _Working:
    """A source whose regions come on the device, in the dtype and layout that windows are computed in."""

    def __init__(self, source: Source, like: Tensor) -> None:
        self._source, self._device, self._dtype = source, like.device, like.dtype

    @property
    def size(self) -> Size:
        return self._source.size

    def read(self, box: Box) -> Tensor:
        values = self._source.read(box)
        return values.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)


@contextmanager
def exact_vae(vae: Any, options: VaeOptions | None = None, **settings: Any) -> Generator[ExactVae | None, None, None]:
    """Within the block, an autoencoder's `encode` and `decode` work by windows and equal one untiled pass.

    For any diffusers pipeline and any size; memory is bounded, nothing is blended. Outside the block the autoencoder
    is what it was.

    Args:
        vae: a diffusers autoencoder of a supported class.
        options: mode and budgets.
        **settings: the fields of `VaeOptions`, in place of `options`.

    Yields:
        The runner, with plans and reports; None in mode "stock", where nothing changes.

    Raises:
        VaeError: an unsupported class, or settings out of range.

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderTiny
        >>> vae = AutoencoderTiny()
        >>> with exact_vae(vae, tile=64) as exact:
        ...     image = vae.decode(torch.zeros(1, 4, 24, 32)).sample
        >>> tuple(image.shape), exact.reports[0].plan.passes
        ((1, 3, 192, 256), 1)
    """
    if options is not None and settings:
        raise VaeError(f"give options or settings, not both; got options and {', '.join(sorted(settings))}")
    options = options or VaeOptions(**settings)
    if options.mode == "stock":
        yield None
        return
    exact = ExactVae(vae, options)
    if getattr(exact.vae, "use_tiling", False):
        _LOG.info("enable_tiling() of the autoencoder has no effect while it is run exactly")
    with (
        patched(exact.vae, "encode", _replacement(exact.vae.encode, exact.encode)),
        patched(exact.vae, "decode", _replacement(exact.vae.decode, exact.decode)),
    ):
        yield exact


def _replacement(original: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the signature of the method it stands in for."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        values = given.pop(next(iter(signature.parameters)))
        plain = given.pop("return_dict", True) is False
        output = run(values, **given)
        return output.to_tuple() if plain else output

    return method
