"""Drives CMake + Ninja. Everything declarative is in pyproject.toml.

Environment (see README, "Environment variables"):
    MEMAD_FAST_BUILD_CUDA   1: build _C_cuda too (an error if nvcc is missing); default 0
    TORCH_CUDA_ARCH_LIST    architectures for _C_cuda, as torch reads it ("9.0a;10.0")
    MEMAD_FAST_NO_NATIVE    1: install without any compiled part (reference backend only)
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_dir() -> Path | None:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def tool(name: str) -> str:
    """A build tool from this environment's scripts, else from PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"memad_fast needs {name} to build; pip install {name}")
    return found


def cuda_arguments() -> list[str]:
    if os.environ.get("MEMAD_FAST_BUILD_CUDA", "0") != "1":
        return []
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("MEMAD_FAST_BUILD_CUDA=1 needs nvcc; put it on PATH or set CUDACXX")
    arguments = ["-DMEMAD_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if architectures := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        names = architectures.replace(" ", ";").replace(".", "").replace("+PTX", "").split(";")
        arguments.append("-DCMAKE_CUDA_ARCHITECTURES=" + ";".join(name for name in names if name))
    return arguments


def link_kernels(link: Path) -> None:
    """For a checkout that is used where it lies: an installation has memad_fast.kernels inside memad_fast."""
    if not link.is_symlink():
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)


class CMakeBuild(build_ext):
    """Builds all extensions in one CMake project and installs them into the package folder."""

    def run(self) -> None:
        import pybind11

        package = Path(self.get_ext_fullpath("memad_fast._native")).resolve().parent
        # Not build_temp, which pip throws away: the next build compiles only what has changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # its options are those of the last build
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            *cuda_arguments(),
        ]  # fmt: skip
        if (torch := torch_dir()) is not None:
            configure.append(f"-DMEMAD_FAST_TORCH_DIR={torch}")
        else:
            print("torch is not installed: building memad_fast.native only, without _C_cpu", file=sys.stderr)
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True)
        subprocess.run([tool("cmake"), "--install", str(build)], check=True)
        if package == ROOT / "memad_fast":
            link_kernels(package / "kernels")


native = [] if os.environ.get("MEMAD_FAST_NO_NATIVE", "0") == "1" else [Extension("memad_fast._native", sources=[])]
setup(
    packages=sorted({*find_packages(include=["memad_fast*"]), "memad_fast.kernels"}),
    package_dir={"memad_fast.kernels": "kernels"},
    ext_modules=native,
    cmdclass={"build_ext": CMakeBuild},
)
