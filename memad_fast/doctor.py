"""What this machine offers memad_fast and what it lacks, with the reason and the command that fixes it.

Everything here works without torch, without the compiled libraries and without the command line's packages: the
doctor is called where something is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import memad_fast

_BUILD = "pip install --no-build-isolation ."

# Import name -> (names of the distributions that bring it, what memad_fast uses it for, how to get it).
_APP = "pip install 'memad_fast[app]'"
_PACKAGES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "numpy": (("numpy",), "memad_fast.native, reading images", "pip install numpy"),
    "PIL": (("pillow",), "reading images, heat maps, the report", _APP),
    "safetensors": (("safetensors",), "run folders", _APP),
    "lightning": (("lightning",), "training (memad-fast fit)", _APP),
    "scipy": (("scipy",), "AUPRO (memad-fast evaluate)", _APP),
    "sklearn": (("scikit-learn",), "the built-in digits, AUROC (memad-fast evaluate)", _APP),
    "cv2": (
        ("opencv-python-headless", "opencv-python"),
        "Canny edges (fit-edges, fit --model memstc)",
        _APP,
    ),
    "typer": (("typer",), "the command line", _APP),
    "rich": (("rich",), "tables and progress bars of the command line", _APP),
    "ray": (("ray",), "scoring on a cluster (memad-fast score --engine ray)", "pip install 'memad_fast[ray]'"),
    "triton": (("triton",), "the triton backend (comes with torch for CUDA)", "pip install triton"),
    "faiss": (("faiss-cpu", "faiss-gpu"), "memories searched by FAISS (FaissIndex)", "pip install 'memad_fast[faiss]'"),
}

_VARIABLES = {
    "MEMAD_FAST_BACKEND": "forces a backend",
    "MEMAD_FAST_ISA": "forces an instruction set of the C++ kernels",
    "TRITON_INTERPRET": "1: Triton's interpreter runs its kernels on CPU tensors, for tests",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer: a thing, whether it is there, what is known of it, and how to get it."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> dict[str, list[Finding]]:
    """Everything the doctor knows, by section, in the order it is told.

    Example:
        >>> from memad_fast import doctor
        >>> list(doctor.examine())
        ['versions', 'devices', 'instruction sets', 'backends', 'packages', 'environment']
    """
    torch, torch_problem = _try_import("torch")
    native, native_problem = _try_import("memad_fast.native")
    return {
        "versions": list(_versions(torch, torch_problem, native_problem)),
        "devices": list(_devices(torch)),
        "instruction sets": list(_instruction_sets(native)),
        "backends": list(_backends(torch)),
        "packages": list(_packages()),
        "environment": list(_environment()),
    }


def as_text(sections: dict[str, list[Finding]]) -> str:
    """The findings as plain text, for a terminal without rich."""
    lines = []
    for title, findings in sections.items():
        lines.append(title)
        for finding in findings:
            mark = "ok " if finding.ok else "-- "
            lines.append(f"  {mark} {finding.name:<20} {finding.detail}")
            if finding.fix:
                lines.append(f"      {'':<20} fix: {finding.fix}")
        lines.append("")
    return "\n".join(lines)


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """A module, or None and why it could not be loaded: a broken installation raises more than ImportError."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _versions(torch: ModuleType | None, torch_problem: str, native_problem: str) -> Iterator[Finding]:
    home = Path(memad_fast.__file__).parent
    yield Finding("memad_fast", True, f"{memad_fast.__version__} in {home}")
    yield Finding("python", True, f"{platform.python_version()} in {sys.prefix}")
    yield Finding("system", True, platform.platform())
    if torch is None:
        yield Finding("torch", False, torch_problem, "pip install 'torch>=2.10'")
    else:
        yield Finding("torch", True, f"{torch.__version__} in {Path(str(torch.__file__)).parent}")
    yield Finding("memad_fast.native", not native_problem, native_problem or "the CPU kernels for NumPy arrays",
                  _BUILD if native_problem else "")  # fmt: skip


def _devices(torch: ModuleType | None) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = f", torch uses {torch.get_num_threads()} threads" if torch else ""
    yield Finding("cpu", True, f"{_cpu_name()}, {usable} cores for this process{threads}")
    if torch is None:
        yield Finding("cuda", False, "not known without torch", "pip install 'torch>=2.10'")
        return
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            yield Finding("cuda", False, "this torch is built for the CPU alone",
                          "install a CUDA build of torch, see https://pytorch.org/get-started/locally")  # fmt: skip
        else:
            yield Finding("cuda", False, "torch finds no usable GPU", "look at the driver: nvidia-smi")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield Finding(f"cuda:{index}", True, f"{device.name}, {memory:.0f} GiB, compute {device.major}.{device.minor}")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _instruction_sets(native: ModuleType | None) -> Iterator[Finding]:
    if native is None:
        yield Finding("C++ kernels", False, "not known without the compiled module memad_fast.native", _BUILD)
        return
    in_force = native.isa()
    for name in native.isas():
        yield Finding(name, True, "in force" if name == in_force else "can run here")


def _backends(torch: ModuleType | None) -> Iterator[Finding]:
    if torch is None:
        yield Finding("all", False, "the backends need torch; memad_fast.native serves NumPy arrays without it",
                      "pip install 'torch>=2.10'")  # fmt: skip
        return
    try:
        backends = memad_fast.backends()
        kernels_on_a_gpu = _kernels_on_a_gpu()
    except Exception as error:  # a wrong MEMAD_FAST_BACKEND, a library that breaks on loading
        yield Finding("all", False, _one_line(error), "unset MEMAD_FAST_BACKEND" if "BACKEND" in str(error) else _BUILD)
        return
    for backend in backends.values():
        detail = backend.reason or "available"
        if backend.available and (ops := kernels_on_a_gpu.get(backend.name)):
            detail += f"; kernels for {', '.join(ops)}"
        yield Finding(backend.name, backend.available, detail, backend.fix)


def _kernels_on_a_gpu() -> dict[str, list[str]]:
    """By backend: the public ops that it has a kernel for."""
    ops = importlib.import_module("memad_fast.ops")
    triton = importlib.import_module("memad_fast._triton")
    names = [name for name in ops.__all__ if name.islower()]
    return {
        "triton": [name for name in names if triton.has_triton_kernel(name)],
        "cuda": [name for name in names if triton.has_compiled_kernel(name)],
    }


def _packages() -> Iterator[Finding]:
    for name, (distributions, purpose, fix) in _PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            yield Finding(name, False, f"not installed; for {purpose}", fix)
        else:
            yield Finding(name, True, f"{_version_of(distributions)}; for {purpose}")


def _version_of(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def _environment() -> Iterator[Finding]:
    for name, meaning in _VARIABLES.items():
        value = os.environ.get(name)
        yield Finding(name, True, f"{value!r} {meaning}" if value else f"not set ({meaning})")
