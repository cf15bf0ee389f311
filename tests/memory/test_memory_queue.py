"""MemoryQueue: each position's last features, first in first out, read by that position alone."""

from __future__ import annotations

import pytest
import torch
from devices import NothingWaits
from torch import Tensor

from memad_fast.memory import MemoryQueue


def test_the_newest_features_replace_the_oldest() -> None:
    queue, features = MemoryQueue(3, 2, slots=4, k=1), torch.randn(6, 3, 2)
    queue.write(features[:3])
    assert torch.equal(queue.memory[:3], features[:3])
    assert queue.memory[3].isnan().all()
    queue.write(features[3:])
    assert torch.equal(queue.memory, features[[4, 5, 2, 3]])
    assert int(queue.cursor) == 2


def test_of_more_images_than_slots_the_newest_stay() -> None:
    queue, features = MemoryQueue(2, 2, slots=3, k=1), torch.randn(8, 2, 2)
    queue.write(features)
    assert torch.equal(queue.memory.sort(dim=0).values, features[5:].sort(dim=0).values)


def _published(query: Tensor, slots: Tensor, threshold: int) -> Tensor:
    """SQUID's Gumbel shrinkage with an integer threshold: weights strictly above the threshold-th, L1-normalised."""
    weights = (query @ slots.T).softmax(dim=1)
    kept = weights * (weights > weights.topk(threshold, dim=1).values[:, -1:])
    return kept / kept.sum(dim=1, keepdim=True) @ slots


def test_a_read_is_the_published_one_position_by_position() -> None:
    queue, query = MemoryQueue(3, 4, slots=7, k=2), torch.randn(5, 3, 4)
    queue.write(torch.randn(7, 3, 4))
    expected = [_published(query[:, position], queue.memory[:, position], 3) for position in range(3)]
    torch.testing.assert_close(queue(query), torch.stack(expected, dim=1))


def test_a_query_gets_the_gradient_of_the_dense_read() -> None:
    queue, query = MemoryQueue(1, 4, slots=6, k=2), torch.randn(5, 1, 4, requires_grad=True)
    queue.write(torch.randn(6, 1, 4))
    (gradient,) = torch.autograd.grad(queue(query).square().sum(), query)
    rows, read = queue.memory[:, 0], queue(query).detach()
    dense = (query[:, 0] @ rows.T).softmax(dim=1) @ rows
    (expected,) = torch.autograd.grad((2 * read[:, 0] * dense).sum(), query)
    torch.testing.assert_close(gradient, expected)


def test_before_it_is_full_only_what_was_written_is_read() -> None:
    queue, features = MemoryQueue(2, 3, slots=10, k=4), torch.randn(1, 2, 3)
    queue.write(features)
    torch.testing.assert_close(queue(torch.randn(4, 2, 3)), features.expand(4, -1, -1))


def test_an_empty_queue_reads_zeros_in_training_and_is_named_in_eval_mode() -> None:
    queue = MemoryQueue(2, 3, slots=5)
    assert not queue(torch.randn(4, 2, 3)).any()
    with pytest.raises(RuntimeError, match="the memory is empty"):
        queue.eval()(torch.randn(4, 2, 3))


def test_eval_mode_is_read_only_and_without_noise() -> None:
    queue, query = MemoryQueue(2, 3, slots=9, k=1, noise=True, combine="sum"), torch.randn(20, 2, 3)
    queue.write(0.1 * torch.randn(9, 2, 3))
    assert not torch.equal(queue(query), queue(query))
    before = queue.memory.clone()
    assert torch.equal(queue.eval()(query), queue(query))
    with pytest.raises(RuntimeError, match=r"read-only in eval mode: call train\(\)"):
        queue.write(torch.randn(1, 2, 3))
    assert torch.equal(queue.memory, before)


def test_a_loaded_queue_reads_the_same_and_goes_on_where_it_stopped() -> None:
    queue, copy = MemoryQueue(2, 3, slots=5), MemoryQueue(2, 3, slots=5)
    queue.write(torch.randn(3, 2, 3))
    copy.load_state_dict(queue.state_dict())
    new, query = torch.randn(4, 2, 3), torch.randn(6, 2, 3)
    for each in (queue, copy):
        each.write(new)
    assert set(queue.state_dict()) == {"memory", "cursor"}
    assert torch.equal(copy.eval()(query), queue.eval()(query))


def test_what_is_stored_is_detached() -> None:
    queue, features = MemoryQueue(2, 3, slots=5), torch.randn(3, 2, 3, requires_grad=True)
    queue.write(features)
    assert not queue.memory.requires_grad


def test_a_training_step_waits_for_no_device() -> None:
    queue = MemoryQueue(2, 3, slots=5)
    with NothingWaits():
        queue(torch.randn(4, 2, 3))
        queue.write(torch.randn(4, 2, 3))


def test_bad_input_is_refused() -> None:
    queue = MemoryQueue(2, 3, slots=5)
    with pytest.raises(ValueError, match=r"features: expected \[B, 2, 3\], got \[4, 3, 3\]"):
        queue.write(torch.randn(4, 3, 3))
    with pytest.raises(ValueError, match=r"query: expected \[B, 2, 3\], got \[4, 3\]"):
        queue(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"k: expected 1 to 5 \(slots\), got 6"):
        MemoryQueue(2, 3, slots=5, k=6)
    with pytest.raises(ValueError, match="positions: expected at least 1, got 0"):
        MemoryQueue(0, 3)
    with pytest.raises(ValueError, match="combine: expected one of"):
        MemoryQueue(2, 3, combine="max")
