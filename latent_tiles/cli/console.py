"""What a command says, and to which stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Console:
    """Results go to stdout, everything else to stderr.

    Args:
        quiet: say nothing but errors.
        as_json: stdout is for programs: one JSON document and nothing else.
    """

    quiet: bool = False
    as_json: bool = False

    @property
    def shows_progress(self) -> bool:
        """Somebody watches: a bar can be drawn."""
        return not self.quiet and not self.as_json and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if not self.quiet and not self.as_json:
            print(f"latent-tiles: {text}", file=sys.stderr)

    def result(self, rows: Sequence[tuple[str, str]], content: Mapping[str, Any]) -> None:
        """The outcome: a table for people, or the sidecar's content for programs."""
        if self.as_json:
            print(json.dumps(content, indent=2, allow_nan=False))
        elif not self.quiet:
            width = max(len(name) for name, _ in rows) + 2
            for name, value in rows:
                print(f"{name:<{width}}{value}")
