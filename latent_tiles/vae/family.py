"""What is particular to one class of autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latent_tiles.executor.program import Program


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The program of one decode call.

    Args:
        program: its first input is the latents.
        extras: what the other inputs are given.
    """

    program: Program
    extras: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VaeFamily:
    """How a class of autoencoders is run as programs.

    Args:
        name: the class's name.
        encoder: the program from an image to what `encode` makes a distribution or latents of.
        decoder: the program from latents to an image, given the other arguments of `decode`.
        encoded: what `encode` returns, made of the encoder's output.
        decoded: what `decode` returns, made of the decoder's output.
        video: tensors have an axis of frames, which must be one long.
    """

    name: str
    encoder: Callable[[Any], Program]
    decoder: Callable[[Any, Mapping[str, Any]], Decoder]
    encoded: Callable[[Tensor], Any]
    decoded: Callable[[Tensor], Any]
    video: bool = False
