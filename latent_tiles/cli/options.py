"""Options that commands share, and the spelling of their values.

Options left out stay None, so that the model's own defaults hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_tiles.tiling import Tiling
    from latent_tiles.vae.options import VaeOptions

_SEED_LIMIT = 2**64
_MODEL_DEFAULT = "default: the model's"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="FOLDER_OR_ID",
        help="folder of a diffusers pipeline or its id on the hub (default: the reference model that comes along)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where the model runs (default: auto, the first of cuda, mps and cpu that is there)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="the model's numbers (default: auto, float16 on cuda with --model, otherwise float32)",
    )
    group.add_argument(
        "--attention",
        choices=("auto", "sdpa", "xformers"),
        default="auto",
        help="kernel of the attention (default: auto, xformers where it is installed and runs, otherwise sdpa)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of the model."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--prompt", metavar="TEXT", help="what the picture shows (default: empty)")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what it must not show (default: empty)")
    group.add_argument("--steps", type=whole(1), metavar="N", help=f"steps of the sampler ({_MODEL_DEFAULT})")
    group.add_argument(
        "--guidance", type=real(0), metavar="G", help=f"weight of the prompt, 1 is off ({_MODEL_DEFAULT})"
    )
    group.add_argument(
        "--image-guidance",
        type=real(0),
        metavar="G",
        help=f"weight of the source, for InstructPix2Pix ({_MODEL_DEFAULT})",
    )
    group.add_argument(
        "--strength",
        type=real(0, 1),
        metavar="S",
        help=f"share of the picture that is renewed, 0 to 1, for image-to-image models ({_MODEL_DEFAULT})",
    )
    group.add_argument(
        "--noise-level", type=whole(0), metavar="N", help=f"noise on the source, for x4 models ({_MODEL_DEFAULT})"
    )
    add_seed_option(group)


def add_seed_option(group: Any, default: int | None = None) -> None:
    """The seed; drawn where it is left out and there is no default."""
    shown = "drawn, and told" if default is None else default
    group.add_argument(
        "--seed",
        type=whole(0, _SEED_LIMIT - 1),
        metavar="N",
        default=default,
        help=f"the same seed and settings give the same picture (default: {shown})",
    )


def add_tiling_options(parser: argparse.ArgumentParser) -> None:
    """How the frame is cut."""
    group = parser.add_argument_group("tiling (lengths in pixels of the result)")
    group.add_argument(
        "--tile", type=pixels, metavar="PX", help=f"side of a tile, or HEIGHTxWIDTH such as 512x768 ({_MODEL_DEFAULT})"
    )
    group.add_argument(
        "--overlap", type=pixels, metavar="PX", help=f"least overlap of tiles, or HEIGHTxWIDTH ({_MODEL_DEFAULT})"
    )
    group.add_argument(
        "--window",
        metavar="NAME",
        default="cosine",
        help="weights of a tile: cosine, linear, gaussian or uniform (default: cosine)",
    )
    group.add_argument(
        "--memory",
        metavar="NAME",
        help=f"what a tile sees of its neighbours: none, pin or pin:lambda=0.5 ({_MODEL_DEFAULT})",
    )
    group.add_argument(
        "--tile-batch",
        type=whole(1),
        default=1,
        metavar="N",
        help="tiles that go through the model at once; more is faster on a GPU and takes more memory (default: 1)",
    )
    group.add_argument(
        "--noise",
        choices=("field", "host"),
        default="field",
        help="field: noise belongs to the place in the picture; host: the model's pipeline draws it (default: field)",
    )


def add_vae_options(parser: argparse.ArgumentParser) -> None:
    """How the autoencoder is run, and within which budgets."""
    group = parser.add_argument_group("autoencoder (sizes such as 800MiB or 8GiB)")
    group.add_argument(
        "--vae",
        choices=("exact", "sampled", "stock"),
        default="exact",
        help="exact: in tiles, equal to one untiled pass; sampled: with statistics from parts of the frame, for little "
        "memory; stock: untiled (default: exact)",
    )
    group.add_argument(
        "--vae-tile", type=whole(16), metavar="PX", help="side of its tiles; the result is the same (default: chosen)"
    )
    group.add_argument(
        "--device-budget", type=size_mib, metavar="SIZE", help="what its tiles may take on the device (default: chosen)"
    )
    group.add_argument(
        "--ram-budget",
        type=size_mib,
        metavar="SIZE",
        help="what its intermediate maps may take in memory; less is slower (default: half of what is free)",
    )
    group.add_argument(
        "--spill-budget",
        type=size_mib,
        default=0.0,
        metavar="SIZE",
        help="what those maps may take on disk where memory does not suffice (default: 0, nothing)",
    )
    group.add_argument("--spill-dir", type=path, metavar="FOLDER", help="where (default: the temporary folder)")
    group.add_argument(
        "--attention-keys",
        type=whole(1),
        metavar="N",
        help="let its attention see at most so many places of the frame; the error is measured (default: all)",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of the files and the terminal."""
    group = parser.add_argument_group("output")
    group.add_argument("--overwrite", action="store_true", help="replace files that exist already")
    group.add_argument("--json", action="store_true", help="print the sidecar's content as JSON, and nothing else")
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def tiling_of(arguments: argparse.Namespace) -> Tiling:
    """The tiling that the options describe.

    Raises:
        TilingError: a value out of range, or an unknown window.
        MemoryStrategyError: an unknown memory.
    """
    from latent_tiles.memory import build_memory
    from latent_tiles.tiling import Tiling

    if arguments.memory is not None:
        build_memory(arguments.memory)
    return Tiling(
        tile=arguments.tile,
        overlap=arguments.overlap,
        window=arguments.window,
        memory=arguments.memory,
        tile_batch=arguments.tile_batch,
        noise=arguments.noise,
    )


