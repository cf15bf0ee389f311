"""What the compiler makes of the Triton kernels, for every processor they are meant for: no GPU is needed.

``launches.py`` lists the calls. They are compiled in a process of their own, since here Triton's interpreter is on.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from compile_only import TARGETS
from launches import LAUNCHES, Launch

from memad_fast import kernels

FOLDER = Path(__file__).parent
ALL = [pytest.param(file, launch, id=str(launch)) for file, launches in LAUNCHES.items() for launch in launches]
each_launch = pytest.mark.parametrize(("file", "launch"), ALL)
each_target = pytest.mark.parametrize("target", TARGETS)


# Of faulty.py: its calls, and what is wrong with each.
FAULTS = {name: {name} - {"sound"} for name in ("sound", "greedy", "rounding", "spilling", "slow", "specialised")}


@functools.cache
def compiled(*program: str) -> list[dict[str, Any]]:
    """What a program of this folder prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(FOLDER.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(FOLDER / program[0]), *program[1:]], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


Of = Callable[[str, Launch, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def of(request: pytest.FixtureRequest) -> Iterator[Of]:
    """What a call compiled for a target, at least something. Files are compiled side by side, one a processor."""
    tests = [item for item in request.session.items if "of" in getattr(item, "fixturenames", ())]
    asked = dict.fromkeys(test.callspec.params["file"] for test in tests)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        files = {file: pool.submit(compiled, "launches.py", file) for file in asked}

        def find(file: str, launch: Launch, target: str) -> list[dict[str, Any]]:
            rows = files[file].result()
            found = [row for row in rows if (row["launch"], row["target"]) == (str(launch), target)]
            assert found, f"{launch} launches no kernel"
            return found

        yield find


def too_large(rows: list[dict[str, Any]], target: str) -> dict[str, int]:
    """Bytes of shared memory of the kernels that do not fit a block."""
    limit = TARGETS[target][1].shared_memory
    return {row["kernel"]: row["shared_memory"] for row in rows if row["shared_memory"] > limit}


def in_tf32(rows: list[dict[str, Any]]) -> set[str]:
    return {row["kernel"] for row in rows if row["tf32"]}


def spilled(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of local memory a thread, of the kernels that use any."""
    return {row["kernel"]: row["stack"] for row in rows if row["stack"]}


def without_tensor_cores(rows: list[dict[str, Any]], kernel: str) -> bool:
    instructions = [row["matrix_instructions"] for row in rows if row["kernel"] == kernel]
    assert instructions, f"no kernel {kernel}"
    return not all(instructions)


def compiled_again(rows: list[dict[str, Any]]) -> set[tuple[str, int]]:
    """Kernels that another batch size than the first compiled, with that size."""
    first = {row["key"] for row in rows if row["batch"] == rows[0]["batch"]}
    return {(row["kernel"], row["batch"]) for row in rows if row["key"] not in first}


def test_every_op_is_compiled() -> None:
    """An op that Triton serves has its calls in launches.py."""
    assert {launch.op for launches in LAUNCHES.values() for launch in launches} == set(kernels.FILES)
    assert set(LAUNCHES) == set(kernels.FILES.values())


@each_target
@each_launch
def test_shared_memory_fits(of: Of, file: str, launch: Launch, target: str) -> None:
    assert not too_large(of(file, launch, target), target)


@each_target
@each_launch
def test_nothing_is_rounded_to_tf32(of: Of, file: str, launch: Launch, target: str) -> None:
    assert not in_tf32(of(file, launch, target))


@each_target
@each_launch
def test_registers_are_not_spilled(of: Of, file: str, launch: Launch, target: str) -> None:
    found = spilled(of(file, launch, target))
    if found and launch.accepted_stack:
        pytest.skip(f"{found} bytes of local memory a thread: {launch.accepted_stack}")
    assert not found


@each_target
@pytest.mark.parametrize(("file", "launch"), [one for one in ALL if one.values[1].matrix])
def test_products_run_on_tensor_cores(of: Of, file: str, launch: Launch, target: str) -> None:
    assert not without_tensor_cores(of(file, launch, target), launch.matrix)


@each_target
@each_launch
def test_another_batch_size_compiles_nothing(of: Of, file: str, launch: Launch, target: str) -> None:
    assert not compiled_again(of(file, launch, target))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_these_checks_refuse_what_is_wrong(target: str) -> None:
    """Kernels with one fault each: every check finds its own, and none in the others."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in compiled("faulty.py"):
        if row["target"] == target:
            rows.setdefault(row["launch"], []).append(row)
    expected = FAULTS if target.startswith("sm_") else {"sound": set(), "spilling": {"spilling"}}
    checks = {
        "greedy": lambda launch: too_large(launch, target),
        "rounding": in_tf32,
        "spilling": spilled,
        "slow": lambda launch: without_tensor_cores(launch, "product"),
        "specialised": compiled_again,
    }
    faults = {name: {fault for fault, check in checks.items() if check(launch)} for name, launch in rows.items()}
    assert faults == expected
