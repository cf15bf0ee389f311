"""What the line engineer runs: fit, checkpoint, evaluate, score, report.

set_up ──> fit ──> RUN folder ──> evaluate ──> metrics.json
                      └─────────> score ─────> scores.csv, heat maps, report.html   (files)
                      └─────────> Scorer ────> results in your own program          (a stream of images)
                                  RayScorer    the same for very many files, on a Ray cluster
"""

from __future__ import annotations

from memad_fast.scoring.demo import run_demo
from memad_fast.scoring.evaluate import evaluate, save_metrics
from memad_fast.scoring.evaluate_semantic import evaluate_semantic
from memad_fast.scoring.fit import fit, fit_extractor
from memad_fast.scoring.perturb import write_perturbations
from memad_fast.scoring.ray_engine import RayScorer
from memad_fast.scoring.run import Run, RunError, TrainedRun, load_extractor, load_run, read_config, save_run
from memad_fast.scoring.score import ScoreSummary, score
from memad_fast.scoring.setup import (
    ExtractorSetup,
    Setup,
    open_labels,
    open_test_data,
    parse_options,
    parse_parts,
    set_up,
    set_up_edges,
    set_up_semantic,
)
from memad_fast.scoring.stream import Result, Scorer, Timing, find_images

__all__ = [
    "ExtractorSetup",
    "RayScorer",
    "Result",
    "Run",
    "RunError",
    "ScoreSummary",
    "Scorer",
    "Setup",
    "Timing",
    "TrainedRun",
    "evaluate",
    "evaluate_semantic",
    "find_images",
    "fit",
    "fit_extractor",
    "load_extractor",
    "load_run",
    "open_labels",
    "open_test_data",
    "parse_options",
    "parse_parts",
    "read_config",
    "run_demo",
    "save_metrics",
    "save_run",
    "score",
    "set_up",
    "set_up_edges",
    "set_up_semantic",
    "write_perturbations",
]