def vae_options_of(arguments: argparse.Namespace) -> VaeOptions:
    """How the options want the autoencoder run.

    Raises:
        VaeError: a value out of range, or no such folder.
    """
    from latent_tiles.vae.options import VaeOptions

    return VaeOptions(
        mode=arguments.vae,
        tile=arguments.vae_tile,
        device_budget_mib=arguments.device_budget,
        ram_budget_mib=arguments.ram_budget,
        spill_budget_mib=arguments.spill_budget,
        spill_dir=arguments.spill_dir,
        attention_keys=arguments.attention_keys,
    )


def host_arguments_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments for the host's call, under the names diffusers gives them; those left out are None."""
    return {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "image_guidance_scale": arguments.image_guidance,
        "strength": arguments.strength,
        "noise_level": arguments.noise_level,
    }


def path(text: str) -> Path:
    """A file's name; empty ones would silently mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file's name, got an empty one")
    return Path(text)


def pixels(text: str) -> int | tuple[int, int]:
    """`512` or `512x768` (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected pixels such as 512, or HEIGHTxWIDTH such as 512x768, got {text!r}")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


_UNITS = {"k": 2**-10, "m": 1.0, "g": 2.0**10, "t": 2.0**20}


def size_mib(text: str) -> float:
    """`800MiB`, `8GiB` or `1.5g`, in MiB."""
    number = text.lower().removesuffix("ib").removesuffix("b")
    if number[-1:] in _UNITS:
        try:
            value = float(number[:-1]) * _UNITS[number[-1]]
        except ValueError:
            value = -1.0
        if 0 <= value < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a size such as 800MiB or 8GiB, got {text!r}")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {_range(low, high)}, got {value}")
        return value

    return parse


def real(low: float, high: float | None = None) -> Callable[[str], float]:
    """A finite number from `low` to `high`, both included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not low <= value < float("inf") or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {_range(low, high)}, got {text}")
        return value

    return parse


def _range(low: float, high: float | None) -> str:
    return f"at least {low}" if high is None else f"a value from {low} to {high}"
