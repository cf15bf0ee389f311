"""Triton kernels, one file per op: what serves CUDA and ROCm tensors where no C++ was compiled for them.

Each file defines plain functions with the names and the arguments of the op schemas it serves (memad_fast/ops), and the
kernels that they launch. Importing this package loads none of them: ``function`` does, at an op's first call.

Rules for all of them: block sizes, the row length and flags are the only compile-time constants, so a new batch size
compiles nothing; configurations come from a small table (``architecture.py``), never from autotuning; every product
names its ``input_precision``; offsets are int64; nothing waits for the device, so every call can be captured in a CUDA
graph; sums have one order, so repeated calls give the same bits.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

# Op -> the file that defines it, for the ops that are served.
FILES: dict[str, str] = {
    "bank_attention": "bank_attention",
    "bank_attention_stats": "bank_attention",
    "bank_attention_backward": "bank_attention_backward",
    "fifo_write_": "fifo_write_",
    "gumbel_topk": "gumbel_topk",
    "gumbel_topk_backward": "gumbel_topk_backward",
    "histogram_correction": "histogram_correction",
    "histogram_correction_backward": "histogram_correction",
    "nearest_keys": "nearest_keys",
    "nearest_keys_stats": "nearest_keys",
    "nearest_keys_backward_keys": "nearest_keys_backward",
    "nearest_keys_backward_query": "nearest_keys_backward",
    "prepare_keys": "prepare_keys",
    "prepare_keys_rows_": "prepare_keys",
    "ssim_loss": "ssim",
    "ssim_loss_backward": "ssim",
    "ssim_map": "ssim",
    "ssim_map_backward": "ssim",
    "stcm_lookup": "stcm_lookup",
    "stcm_lookup_backward_values": "stcm_lookup",
}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: slowly, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def function(op: str) -> Callable[..., Any]:
    """The function that serves ``op``; loads triton."""
    return getattr(importlib.import_module(f"{__name__}.{FILES[op]}"), op)
