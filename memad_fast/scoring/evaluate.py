"""How well a run tells normal from abnormal: AUROC of images and pixels, AUPRO, F1, in all and per defect type.

All figures but one are those of a user, who has no labelled anomalies to choose a threshold by; ``best_f1`` is there to
compare with papers that do.

Pixels are not kept: their scores are counted in bins as they come, so the memory needed does not grow with the number
of images. A bin is what one sign, eight exponent and eleven mantissa bits of a float32 tell apart, that is scores
within 1/2048 of each other; those count as equal.

AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 4.2: the mean over all defect regions
of the share that is found, integrated over the false positive rate up to 0.3.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memad_fast._atomic import write_json
from memad_fast.data import Batch, Dataset
from memad_fast.scoring.run import Run

AUPRO_LIMIT = 0.3
_BITS = 20


def evaluate(run: Run, data: Dataset, *, batch_size: int = 32) -> dict[str, Any]:
    """Score the test images and compare with their labels and masks.

    Pixel figures compare the anomaly map with the mask, both in the model's size. Normal images count as without a
    defect; abnormal images without a mask are left out of them.

    Args:
        run: what ``load_run`` or ``fit`` gives.
        data: labelled test images in the model's size and channels.
        batch_size: images scored at once. The scores do not depend on it.

    Returns:
        A dict that is JSON as it stands; a figure that is not defined (no normal image, no mask) is None:

        - ``image_auroc``, ``pixel_auroc``, ``pixel_aupro`` (false positive rates up to 0.3)
        - at ``threshold``: ``precision``, ``recall``, ``f1`` (abnormal is positive), ``false_alarms`` (share of the
          normal images above it)
        - ``best_f1``: the highest F1 of any threshold, chosen with the test labels, as some papers do: no threshold
          that is found without them can promise it
        - ``counts``: {"images", "normal", "abnormal", "masks"}
        - ``per_defect``: {type: {"images", "detected" (share above the threshold), "image_auroc", "pixel_auroc",
          "pixel_aupro"}}, each type against all normal images.

    Raises:
        DataError: no test images. ImageError: one cannot be read; it is named.
        ValueError: data and model differ in size or channels, or a score is NaN or infinite; the image is named.
    """
    images = data.test
    if (images.channels, images.image_size) != (run.channels, run.image_size):
        raise ValueError(
            f"data: the run takes {run.channels} channels at {run.image_size} pixels, the data gives {images.channels}"
            f" at {images.image_size}"
        )
    labels, types = images.labels.numpy(), np.array(images.defects)
    defects = sorted({defect for defect, label in zip(images.defects, labels, strict=True) if label})
    scores = np.empty(len(images))
    pixels: defaultdict[str, PixelCounts] = defaultdict(PixelCounts)
    has_masks = data.has_masks
    done = 0
    for batch in images.batches(batch_size):
        result = run.model.score(batch.images.to(run.device))
        of_batch = scores[done : done + len(batch.names)]
        of_batch[:] = result.image_score.double().cpu().numpy()
        _check_finite(of_batch, result.anomaly_map, batch.names)
        if has_masks:
            _count(pixels, result.anomaly_map.float().cpu().numpy()[:, 0], batch)
        done += len(batch.names)
    masked = sum(images.has_mask(index) for index in range(len(images)) if labels[index])
    found = scores > run.threshold
    normal = PixelCounts.total([counts for name, counts in pixels.items() if name not in defects])
    return {
        "image_auroc": auroc(labels, scores),
        **_pixel_figures(PixelCounts.total(list(pixels.values()))),
        "threshold": run.threshold,
        **_at_threshold(labels == 1, found),
        "best_f1": best_f1(labels == 1, scores),
        "counts": {
            "images": len(images),
            "normal": int((labels == 0).sum()),
            "abnormal": int((labels == 1).sum()),
            "masks": masked,
        },
        "per_defect": {
            defect: {
                "images": int((of_type := (labels == 1) & (types == defect)).sum()),
                "detected": float(found[of_type].mean()),
                "image_auroc": auroc(labels[of_type | (labels == 0)], scores[of_type | (labels == 0)]),
                **_pixel_figures(PixelCounts.total([normal, pixels[defect]]) if defect in pixels else PixelCounts()),
            }
            for defect in defects
        },
    }


def save_metrics(metrics: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``metrics`` as JSON, whole or not at all; the folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; ties count half. None unless both labels occur."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < 2:
        return None
    return float(roc_auc_score(labels, scores))


def best_f1(abnormal: np.ndarray, scores: np.ndarray) -> float | None:
    """The highest F1 of any threshold; ``abnormal`` bool. None unless an image is abnormal."""
    if not abnormal.any():
        return None
    # As many thresholds as there are scores: what is found is all that is at least as high as one of them.
    found = len(scores) - np.searchsorted(np.sort(scores), scores, side="left")
    hits = abnormal.sum() - np.searchsorted(np.sort(scores[abnormal]), scores, side="left")
    return float((2 * hits / (found + abnormal.sum())).max())


class PixelCounts:
    """Pixel scores in bins of ascending score: how many are normal, how many defective, and how much of the defect
    regions lies there (each region weighs 1, whatever its size).
    """

    def __init__(self) -> None:
        self.normal = np.zeros(1 << _BITS, dtype=np.int64)
        self.defective = np.zeros(1 << _BITS, dtype=np.int64)
        self.region_share = np.zeros(1 << _BITS, dtype=np.float64)
        self.regions = 0

    @classmethod
    def total(cls, parts: Sequence[PixelCounts]) -> PixelCounts:
        """The sum of disjoint sets of pixels."""
        result = cls()
        for part in parts:
            result.normal += part.normal
            result.defective += part.defective
            result.region_share += part.region_share
            result.regions += part.regions
        return result

    def add(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Count one image and its regions: ``anomaly_map`` ``[H, W]`` float32, ``mask`` ``[H, W]`` bool."""
        from scipy.ndimage import label

        bins = self.add_pixels(anomaly_map, mask)
        if not mask.any():
            return
        regions, count = label(mask, structure=np.ones((3, 3)))  # diagonal neighbours are one region
        weight = 1.0 / np.bincount(regions.ravel())
        np.add.at(self.region_share, bins[mask], weight[regions[mask]])
        self.regions += count

    def add_pixels(self, scores: np.ndarray, defective: np.ndarray) -> np.ndarray:
        """Count pixels of any shape, which are in no region: their scores (float32), and whether each is defective.

        Returns the bins of the scores.
        """
        bins = bin_of(scores)
        np.add.at(self.normal, bins[~defective], 1)
        np.add.at(self.defective, bins[defective], 1)
        return bins

    def auroc(self) -> float | None:
        """Area under the pixels' ROC curve; pixels of one bin count as ties."""
        pairs = float(self.normal.sum()) * float(self.defective.sum())
        if not pairs:
            return None
        normal_below = np.cumsum(self.normal) - self.normal
        return float((self.defective * (normal_below + 0.5 * self.normal)).sum() / pairs)

    def aupro(self, limit: float = AUPRO_LIMIT) -> float | None:
        """Area under per-region overlap against false positive rate, up to ``limit`` and divided by it."""
        from sklearn.metrics import auc

        if not self.regions or not self.normal.any():
            return None
        # From the highest threshold, where nothing is found, downward; one point a bin.
        rate = np.concatenate([[0.0], np.cumsum(self.normal[::-1]) / self.normal.sum()])
        overlap = np.concatenate([[0.0], np.cumsum(self.region_share[::-1]) / self.regions])
        last = int(np.searchsorted(rate, limit, side="right"))
        at_limit = np.interp(limit, rate, overlap)
        return float(auc(np.append(rate[:last], limit), np.append(overlap[:last], at_limit)) / limit)


