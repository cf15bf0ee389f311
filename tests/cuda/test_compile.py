"""Every CUDA source compiles for every architecture of the build; kernels spill no registers, but for those named."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from cuda_model.build import CSRC

ARCHITECTURES = ["80", "90a", "100", "120"]  # as in CMakeLists.txt
# What decides a few rows in float64 after the screen; and the screen where it is not tuned for.
MAY_SPILL = {
    "nearest_keys_full.cu": ARCHITECTURES,
    "nearest_keys_listed.cu": ARCHITECTURES,
    "nearest_keys_screen.cu": ["120"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (CUDA 12.8 or later)"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(path.name for path in (CSRC / "cuda").glob("*.cu")))
def test_compiles(source: str, architecture: str) -> None:
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command = ["nvcc", "-std=c++20", f"-I{CSRC}", *target, "-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
    path = CSRC / "cuda" / source
    result = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    report = result.stdout + result.stderr
    spills = re.findall(r"(\d+) bytes spill stores", report)
    assert spills, "ptxas reports no kernel"
    assert set(spills) == {"0"} or architecture in MAY_SPILL.get(source, []), report[-4000:]


def test_the_architectures_are_those_of_the_build() -> None:
    build = (CSRC.parent / "CMakeLists.txt").read_text()
    (names,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", build)
    assert [name.removesuffix("-real") for name in names.split()] == ARCHITECTURES
