"""How well a semantic extractor finds its classes: Dice coefficient and AUC of each, over all pixels of a labelled set.

    Dice = 2·|found ∩ true| / (|found| + |true|), found where the class has the largest value of all
    AUC  = area under the ROC curve of the class's map against "is it this class"

Both count the pixels of all images together, in the extractor's size, inside the field of view where there is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from memad_fast.data import LabelledImages
from memad_fast.models import SemanticExtractor
from memad_fast.scoring.evaluate import PixelCounts
from memad_fast.scoring.run import RunError, TrainedRun


def evaluate_semantic(run: TrainedRun, data: LabelledImages, *, batch_size: int = 8) -> dict[str, Any]:
    """Compare an extractor's classes with those of a labelled set.

    Args:
        run: of a semantic extractor, from ``load_extractor`` or ``fit_extractor``.
        data: in the extractor's size, channels and values, as ``open_labels`` opens it.
        batch_size: images at once. The classes do not depend on it.

    Returns:
        A dict that is JSON as it stands; a figure that is not defined (a class that does not occur) is None:

        - ``dice``, ``auc``: the means over all classes but the first, the background
        - ``per_class``: {value in the label maps: {"dice", "auc", "pixels" (that are of this class)}}
        - ``counts``: {"images", "pixels" (that count)}

    Raises:
        RunError: a run of another kind. ImageError: an image or a label map cannot be used; it is named.
        ValueError: data and run differ in size, channels or values, or a map is NaN; the image is named.
    """
    extractor = run.model
    if not isinstance(extractor, SemanticExtractor):
        raise RunError(f"{run.folder}: a run of {run.model_name}, expected one of {SemanticExtractor.name}")
    expected = (extractor.config.channels, extractor.config.image_size, extractor.config.values)
    if (got := (data.channels, data.image_size, data.values)) != expected:
        raise ValueError(f"data: the run takes (channels, size, values) {expected}, the data gives {got}")
    classes = extractor.config.classes
    curves = [PixelCounts() for _ in range(classes)]
    confusion = np.zeros((classes, classes), dtype=np.int64)  # true class, found class
    for items in data.batches(batch_size):
        with torch.inference_mode():
            maps = extractor.extract(torch.stack([item.image for item in items]).to(run.device)).float().cpu().numpy()
        for item, class_maps in zip(items, maps, strict=True):
            if not np.isfinite(class_maps).all():
                raise ValueError(f"the extractor gives maps that are NaN or infinite for {item.name}")
            counted = item.counted.numpy()
            true = item.labels.numpy()[counted]
            np.add.at(confusion, (true, class_maps.argmax(axis=0)[counted]), 1)
            for number, curve in enumerate(curves):
                curve.add_pixels(class_maps[number][counted], true == number)
    per_class = {
        str(value): {
            "dice": _dice(confusion, number),
            "auc": curves[number].auroc(),
            "pixels": int(confusion[number].sum()),
        }
        for number, value in enumerate(extractor.config.values)
    }
    foreground = list(per_class.values())[1:]
    return {
        "dice": _mean([row["dice"] for row in foreground]),
        "auc": _mean([row["auc"] for row in foreground]),
        "per_class": per_class,
        "counts": {"images": len(data), "pixels": int(confusion.sum())},
    }


def _dice(confusion: np.ndarray, number: int) -> float | None:
    true, found = int(confusion[number].sum()), int(confusion[:, number].sum())
    return 2 * int(confusion[number, number]) / (true + found) if true + found else None


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