def bin_of(scores: np.ndarray) -> np.ndarray:
    """The bin of each float32 score: the leading bits of an integer that ascends as the floats do."""
    bits = (np.ascontiguousarray(scores, dtype=np.float32) + np.float32(0)).view(np.uint32)  # +0 turns -0 into 0
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ascending >> np.uint32(32 - _BITS)).astype(np.int64)


def _count(pixels: defaultdict[str, PixelCounts], maps: np.ndarray, batch: Batch) -> None:
    for anomaly_map, mask, defect in zip(maps, batch.masks, batch.defects, strict=True):
        if mask is not None:
            pixels[defect].add(anomaly_map, mask[0].numpy())


def _pixel_figures(counts: PixelCounts) -> dict[str, float | None]:
    return {"pixel_auroc": counts.auroc(), "pixel_aupro": counts.aupro()}


def _at_threshold(abnormal: np.ndarray, found: np.ndarray) -> dict[str, float | None]:
    hits = int((abnormal & found).sum())

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return {
        "precision": share(hits, int(found.sum())),
        "recall": share(hits, int(abnormal.sum())),
        "f1": share(2 * hits, int(found.sum() + abnormal.sum())),
        "false_alarms": share(int((found & ~abnormal).sum()), int((~abnormal).sum())),
    }


def _check_finite(scores: np.ndarray, maps: Tensor, names: Sequence[str]) -> None:
    finite = np.isfinite(scores) & torch.isfinite(maps).flatten(1).all(dim=1).cpu().numpy()
    if not finite.all():
        bad = [name for name, good in zip(names, finite, strict=True) if not good]
        raise ValueError(f"the model gives scores that are NaN or infinite for {', '.join(bad)}")
