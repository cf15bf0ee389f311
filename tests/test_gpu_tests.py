"""The tests of tests/gpu run here as far as a CPU can: on its own kernels and small shapes, so that they are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run themselves where there is a CUDA device")
def test_they_hold_on_the_cpus_kernels() -> None:
    environment = os.environ | {"MEMAD_FAST_GPU_DRY_RUN": "cpu"}
    environment.pop("MEMAD_FAST_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed.group(1)) > 300  # of about 850; graphs, streams and the device's memory cannot be tried


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run themselves where there is a CUDA device")
def test_without_a_device_they_skip_themselves_with_a_reason() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MEMAD_FAST_GPU_DRY_RUN"}
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_fifo_write_.py", "-rs", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "needs a CUDA device" in run.stdout
    assert "passed" not in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run themselves where there is a CUDA device")
def test_with_a_device_they_can_be_collected() -> None:
    """What is decided at import, by whether there is a device, must not fail there first."""
    program = """
        import sys, pytest, torch
        torch.cuda.is_available = lambda: True
        sys.exit(pytest.main(["--collect-only", "tests/gpu", "-p", "no:cacheprovider"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "test_nearest_keys.py" in run.stdout
