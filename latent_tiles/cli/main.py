"""`latent-tiles`: the parser of all commands, and what becomes of their errors.

Nothing heavy is imported here or by the commands' modules: torch, diffusers and Pillow are loaded when a command runs,
so that `--help` and wrong use answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from latent_tiles import __version__
from latent_tiles.cli import demo, upscale
from latent_tiles.cli.failures import INTERRUPTED, WRONG_USE, explain_out_of_memory, status_of
from latent_tiles.errors import LatentTilesError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0 fine, 1 a run or check failed, 2 wrong use or bad input, 130 interrupted.

    Raises:
        SystemExit: argparse's, after --help, --version or arguments that it does not understand.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        return WRONG_USE
    try:
        return arguments.run(arguments)
    except LatentTilesError as error:
        _complain(str(error))
        return status_of(error)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        advice = explain_out_of_memory(error)
        if advice is None:
            raise
        _complain(advice)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latent-tiles",
        description="Upscale photographs that no diffusion model fits, tile by tile in latent space.",
        epilog="exit status: 0 fine, 1 a run failed, 2 wrong use or bad input, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"latent-tiles {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    upscale.add_command(commands)
    demo.add_command(commands)
    return parser


def _complain(text: str) -> None:
    print(f"latent-tiles: error: {' '.join(text.split())}", file=sys.stderr)
