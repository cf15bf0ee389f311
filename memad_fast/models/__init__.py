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
from memad_fast.models.memstc import MemSTC, MemSTCConfig
from memad_fast.models.patchcore import PatchCore, PatchCoreConfig
from memad_fast.models.pmb import PMB, PMBConfig
from memad_fast.models.salad import SALAD, SALADConfig
from memad_fast.models.simsid import SimSID, SimSIDConfig

MODELS: dict[str, type[AnomalyModel]] = {model.name: model for model in (PMB, PatchCore, MemSTC, SALAD, SimSID)}
EXTRACTORS: dict[str, type[Trainable]] = {part.name: part for part in (EdgeExtractor, SemanticExtractor)}

__all__ = [
    "EXTRACTORS",
    "MODELS",
    "PMB",
    "SALAD",
    "AnomalyModel",
    "EdgeConfig",
    "EdgeExtractor",
    "MemSTC",
    "MemSTCConfig",
    "Objective",
    "PMBConfig",
    "PatchCore",
    "PatchCoreConfig",
    "Preset",
    "SALADConfig",
    "Scores",
    "SemanticConfig",
    "SemanticExtractor",
    "SimSID",
    "SimSIDConfig",
    "Stage",
    "Trainable",
    "TrainingSettings",
    "UNet",
    "build",
    "canny_edges",
]


def build(name: str, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]] | None = None) -> Trainable:
    """An untrained detector or extractor from its name and its config as read from JSON.

    Args:
        name: in ``MODELS`` or ``EXTRACTORS``.
        config: the fields of its ``Config``.
        parts: of every part that is given to a detector, by the part's name: {"name": …, "config": …}, as here.

    Raises:
        ValueError: nothing bears the name, or config or parts do not fit it.

    Example:
        >>> from dataclasses import asdict
        >>> from memad_fast import models
        >>> config = asdict(models.PMB.presets()["digits"].config)
        >>> models.build("pmb", config).config.image_size
        32
    """
    known: dict[str, type[Trainable]] = {**MODELS, **EXTRACTORS}
    if name not in known:
        raise ValueError(f"name: expected one of {', '.join(known)}, got {name!r}")
    given = {part: build(**description) for part, description in (parts or {}).items()}
    try:
        return known[name](known[name].Config(**config), **given)
    except TypeError as error:
        raise ValueError(f"config: does not fit {name}: {error}") from error
