"""Backends: the device picks, use_backend overrides, and what is missing is an error that says how to get it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import memad_fast
import memad_fast.kernels
from memad_fast import _backend


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_reference_is_always_there() -> None:
    assert memad_fast.backends()["reference"].available
    assert set(memad_fast.backends()) == {"reference", "cpu", "triton", "cuda"}


def test_a_library_that_cannot_be_loaded_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C_cpu.so").write_bytes(b"torn")
    monkeypatch.setattr(_backend, "__file__", str(tmp_path / "_backend.py"))
    assert re.search(r"_C_cpu\.so could not be loaded: .*(too short|invalid|header)", _backend._load("_C_cpu"))


def test_every_missing_backend_names_its_cause_and_fix() -> None:
    for backend in memad_fast.backends().values():
        if backend.available:
            continue
        assert backend.reason
        assert backend.fix
        with pytest.raises(memad_fast.BackendUnavailableError, match=backend.name):
            memad_fast.use_backend(backend.name)


def test_use_backend_is_undone_at_the_end_of_its_block() -> None:
    error = torch.rand(2, 8, dtype=torch.float32)
    with memad_fast.use_backend("reference"):
        assert _backend.serves_reference("histogram_correction", error)
        with memad_fast.use_backend(None):
            assert not _backend.serves_reference("histogram_correction", error)
        assert _backend.serves_reference("histogram_correction", error)
    assert not _backend.serves_reference("histogram_correction", error)


def test_use_backend_is_undone_after_an_exception() -> None:
    with pytest.raises(KeyError), memad_fast.use_backend("reference"):
        raise KeyError
    assert not _backend.serves_reference("histogram_correction", torch.rand(2))


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of reference, cpu, triton, cuda or None, got 'tpu'"):
        memad_fast.use_backend("tpu")


def test_float64_is_served_by_the_reference_and_refused_by_a_forced_cpu() -> None:
    error = torch.rand(2, 8, dtype=torch.float64)
    assert memad_fast.histogram_correction(error)[1].dtype == torch.float64
    with memad_fast.use_backend("cpu"), pytest.raises(TypeError, match=r"got float64"):
        memad_fast.histogram_correction(error)


def test_reference_and_compiled_graphs_agree() -> None:
    error = torch.rand(2, 8)
    expected = memad_fast.histogram_correction(error)
    with memad_fast.use_backend("reference"):
        compiled = torch.compile(memad_fast.histogram_correction, fullgraph=True)(error)
    for got, want in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_environment_chooses_the_backend() -> None:
    code = """
        import torch
        from memad_fast import _backend
        print(_backend.serves_reference("histogram_correction", torch.rand(2)))
    """
    assert run_python(code, MEMAD_FAST_BACKEND="reference").stdout.strip() == "True"
    refused = run_python(code, MEMAD_FAST_BACKEND="quantum")
    assert refused.returncode != 0
    assert "MEMAD_FAST_BACKEND: name: expected one of" in refused.stderr


def test_environment_chooses_the_instruction_set() -> None:
    code = "from memad_fast import native; print(native.isa())"
    assert run_python(code, MEMAD_FAST_ISA="portable").stdout.strip() == "portable"
    refused = run_python(code, MEMAD_FAST_ISA="sse9")
    assert refused.returncode != 0
    assert "MEMAD_FAST_ISA: expected one of auto, portable" in refused.stderr


def test_the_instruction_set_is_one_setting_for_numpy_and_torch(isa: str) -> None:
    from memad_fast import native

    assert native.isa() == isa
    with pytest.raises(ValueError, match=r"isa: expected one of auto, portable"):
        native.set_isa("sse9")
    assert native.isa() == isa


def test_without_the_compiled_library_the_reference_works_and_the_error_says_what_to_do(tmp_path: object) -> None:
    code = f"""
        import shutil, sys
        from pathlib import Path
        source = Path({os.path.dirname(memad_fast.__file__)!r})
        target = Path({str(tmp_path)!r}) / "memad_fast"
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "kernels"))
        shutil.copytree({os.path.dirname(memad_fast.kernels.__file__)!r}, target / "kernels")
        sys.path.insert(0, str(target.parent))
        # An editable install would find the library beside its source all the same.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
        import torch, memad_fast
        assert Path(memad_fast.__file__).parent == target
        try:
            memad_fast.histogram_correction(torch.rand(1, 4))
        except memad_fast.BackendUnavailableError as error:
            print(error)
        with memad_fast.use_backend("reference"):
            print(memad_fast.histogram_correction(torch.ones(1, 4))[1].item())
        try:
            import memad_fast.native
        except ImportError as error:
            print(error)
    """
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    missing, reference, native = result.stdout.strip().splitlines()
    assert "backend 'cpu' is not available" in missing
    assert "pip install --no-build-isolation ." in missing
    assert reference == "1.0"
    assert "memad_fast.native needs its compiled module" in native


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a torch for CUDA on a machine without a GPU")
def test_the_interpreter_serves_cpu_tensors_where_a_torch_for_cuda_finds_no_gpu() -> None:
    pytest.importorskip("triton")
    code = """
        import torch
        torch.version.cuda = "13.0"
        import memad_fast
        with memad_fast.use_backend("triton"):
            print(memad_fast.nearest_keys(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]]))[1].item())
    """
    result = run_python(code, TRITON_INTERPRET="1", MEMAD_FAST_BACKEND="")
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr[-2000:]
