"""What a run may take, from the options and the machine."""

from __future__ import annotations

import torch

from latent_tiles.errors import BudgetError
from latent_tiles.executor.plan import Budget, Work, fit_windows
from latent_tiles.executor.schedule import passes
from latent_tiles.vae.options import VaeOptions

_MIB = 2**20
_CPU_WINDOW_VALUES = 3 * 2**20
"""12 MiB of float32 a tensor: above that the allocator maps fresh pages for each one, which takes longer than most
layers need to fill them; below it the borders of windows cost more."""
_WIDE = 4
"""So many times as many where layers are run one after another: their borders add up and weigh more than the pages."""
_CPU_WINDOWS_BYTES = 2**31
"""More than this helps no CPU, and the rest of the memory has better uses."""
_GPU_WINDOW_VALUES = 2**27
_SHARE_OF_FREE_MEMORY = 0.5
_SHARE_OF_FREE_DEVICE = 0.8


def budget_of(options: VaeOptions, work: Work, device: torch.device, *, window_values: int | None = None) -> Budget:
    """The budget for one encode or decode.

    Args:
        options: what the caller asked for.
        work: what is to be done.
        device: where windows are computed.
        window_values: most values of one tensor in a window, whatever the options say.
    """
    host = _free_memory() * _SHARE_OF_FREE_MEMORY if options.ram_budget_mib is None else options.ram_budget_mib * _MIB
    on_cpu = device.type == "cpu"
    values = window_values or _window_values(options, work)
    wide = values
    if values is None:
        values = _CPU_WINDOW_VALUES if on_cpu else _GPU_WINDOW_VALUES
        wide = _WIDE * values
    if options.device_budget_mib is not None:
        total = int(options.device_budget_mib * _MIB)
    elif device.type == "cuda":
        total = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE_DEVICE)
    else:
        total = min(_CPU_WINDOWS_BYTES, int(_free_memory() * _SHARE_OF_FREE_MEMORY))

    def budget(window_bytes: int) -> Budget:
        return Budget(
            window_bytes=window_bytes,
            device_bytes=0 if on_cpu else total - window_bytes,
            host_bytes=int(host),
            disk_bytes=int(options.spill_budget_mib * _MIB),
            seconds=options.time_budget_s,
            window_values=values,
            wide_window_values=wide,
            kernel_share=_kernel_share(device, work.itemsize),
        )

    if on_cpu:
        return budget(total)
    # Half of a GPU for windows and half for maps, unless windows cannot do with that.
    half = budget(total // 2)
    try:
        fit_windows(work, passes(work.program, ()), half)
    except BudgetError:
        return budget(total)
    return half


def _kernel_share(device: torch.device, itemsize: int) -> float:
    """What windows take in all over what the plan counts of their tensors.

    On a CPU, by benchmarks/bench_vae.py, oneDNN's packed copies of a layer's input, weights and output. On a GPU the
    workspace of convolutions; in half precision also the norms' and statistics' copies in float32, which are several.
    """
    if device.type == "cpu":
        return 2.5
    return 1.25 if itemsize >= 4 else 2.0


def _window_values(options: VaeOptions, work: Work) -> int | None:
    """The limit that gives windows of the wanted side where the map is largest."""
    if options.tile is None:
        return None
    widest = max(size.area for size in work.sizes)
    channels = max(
        node.channels for node, size in zip(work.program.nodes, work.sizes, strict=True) if size.area == widest
    )
    return options.tile**2 * channels


def _free_memory() -> int:
    import psutil  # pyright: ignore[reportMissingModuleSource]

    return int(psutil.virtual_memory().available)
