"""Importing memad_fast is light, and memad_fast.native works where torch is not installed."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "triton", "faiss", "lightning", "sklearn", "matplotlib", "PIL", "typer", "rich", "numpy", "ray")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, memad_fast; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_the_ops_load_torch_and_numpy_alone() -> None:
    extra = [name for name in HEAVY if name not in ("torch", "numpy")]
    code = (
        "import sys, torch; before = set(sys.modules); import memad_fast; memad_fast.nearest_keys;"
        f"print([name for name in {extra!r} if name in set(sys.modules) - before])"
    )
    assert run_python(code) == "[]"


def test_native_works_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # any import of torch now fails
        "import numpy as np\nfrom memad_fast import native\n"
        "print(native.histogram_correction(np.array([[1, 1, 2, 5]], dtype=np.float32), 0.5)[2].tolist())"
    )
    assert run_python(code) == "[5.0]"


def test_every_public_name_exists_and_is_documented() -> None:
    import memad_fast

    for name in memad_fast.__all__:
        if name == "__version__":
            continue
        assert getattr(memad_fast, name).__doc__, name
