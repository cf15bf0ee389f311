"""What is shipped: stable symbols, wide instructions in their kernels only, a wheel that installs, a whole sdist."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import memad_fast

ROOT = Path(__file__).parents[1]
PACKAGE = Path(memad_fast.__file__).parent

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@needs_nm
@pytest.mark.parametrize("library", sorted(path.name for path in PACKAGE.glob("_C_*.so")))
def test_torch_libraries_use_stable_symbols_only(library: str) -> None:
    symbols = run("nm", "-DC", "--undefined-only", PACKAGE / library)
    names = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
    from_torch = [name for name in names if re.search(r"\b(c10|at|torch)::|THPVariable|_ZN[23](at|c10)", name)]
    assert from_torch == []
    shims = [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
    assert shims  # it does use the stable C interface


@needs_source
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("torch_has_cuda", [True, False])
def test_what_only_a_torch_for_cuda_has_is_linked(tmp_path: Path, torch_has_cuda: bool) -> None:
    """Its streams are in a library of its own, without which _C_cuda builds and cannot be loaded."""
    pybind11 = pytest.importorskip("pybind11")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=tools)
    assert cmake
    libraries = ["torch_cpu", "torch_cuda"] if torch_has_cuda else ["torch_cpu"]
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    for library in libraries:
        (tmp_path / "torch" / "lib" / f"lib{library}.so").touch()
    build = tmp_path / "build"
    run(
        cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DMEMAD_FAST_TORCH_DIR={tmp_path / 'torch'}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
        "-DMEMAD_FAST_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80", PATH=tools,
    )  # fmt: skip
    rules = (build / "build.ninja").read_text()
    linked = rules[rules.index("build _C_cuda.so: CXX_") :].split("\n\n")[0]
    (named,) = re.findall(r"LINK_LIBRARIES = (.*)", linked)
    assert re.findall(r"(?:-l|/lib)(torch_\w+)", named) == libraries
    assert ("--no-undefined" in linked) == torch_has_cuda


@needs_nm
def test_wide_instructions_stay_in_their_kernels() -> None:
    """A kernel object defines its own namespace's symbols and nothing the linker could give to other code."""
    archives = sorted((ROOT / "build").glob("**/CMakeFiles/kernels_*.dir"))
    if not archives:
        pytest.skip("needs the build folder of this source tree")
    for folder in archives:
        level = folder.name.removeprefix("kernels_").removesuffix(".dir")
        for item in folder.rglob("*.o"):
            for line in run("nm", "-C", "--defined-only", item).splitlines():
                kind, name = line.split(maxsplit=2)[1:]
                if kind in "TWVu" and not name.startswith("DW.ref."):
                    assert f"memad_fast::{level}::" in name, (item.name, line)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about the instruction sets of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_each_instruction_set_stays_in_its_namespace() -> None:
    """In the library as it is shipped, only the levels that have an instruction hold it, and the dot kernels do."""
    levels = {
        "tdpbssd": {"amx"},
        "ldtilecfg": {"amx"},
        "vpdpbusd": {"avx2_vnni", "avx512_vnni"},
        "%zmm": {"avx512", "avx512_vnni", "amx"},
        "%ymm": {"avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx"},
    }
    found: dict[str, set[str]] = {instruction: set() for instruction in levels}
    mangled = {level: re.compile(rf"(?<!\d){len(level)}{level}(?=\d)") for level in levels["%ymm"]}
    function = ""
    for line in run("objdump", "-d", "--no-show-raw-insn", PACKAGE / "libmemad_fast_cpu.so").splitlines():
        if line.endswith(">:"):
            function = line
        for instruction, holders in found.items():
            if instruction in line:
                holders.update([level for level, name in mangled.items() if name.search(function)] or [function])
    strays = {instruction: holders - levels[instruction] for instruction, holders in found.items()}
    assert not any(strays.values()), strays
    for instruction in ("tdpbssd", "vpdpbusd"):
        assert found[instruction] == levels[instruction]


@needs_source
@pytest.mark.slow
def test_wheel_installs_into_a_fresh_environment(tmp_path: Path) -> None:
    """Built as this tree is, whose objects then serve again."""
    wheels = tmp_path / "wheels"
    with_cuda = (PACKAGE / "_C_cuda.so").exists() and shutil.which("nvcc") is not None
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT,
        MEMAD_FAST_BUILD_CUDA=str(int(with_cuda)))  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("memad_fast/_C_cpu.so", "memad_fast/libmemad_fast_cpu.so", "memad_fast/py.typed"):
        assert expected in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    # torch and numpy come from this environment; nothing else of it is visible to the smoke test.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    smoke = (
        "import torch, memad_fast, pathlib, sys\n"
        f"assert pathlib.Path(memad_fast.__file__).is_relative_to({str(site)!r}), memad_fast.__file__\n"
        "assert memad_fast.backends()['cpu'].available, memad_fast.backends()['cpu']\n"
        "keys = torch.randn(50, 8)\n"
        "distances, indices = memad_fast.nearest_keys(keys[7:9], keys)\n"
        "assert indices.flatten().tolist() == [7, 8] and distances.sum() == 0\n"
        "from memad_fast import native\n"
        "print(native.isa())\n"
    )
    assert run(python, "-c", smoke, cwd=tmp_path).strip()


@needs_source
@pytest.mark.slow
def test_sdist_contains_every_source(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        packed = {name.split("/", 1)[1] for name in content.getnames() if "/" in name}
    wanted = [
        str(path.relative_to(ROOT))
        for folder in ("csrc", "memad_fast", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".typed", ".pyi"}
    ]
    wanted += ["CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile"]
    assert [name for name in wanted if name not in packed] == []


def test_the_build_says_what_it_needs(tmp_path: Path) -> None:
    """Asking for CUDA without nvcc is an error that names nvcc, not a build without CUDA."""
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"],
        cwd=ROOT,
        env={**os.environ, "MEMAD_FAST_BUILD_CUDA": "1", "CUDACXX": "", "PATH": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "MEMAD_FAST_BUILD_CUDA=1 needs nvcc" in result.stderr
