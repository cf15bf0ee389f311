"""Checks of plain arguments that the torch ops and the NumPy functions share. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence


def check_ssim_window(shape: Sequence[int], window_size: int, sigma: float, data_range: float, padding: str) -> None:
    """The window of ``ssim_loss`` and ``ssim_map`` is one, and fits images of ``shape`` ``[B, C, H, W]``."""
    if padding not in ("valid", "same"):
        raise ValueError(f"padding: expected one of valid, same, got {padding!r}")
    if not isinstance(window_size, int) or window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size: expected an odd number of at least 1, got {window_size}")
    if not sigma > 0:
        raise ValueError(f"sigma: expected > 0, got {sigma}")
    if not 0 < data_range < float("inf"):
        raise ValueError(f"data_range: expected > 0 and finite, got {data_range}")
    least = window_size if padding == "valid" else window_size // 2 + 1
    if min(shape[2:]) < least:
        raise ValueError(
            f"window_size: {window_size} with padding {padding!r} expects images of at least {least} × {least} pixels, "
            f"got x of shape {tuple(shape)}"
        )
