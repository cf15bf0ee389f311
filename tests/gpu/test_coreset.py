"""Coresets of features on a GPU."""

from __future__ import annotations

import torch
from where import DEVICE, needs_gpu

from memad_fast.memory import greedy_coreset

pytestmark = needs_gpu


def test_the_choice_is_that_of_a_cpu() -> None:
    """Integers: many exact ties, and sums without rounding."""
    features = torch.randint(-50, 50, (5000, 16)).float()
    chosen = greedy_coreset(features.to(DEVICE), 600, start=7)
    assert chosen.device.type == torch.device(DEVICE).type
    assert torch.equal(chosen.cpu(), greedy_coreset(features, 600, start=7))


def test_rows_that_are_all_equal_come_in_order() -> None:
    assert greedy_coreset(torch.ones(300, 4, device=DEVICE), 300).tolist() == list(range(300))
