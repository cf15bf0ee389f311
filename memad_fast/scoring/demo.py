"""The whole way in a minute, on real images: handwritten digits, of which one is normal and all others are defects."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from memad_fast.data import Dataset
from memad_fast.scoring.evaluate import evaluate, save_metrics
from memad_fast.scoring.fit import fit
from memad_fast.scoring.run import Run
from memad_fast.scoring.score import ScoreSummary, score
from memad_fast.scoring.setup import set_up

NORMAL_DIGIT = 0
_OF_EACH_OTHER_DIGIT = 6


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: the run, its figures, and what the scoring of files came to."""

    run: Run
    metrics: dict[str, Any]
    scores: ScoreSummary
    seconds: float


def run_demo(out: str | os.PathLike[str] = "runs/demo", *, seed: int = 0, quiet: bool = False) -> DemoResult:
    """Fit PMB on scikit-learn's digits, evaluate it, and score the test digits as image files.

    ``out`` becomes a run folder with ``metrics.json``, over all test digits. Into it go ``images/`` (the normal test
    digits and a few of each other one, as PNG files) and ``scores/`` (scores.csv, heat maps, report.html).

    Example::

        result = run_demo("runs/demo")
        print(result.metrics["image_auroc"], result.scores.report)
    """
    threads = torch.get_num_threads()
    # A 32-pixel network is too small to share: on a busy machine, threads that wait for each other take minutes.
    torch.set_num_threads(1)
    try:
        return _run_demo(Path(out), seed, quiet)
    finally:
        torch.set_num_threads(threads)


def _run_demo(folder: Path, seed: int, quiet: bool) -> DemoResult:
    started = time.perf_counter()
    setup = set_up("pmb", "digits", normal_class=NORMAL_DIGIT, seed=seed)
    run = fit(setup.model, setup.data, folder, settings=setup.settings, seed=seed, resume=False, quiet=quiet)
    metrics = evaluate(run, setup.data)
    save_metrics(metrics, folder / "metrics.json")
    images = folder / "images"
    _write_images(setup.data, images)
    scores = score(run, images, folder / "scores", heatmaps=True, report=True)
    return DemoResult(run, metrics, scores, time.perf_counter() - started)


def _write_images(data: Dataset, folder: Path) -> None:
    """Test images as the model sees them, as files: every normal one and a few of each other digit, so that the report
    shows both kinds. ``good/0007.png``, ``3/0008.png``.
    """
    images = data.test
    written: Counter[str] = Counter()
    for index, entry in enumerate(images.entries):
        if entry.label and written[entry.defect] == _OF_EACH_OTHER_DIGIT:
            continue
        written[entry.defect] += 1
        path = folder / entry.defect / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (images.image(index)[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(path)
