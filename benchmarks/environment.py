"""What every benchmark writes beside its figures: commit, versions, device."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where figures come from; times in one file compare with each other, not with another machine's."""
    import diffusers

    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
