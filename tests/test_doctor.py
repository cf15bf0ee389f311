from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import memad_fast
from memad_fast import doctor

WITHOUT = """
import sys
sys.path[:0] = {path!r}
sys.modules.update(dict.fromkeys({names!r}))  # importing a None raises ModuleNotFoundError
sys.argv = ["memad-fast", *{arguments!r}]
from memad_fast.cli import main
main()
"""


def _without(names: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(memad_fast.__file__).parents[1])
    program = WITHOUT.format(path=[root], names=names, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_everything_missing_has_a_reason_and_a_way_to_get_it() -> None:
    for findings in doctor.examine().values():
        for finding in findings:
            assert finding.detail
            assert finding.ok or finding.fix


def test_the_instruction_set_in_force_is_told() -> None:
    native = pytest.importorskip("memad_fast.native")
    told = {finding.name: finding.detail for finding in doctor.examine()["instruction sets"]}
    assert list(told) == native.isas()
    assert told[native.isa()] == "in force"


def test_it_tells_which_ops_a_gpus_backends_have_kernels_for() -> None:
    program = [sys.executable, "-m", "memad_fast", "doctor"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "COLUMNS": "500"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    (line,) = [line for line in done.stdout.splitlines() if " triton " in line and "kernels for" in line]
    assert "fifo_write_, " in line
    assert "prepare_keys_rows_" not in line  # no public function


def test_it_says_that_torch_is_missing() -> None:
    done = _without(["torch"], "doctor")
    assert done.returncode == 0, done.stderr
    assert "torch halted" in done.stdout
    assert "pip install 'torch>=2.10'" in done.stdout


def test_it_says_that_the_compiled_module_is_missing() -> None:
    done = _without(["memad_fast._native"], "doctor")
    assert done.returncode == 0, done.stderr
    assert "pip install --no-build-isolation ." in done.stdout


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_doctor_works_without_the_command_lines_packages_and_every_other_command_says_what_to_install(
    package: str,
) -> None:
    done = _without([package], "doctor")
    assert done.returncode == 0, done.stderr
    assert f"-- {package}" in " ".join(done.stdout.split())
    done = _without([package], "score")
    assert done.returncode != 0
    assert done.stderr.strip() == f"memad-fast needs the package {package}. To get it: pip install 'memad_fast[app]'"


def test_a_wrong_environment_variable_is_told_and_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMAD_FAST_BACKEND", "abacus")
    done = subprocess.run([sys.executable, "-m", "memad_fast", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "abacus" in done.stdout
