"""How well a run tells normal from abnormal: AUROC of images and pixels, AUPRO, F1, in all and per defect type."""

from __future__ import annotations

import os
from typing import Any

from memad_fast.data import Dataset
from memad_fast.scoring.run import Run


def evaluate(run: Run, data: Dataset, *, batch_size: int = 32) -> dict[str, Any]:
    """Score the test images and compare with their labels and masks.

    Returns:
        A dict that is JSON as it stands; a figure that is not defined (no normal image, no mask) is None:
        ``image_auroc``, ``pixel_auroc``, ``pixel_aupro``, ``threshold``, ``precision``, ``recall``, ``f1``,
        ``counts`` {"images", "normal", "abnormal", "masks"},
        ``per_defect`` {type: {"images", "detected" (share above the threshold), "image_auroc", "pixel_auroc",
        "pixel_aupro"}}.
    """
    raise NotImplementedError


def save_metrics(metrics: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``metrics`` as JSON, whole or not at all."""
    raise NotImplementedError
