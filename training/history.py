"""How long the weights of a model have been trained, sitting after sitting.

A stage that starts from trained weights writes their history into its checkpoint's settings; the exported folder keeps
the histories of its parts in `training.json`, so that the next sitting and the card know what came before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .loop import find_checkpoint

FILE = "training.json"
"""Name of the file in an exported model."""

History = list[dict[str, Any]]
"""One entry a sitting: "steps" and "minutes"."""


def is_model(source: Path) -> bool:
    """Whether a folder is an exported model rather than a run."""
    return (source / "model_index.json").is_file()


def history_of(source: Path | None, stage: str) -> History:
    """The sittings that went into the weights of one stage.

    Args:
        source: Folder of an exported model or of a run of that stage, or None for fresh weights.
        stage: "vae", "unet" or "decoder".

    Returns:
        The sittings, oldest first; none for fresh weights, or where an exported model does not tell.

    Raises:
        CheckpointError: If the folder is neither a model nor a run with a checkpoint.
    """
    if source is None:
        return []
    if is_model(source):
        path = source / FILE
        return json.loads(path.read_text()).get(stage, []) if path.is_file() else []
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        raise CheckpointError(f"{source} is neither an exported model nor a run with a checkpoint; pass one of them")
    facts = json.loads((checkpoint / "state.json").read_text())
    return sittings(facts) if facts["settings"].get("stage", stage) == stage else []


def sittings(facts: dict[str, Any]) -> History:
    """The sittings of a checkpoint's `state.json`, its own last."""
    own = {"steps": facts["step"], "minutes": round(facts["elapsed_s"] / 60, 1)}
    return [*facts["settings"].get("history", []), own]
