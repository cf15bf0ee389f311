"""Training: normal images in, a run folder out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from memad_fast.data import Dataset
from memad_fast.models.base import AnomalyModel, TrainingSettings
from memad_fast.scoring.run import Run


def fit(
    model: AnomalyModel,
    data: Dataset,
    out: str | os.PathLike[str],
    *,
    settings: TrainingSettings,
    epochs: int | None = None,
    max_minutes: float | None = None,
    device: str = "auto",
    precision: str = "32-true",
    seed: int = 0,
    validation_fraction: float = 0.15,
    quantile: float = 0.99,
    resume: bool = True,
    quiet: bool = False,
    trainer_options: Mapping[str, Any] | None = None,
) -> Run:
    """Train ``model`` on the normal images of ``data``, set its threshold, write the run to ``out`` and open it.

    The weights' initial values are the model's; for a reproducible run seed before building it
    (``lightning.seed_everything(seed)`` or ``torch.manual_seed(seed)``).
    """
    raise NotImplementedError
