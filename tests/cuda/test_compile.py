"""Every CUDA source compiles for every architecture of the build; kernels spill no registers, but for those named.

Read off the objects of this tree's build, which are what is shipped; a source that it has not compiled as it is now, or
not for every architecture, is compiled here.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_model.build import CSRC

ARCHITECTURES = ["80", "90a", "100", "120"]  # as in CMakeLists.txt
SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))
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

Stacks = dict[str, dict[str, int]]  # architecture -> kernel -> bytes of local memory that a thread takes


def stacks_of(compiled: Path) -> Stacks:
    cuobjdump = shutil.which("cuobjdump") or pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    command = [cuobjdump, "-res-usage", str(compiled)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks: Stacks = {}
    for part in report.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\w+)", part)
        assert architecture, report
        kernels = re.findall(r"Function (\S+):\s*REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        stacks[architecture[1]] = {name: int(stack) + int(local) for name, stack, local in kernels}
    return stacks


@functools.cache
def built(source: str) -> Stacks:
    """By the build of this tree, where that is newer than every source; of no architecture where it is not."""
    changed = max(path.stat().st_mtime for folder in ("core", "cuda") for path in (CSRC / folder).iterdir())
    objects = (CSRC.parent / "build").glob(f"*/CMakeFiles/_C_cuda.dir/csrc/cuda/{source}.o")
    fresh = [path for path in objects if path.stat().st_mtime > changed]
    return stacks_of(fresh[0]) if fresh else {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles(tmp_path: Path, source: str, architecture: str) -> None:
    stacks = built(source)
    if architecture not in stacks:
        target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command = ["nvcc", "-std=c++20", f"-I{CSRC}", *target, "-fatbin", "-o", str(tmp_path / "compiled")]
        result = subprocess.run([*command, str(CSRC / "cuda" / source)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        stacks = stacks_of(tmp_path / "compiled")
    kernels = stacks[architecture]
    assert kernels, "no kernel was compiled"
    spilled = {name: stack for name, stack in kernels.items() if stack}
    assert not spilled or architecture in MAY_SPILL.get(source, [])


def test_a_spilled_register_shows(tmp_path: Path) -> None:
    """256 numbers that are all needed at the end, in 32 registers."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spilling(const float* in, float* out) {\n"
        "  float x[256];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 256; ++i) x[i] = in[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 256; ++i) out[i * 1024 + threadIdx.x] = x[255 - i];\n"
        "}\n"
        "__global__ void sound(float* out) { out[threadIdx.x] = 1; }\n"
    )
    compiled = tmp_path / "spilling.o"
    subprocess.run(["nvcc", "-arch=sm_90a", "-c", source, "-o", compiled], check=True)
    (kernels,) = stacks_of(compiled).values()
    assert {name: stack > 0 for name, stack in kernels.items()} == {"_Z8spillingPKfPf": True, "_Z5soundPf": False}


def test_the_architectures_are_those_of_the_build() -> None:
    build = (CSRC.parent / "CMakeLists.txt").read_text()
    (names,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", build)
    assert [name.removesuffix("-real") for name in names.split()] == ARCHITECTURES
