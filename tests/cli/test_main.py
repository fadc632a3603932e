import subprocess
import sys

import pytest

import latent_tiles
from latent_tiles.cli.failures import RunError, explain_out_of_memory, status_of
from latent_tiles.cli.main import main
from latent_tiles.errors import SettingError


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", ["[]", "['--help']", "['upscale']", "['upscale', '--help']", "['demo', '--help']"]
)
def test_help_and_wrong_use_load_nothing_heavy(arguments: str) -> None:
    program = (
        "import sys\n"
        "from latent_tiles.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy', 'tqdm', 'skimage'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_program() -> None:
    done = python("-m", "latent_tiles", "--version")
    assert done.returncode == 0
    assert done.stdout == f"latent-tiles {latent_tiles.__version__}\n"


def test_no_command_shows_help_and_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "upscale" in capsys.readouterr().err


def test_unknown_command_is_wrong_use() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sharpen"])
    assert stop.value.code == 2


def test_status_tells_bad_input_from_a_failed_run() -> None:
    assert status_of(SettingError("x")) == 2
    assert status_of(RunError("x")) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)
def test_running_out_of_memory_says_what_to_lower(error: Exception) -> None:
    assert "lower --tile-batch, then --tile" in (explain_out_of_memory(error) or "")


def test_cuda_out_of_memory_is_known() -> None:
    import torch

    assert explain_out_of_memory(torch.OutOfMemoryError("CUDA")) is not None
    assert explain_out_of_memory(RuntimeError("size mismatch")) is None
