"""The detectors: thin networks over ``memad_fast.memory`` and ``memad_fast.ops``; and parts of them that are trained on
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, Trainable, TrainingSettings
from memad_fast.models.extractors import (
    EdgeConfig,
    EdgeExtractor,
    SemanticConfig,
    SemanticExtractor,
    UNet,
    canny_edges,
)
from memad_fast.models.patchcore import PatchCore, PatchCoreConfig
from memad_fast.models.pmb import PMB, PMBConfig
from memad_fast.models.salad import SALAD, SALADConfig

MODELS: dict[str, type[AnomalyModel]] = {model.name: model for model in (PMB, PatchCore, SALAD)}
EXTRACTORS: dict[str, type[Trainable]] = {part.name: part for part in (EdgeExtractor, SemanticExtractor)}

__all__ = [
    "EXTRACTORS",
    "MODELS",
    "PMB",
    "SALAD",
    "AnomalyModel",
    "EdgeConfig",
    "EdgeExtractor",
    "Objective",
    "PMBConfig",
    "PatchCore",
    "PatchCoreConfig",
    "Preset",
    "SALADConfig",
    "Scores",
    "SemanticConfig",
    "SemanticExtractor",
    "Stage",
    "Trainable",
    "TrainingSettings",
    "UNet",
    "build",
    "canny_edges",
]


def build(name: str, config: Mapping[str, Any]) -> AnomalyModel:
    """An untrained detector from its name and its config as read from JSON.

    Raises:
        ValueError: no detector bears the name, or the config does not fit it.

    Example:
        >>> from dataclasses import asdict
        >>> from memad_fast import models
        >>> config = asdict(models.PMB.presets()["digits"].config)
        >>> models.build("pmb", config).config.image_size
        32
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    try:
        return model(model.Config(**config))
    except TypeError as error:
        raise ValueError(f"config: does not fit {name}: {error}") from error
