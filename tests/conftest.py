"""Settings that hold for every test."""

import os

# Before any library that reads them: tests never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

from jaxtyping import install_import_hook

ROOT = Path(__file__).parent.parent

# Called hundreds of thousands of times with plain integers; their results are checked against whole maps instead.
UNCHECKED = {f"latent_tiles.executor.{name}" for name in ("cost", "evaluate", "ops", "reach", "schedule")} | {
    "latent_tiles.geometry"
}


def _modules() -> set[str]:
    library = {path.relative_to(ROOT) for path in (ROOT / "latent_tiles").rglob("*.py") if path.stem != "__init__"}
    ours = {".".join(path.with_suffix("").parts) for path in library}
    return ours | {f"latent_tiles.pipelines.{path.stem}" for path in (ROOT / "pipelines").glob("*.py")}


# Types and tensor shapes in signatures are checked at run time; see runtime_types.py.
install_import_hook(sorted(_modules() - UNCHECKED - {"latent_tiles.pipelines.__init__"}), "runtime_types.check")

import diffusers
import pytest
import torch
import transformers
from hypothesis import settings

# Tiny models gain nothing from threads, and on a busy machine lose much.
torch.set_num_threads(1)

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed_global_generator() -> None:
    """Stock hosts draw from torch's global generator where they are given none."""
    torch.manual_seed(0)
