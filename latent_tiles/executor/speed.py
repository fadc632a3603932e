"""A short calibration of the machine, so that a plan can say how long it will take."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from latent_tiles.executor.plan import Speed

_DISK_BYTES = 5e8
"""Not measured: a file system's cache would answer for the disk. A SATA SSD does about this."""


@functools.lru_cache(maxsize=16)
def measured_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """What a device does in a second at the work of an autoencoder, measured once in a process, in about 0.2 s.

    Args:
        device: where windows are computed.
        dtype: of the weights and maps.
    """
    channels, side = 128, 96 if device.type == "cpu" else 512
    values = torch.ones(1, channels, side, side, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.ones(channels, channels, 3, 3, device=device, dtype=dtype)
    tokens = values.flatten(2).transpose(1, 2)[:, None]
    copied = torch.ones(2**22, device=device)
    convolution = _seconds(lambda: F.conv2d(values, weight, padding=1), device)
    attention = _seconds(lambda: F.scaled_dot_product_attention(tokens[:, :, :1024], tokens, tokens), device)
    copy = _seconds(copied.clone, device)
    return Speed(
        flops=2.0 * 9 * channels**2 * side**2 / convolution,
        attention_flops=4.0 * channels * min(1024, side**2) * side**2 / attention,
        host_bytes=2 * copied.nbytes / copy,
        disk_bytes=_DISK_BYTES,
    )


def _seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The shortest of three runs after one that does not count."""
    shortest = float("inf")
    with torch.inference_mode():
        for attempt in range(4):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            if attempt:
                shortest = min(shortest, time.perf_counter() - start)
    return max(shortest, 1e-6)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
