"""What the line engineer runs: fit, checkpoint, score, evaluate, report."""

from __future__ import annotations

from memad_fast.scoring.evaluate import evaluate, save_metrics
from memad_fast.scoring.fit import fit
from memad_fast.scoring.run import Run, RunError, load_run, read_config, save_run

__all__ = ["Run", "RunError", "evaluate", "fit", "load_run", "read_config", "save_metrics", "save_run"]
