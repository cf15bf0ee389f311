"""Checks of plain arguments that the torch ops and the NumPy functions share. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

METRICS = ("l2", "cosine", "ip")
COMBINES = ("sum", "mean", "softmax", "renormalized", "straight_through")
SHRINKS = ("soft", "hard", "none")
SIMILARITIES = ("cosine", "dot")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_fraction(fraction: float) -> None:
    """The share of ``histogram_correction`` is one."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")


def check_attention_options(threshold: float, shrink: str, similarity: str, temperature: float) -> None:
    """The options of ``bank_attention`` and ``bank_attention_stats`` are known and in range."""
    check_choice("shrink", shrink, SHRINKS)
    check_choice("similarity", similarity, SIMILARITIES)
    if not 0.0 <= threshold < math.inf:
        raise ValueError(f"threshold: expected a finite value of at least 0, got {threshold}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite value above 0, got {temperature}")


def check_noise_options(temperature: float, combine: str) -> None:
    """The options of ``gumbel_topk`` are known and in range."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive, finite number, got {temperature}")
    check_choice("combine", combine, COMBINES)


def check_seed(seed: int) -> None:
    """``seed`` fits into 64 bits."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected -2**63 to 2**63 - 1, got {seed}")


def check_ssim_window(shape: Sequence[int], window_size: int, sigma: float, data_range: float, padding: str) -> None:
    """The window of ``ssim_loss`` and ``ssim_map`` is one, and fits images of ``shape`` ``[B, C, H, W]``."""
    check_choice("padding", padding, ("valid", "same"))
    if not isinstance(window_size, int) or window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size: expected an odd number of at least 1, got {window_size}")
    if not sigma > 0:
        raise ValueError(f"sigma: expected > 0, got {sigma}")
    if not 0 < data_range < math.inf:
        raise ValueError(f"data_range: expected > 0 and finite, got {data_range}")
    least = window_size if padding == "valid" else window_size // 2 + 1
    if min(shape[2:]) < least:
        raise ValueError(
            f"window_size: {window_size} with padding {padding!r} expects images of at least {least} × {least} pixels, "
            f"got x of shape {tuple(shape)}"
        )
