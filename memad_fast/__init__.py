"""Fast, exact memory-retrieval ops for PyTorch, and the memory-augmented anomaly detectors built on them.

Importing this package loads nothing heavy: torch comes with the first op that is asked for, and
``memad_fast.native`` (the CPU kernels for NumPy arrays) never needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Loaded on first access, so that a process without torch can
# import the package and use memad_fast.native.
_HOMES = {
    "BackendUnavailableError": "memad_fast._backend",
    "backends": "memad_fast._backend",
    "use_backend": "memad_fast._backend",
    "bank_attention": "memad_fast.ops",
    "bank_attention_stats": "memad_fast.ops",
    "fifo_write_": "memad_fast.ops",
    "gumbel_topk": "memad_fast.ops",
    "histogram_correction": "memad_fast.ops",
    "nearest_keys": "memad_fast.ops",
    "nearest_keys_stats": "memad_fast.ops",
    "prepare_keys": "memad_fast.ops",
    "PreparedKeys": "memad_fast.ops",
    "ssim_loss": "memad_fast.ops",
    "ssim_map": "memad_fast.ops",
    "stcm_lookup": "memad_fast.ops",
}
_SUBPACKAGES = ("data", "index", "memory", "models", "native", "ops", "scoring")

__all__ = [
    "BackendUnavailableError",
    "PreparedKeys",
    "__version__",
    "backends",
    "bank_attention",
    "bank_attention_stats",
    "data",
    "fifo_write_",
    "gumbel_topk",
    "histogram_correction",
    "index",
    "memory",
    "models",
    "native",
    "nearest_keys",
    "nearest_keys_stats",
    "ops",
    "prepare_keys",
    "scoring",
    "ssim_loss",
    "ssim_map",
    "stcm_lookup",
    "use_backend",
]

if TYPE_CHECKING:
    from memad_fast._backend import BackendUnavailableError, backends, use_backend
    from memad_fast.ops import (
        PreparedKeys,
        bank_attention,
        bank_attention_stats,
        fifo_write_,
        gumbel_topk,
        histogram_correction,
        nearest_keys,
        nearest_keys_stats,
        prepare_keys,
        ssim_loss,
        ssim_map,
        stcm_lookup,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"memad_fast.{name}")
    raise AttributeError(f"module 'memad_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
