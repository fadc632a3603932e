"""What the documentation says is run: README snippets, docstring examples, commands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import latent_tiles

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPET = re.compile(r"(?P<mark><!-- not run: .*? -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def modules() -> list[str]:
    import latent_tiles.pipelines

    paths = [(latent_tiles.__path__, "latent_tiles."), (latent_tiles.pipelines.__path__, "latent_tiles.pipelines.")]
    names = [entry.name for path, prefix in paths for entry in pkgutil.walk_packages(path, prefix)]
    return sorted({name for name in names if not name.endswith("__main__")})


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


def test_there_are_examples_to_run() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in modules()) > 10


@pytest.mark.parametrize("code", [match["code"] for match in SNIPPET.finditer(README) if not match["mark"]])
def test_readme_snippets_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_snippets_that_are_not_run_are_valid_and_name_real_things() -> None:
    skipped = [match["code"] for match in SNIPPET.finditer(README) if match["mark"]]
    assert skipped
    for code in skipped:
        compile(code, "README.md", "exec")
        for line in re.findall(r"^from .*$", code, re.MULTILINE):
            exec(line, {})


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("make demo", "make test"):
        assert command in README
        assert command in script


def test_every_option_of_the_readmes_commands_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from latent_tiles.cli.main import main

    with pytest.raises(SystemExit):
        main(["upscale", "--help"])
    listed = capsys.readouterr().out
    block = README[README.index("latent-tiles upscale photo.jpg") :].split("```")[0]
    for option in re.findall(r"(--[a-z-]+)", block):
        assert option in listed


def test_public_names_are_lazy_and_complete() -> None:
    for name in latent_tiles.__all__:
        assert getattr(latent_tiles, name) is not None
        assert name in dir(latent_tiles)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = latent_tiles.nothing
