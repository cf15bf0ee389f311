"""The examples in the docstrings and in README.md run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import memad_fast

NEEDS = {"memad_fast.index.faiss_index": "faiss"}  # what examples need beyond the requirements of the package

README = Path(__file__).parents[1] / "README.md"


def _modules_with_examples() -> list[str]:
    package = Path(memad_fast.__file__).parent
    names = [info.name for info in pkgutil.walk_packages([str(package)], "memad_fast.")]
    sources = {name: package.parent.joinpath(*name.split(".")) for name in names}
    files = {name: path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
             for name, path in sources.items()}  # fmt: skip
    return [name for name, file in files.items() if file.exists() and ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", _modules_with_examples())
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests (installed package)")
def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ```python block of the README runs, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = README.read_text(encoding="utf-8").split("```python\n")[1:]
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.split("```")[0], str(README), "exec"), namespace)


def test_every_public_op_has_an_example() -> None:
    for name in memad_fast.__all__:
        value = getattr(memad_fast, name)
        if callable(value) and not isinstance(value, type):
            assert ">>> " in (value.__doc__ or ""), name
