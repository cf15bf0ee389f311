"""What the line engineer runs: fit, checkpoint, score, evaluate, report."""
