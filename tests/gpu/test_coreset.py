"""Coresets of features on a GPU."""

from __future__ import annotations

import torch
from where import DEVICE, each_backend, sized

from memad_fast.memory import greedy_coreset


@each_backend("nearest_keys", "prepare_keys")
def test_the_choice_is_that_of_a_cpu(backend: str) -> None:
    """Integers: many exact ties, and sums without rounding."""
    features = torch.randint(-50, 50, (sized(5000, 600), 16)).float()
    chosen = greedy_coreset(features.to(DEVICE), sized(600, 60), start=7)
    assert chosen.device.type == DEVICE
    assert torch.equal(chosen.cpu(), greedy_coreset(features, len(chosen), start=7))


@each_backend("nearest_keys", "prepare_keys")
def test_rows_that_are_all_equal_come_in_order(backend: str) -> None:
    assert greedy_coreset(torch.ones(300, 4, device=DEVICE), 300).tolist() == list(range(300))
