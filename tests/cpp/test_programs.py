"""The C++ interface, by small programs: on this processor, on emulated ones, and AMX on a model of its instructions.

Each program checks every instruction set that the processor can run and prints their names.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import memad_fast

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PACKAGE = Path(memad_fast.__file__).parent
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", f"-I{CSRC}", f"-I{HERE}"]
PROGRAMS = ["test_dot_kernels", "test_nearest_keys"]


def needs(tool: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool} (Debian: {package})")


needs_compiler = needs("g++", "g++")
needs_cross_compiler = needs("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="about the instruction sets of x86-64")


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def isas() -> list[str]:
    native = pytest.importorskip("memad_fast.native", reason="no compiled library")
    return native.isas()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Linked with the library as it is shipped."""
    isas()
    folder = tmp_path_factory.mktemp("programs")
    library = [f"-L{PACKAGE}", "-lmemad_fast_cpu", f"-Wl,-rpath,{PACKAGE}"]
    for name in PROGRAMS:
        run("g++", *FLAGS, HERE / f"{name}.cpp", "-o", folder / name, *library)
    return {name: folder / name for name in PROGRAMS}


@pytest.fixture(scope="module")
def aarch64_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Linked with the whole library, compiled for aarch64."""
    folder = tmp_path_factory.mktemp("aarch64")
    compiler = "aarch64-linux-gnu-g++"

    def compile_source(source: Path) -> Path:
        level = ["-DMEMAD_FAST_ISA=portable", "-DMEMAD_FAST_ISA_LEVEL=0"] if source.stem.endswith("_kernel") else []
        if source.stem.endswith("_neon_dotprod"):
            level = ["-march=armv8.2-a+dotprod"]
        run(compiler, *FLAGS, *level, "-c", source, "-o", folder / f"{source.stem}.o")
        return folder / f"{source.stem}.o"

    for_x86 = {"nearest_keys_dot_avx", "nearest_keys_dot_amx"}
    sources = [path for name in ("core", "cpu") for path in sorted((CSRC / name).glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, (path for path in sources if path.stem not in for_x86)))
    for name in PROGRAMS:
        run(compiler, *FLAGS, HERE / f"{name}.cpp", *objects, "-static", "-o", folder / name)
    return {name: folder / name for name in PROGRAMS}


@needs_compiler
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_instruction_set_of_this_processor(name: str, programs: dict[str, Path]) -> None:
    assert run(programs[name]).split() == isas()


@needs_x86
@needs_compiler
@needs("qemu-x86_64-static", "qemu-user-static")
@pytest.mark.parametrize(
    ("name", "processor", "expected"),
    [("test_nearest_keys", "Nehalem", ["portable"]), ("test_dot_kernels", "Haswell", ["portable", "avx2"])],
)
def test_older_processors(name: str, processor: str, expected: list[str], programs: dict[str, Path]) -> None:
    """What they lack is neither detected nor executed."""
    assert run("qemu-x86_64-static", "-cpu", processor, programs[name]).split() == expected


@needs_x86
@needs_compiler
def test_amx_on_a_model_of_its_instructions(tmp_path: Path) -> None:
    sources = [HERE / "test_dot_amx.cpp", CSRC / "cpu" / "nearest_keys_dot_amx.cpp"]
    run("g++", *FLAGS, "-include", HERE / "amx_model.h", *sources, "-o", tmp_path / "amx")
    assert run(tmp_path / "amx").split() == ["amx"]


@needs_cross_compiler
def test_every_source_compiles_for_aarch64(aarch64_programs: dict[str, Path]) -> None:
    for program in aarch64_programs.values():
        assert program.exists()


@needs_cross_compiler
@needs("qemu-aarch64-static", "qemu-user-static")
@pytest.mark.parametrize(
    ("name", "processor", "expected"),
    [
        ("test_dot_kernels", "max", ["portable", "neon_dotprod"]),
        ("test_nearest_keys", "max", ["portable", "neon_dotprod"]),
        ("test_dot_kernels", "cortex-a53", ["portable"]),  # without dot products
    ],
)
def test_aarch64(name: str, processor: str, expected: list[str], aarch64_programs: dict[str, Path]) -> None:
    assert run("qemu-aarch64-static", "-cpu", processor, aarch64_programs[name]).split() == expected


@needs_x86
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_detection_agrees_with_the_operating_system() -> None:
    (flags, *_) = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(flags.split(":")[1].split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed = {
        "portable": set(),
        "avx2": avx2,
        "avx2_vnni": avx2 | {"avx_vnni"},
        "avx512": avx512,
        "avx512_vnni": avx512 | {"avx512_vnni"},
        "amx": avx512 | {"avx512_vnni", "amx_tile", "amx_int8"},
    }
    expected = [isa for isa, names in needed.items() if names <= flags]
    # A sandbox may refuse to grant the tiles.
    assert isas() in (expected, [isa for isa in expected if isa != "amx"])
