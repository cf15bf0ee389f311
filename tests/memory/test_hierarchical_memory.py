"""HierarchicalMemory: patches, means of their groups and the maximum of all, each in a memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memad_fast.memory import HierarchicalMemory


def _level(memory: HierarchicalMemory, number: int) -> Tensor:
    return memory.levels[number].get_buffer("memory")


def test_the_levels_hold_patches_means_of_windows_and_the_maximum() -> None:
    memory, features = HierarchicalMemory(3, 4, 5, group=2), torch.randn(1, 12, 5)
    memory.store(features)
    grid = features[0].view(3, 4, 5)
    assert torch.equal(_level(memory, 0), features[0])
    # The last row of groups has one row of patches only.
    means = [grid[rows, columns].flatten(0, 1).mean(dim=0) for rows, columns in _windows()]
    torch.testing.assert_close(_level(memory, 1), torch.stack(means))
    assert torch.equal(_level(memory, 2), features[0].amax(dim=0)[None])


def _windows() -> list[tuple[slice, slice]]:
    return [(rows, columns) for rows in (slice(0, 2), slice(2, 3)) for columns in (slice(0, 2), slice(2, 4))]


def test_images_are_stored_one_after_the_other() -> None:
    together = HierarchicalMemory(2, 2, 3, threshold=0.5, k=1)
    one_by_one = HierarchicalMemory(2, 2, 3, threshold=0.5, k=1)
    one_by_one.load_state_dict(together.state_dict())
    features = torch.randn(6, 4, 3)
    together.store(features)
    for image in features:
        one_by_one.store(image[None])
    for level in range(3):
        torch.testing.assert_close(_level(together, level), _level(one_by_one, level))


def test_a_read_joins_the_levels_answers() -> None:
    memory, query = HierarchicalMemory(2, 3, 4, k=2, group=2), torch.randn(5, 4)
    memory.store(torch.randn(1, 6, 4))
    read = memory.eval()(query)
    patches, groups, whole = (_level(memory, level) for level in range(3))
    for level, rows, k in ((0, patches, 2), (1, groups, 2), (2, whole, 1)):
        best = (query @ rows.T).topk(k, dim=1).indices
        torch.testing.assert_close(read[:, 4 * level : 4 * level + 4], rows[best].sum(dim=1))


def test_noise_is_of_training_alone_and_can_be_left_out() -> None:
    query, features = torch.randn(20, 4), 0.1 * torch.randn(1, 16, 4)
    noisy = HierarchicalMemory(4, 4, 4, k=1)
    noisy.store(features)
    assert not torch.equal(noisy(query), noisy(query))
    assert torch.equal(noisy.eval()(query), noisy(query))
    quiet = HierarchicalMemory(4, 4, 4, k=1, noise=False)
    quiet.store(features)
    assert torch.equal(quiet(query), noisy(query))


def test_soft_reads_weigh_rows_by_their_softmax() -> None:
    memory, query = HierarchicalMemory(2, 2, 3, k=2, combine="straight_through", noise=False), torch.randn(4, 3)
    memory.store(torch.randn(1, 4, 3))
    scores, rows = query @ _level(memory, 0).T, _level(memory, 0)
    best = scores.topk(2, dim=1)
    expected = (best.values.softmax(dim=1)[:, :, None] * rows[best.indices]).sum(dim=1)
    torch.testing.assert_close(memory(query)[:, :3], expected)


def test_positions_beyond_the_grid_make_it_grow() -> None:
    memory = HierarchicalMemory(2, 2, 3, k=1)
    memory.store(torch.randn(1, 4, 3))
    before = _level(memory, 0).clone()
    new = torch.randn(1, 2, 3)
    memory.store(new, torch.tensor([9, 6]))
    assert memory.blocks == 10
    assert [len(_level(memory, level)) for level in range(3)] == [10, 3, 1]
    assert torch.equal(_level(memory, 0)[:4], before)
    assert torch.equal(_level(memory, 0)[[9, 6]], new[0])
    # Positions 9 and 6 are in rows 4 and 3: groups 2 and 1.
    assert torch.equal(_level(memory, 1)[[2, 1]], new[0])
    assert memory.levels[0].get_buffer("written").tolist() == [True] * 4 + [False, False, True, False, False, True]


def test_a_memory_that_has_grown_can_be_loaded() -> None:
    memory, other = HierarchicalMemory(2, 2, 3, k=1), HierarchicalMemory(2, 2, 3, k=1)
    memory.store(torch.randn(1, 7, 3), torch.arange(7))
    other.load_state_dict(memory.state_dict())
    query = torch.randn(5, 3)
    assert other.blocks == 8
    assert torch.equal(other.eval()(query), memory.eval()(query))
    with pytest.raises(RuntimeError, match="size mismatch"):
        memory.load_state_dict(HierarchicalMemory(2, 2, 3, k=1).state_dict())


def test_eval_mode_is_read_only() -> None:
    memory = HierarchicalMemory(2, 2, 3, k=1)
    memory.store(torch.randn(1, 4, 3))
    memory.eval()
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    for positions in (None, torch.tensor([0, 1, 2, 9])):
        with pytest.raises(RuntimeError, match=r"read-only in eval mode: call train\(\)"):
            memory.store(torch.randn(1, 4, 3), positions)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


def test_a_memory_that_holds_nothing_is_named() -> None:
    with pytest.raises(RuntimeError, match="only 0 positions are written"):
        HierarchicalMemory(2, 2, 3)(torch.randn(1, 3))


def test_bad_input_is_refused() -> None:
    memory = HierarchicalMemory(2, 2, 3, k=1)
    with pytest.raises(ValueError, match=r"features: expected \[B, 4, D\]"):
        memory.store(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match=r"positions: expected \[P\] distinct values"):
        memory.store(torch.randn(1, 2, 3), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"positions: expected \[P\] distinct values"):
        memory.store(torch.randn(1, 1, 3), torch.tensor([-1]))
    with pytest.raises(ValueError, match="finite"):
        memory.store(torch.full((1, 4, 3), torch.nan))
    with pytest.raises(ValueError, match="group: expected at least 1, got 0"):
        HierarchicalMemory(2, 2, 3, group=0)
    with pytest.raises(ValueError, match="combine: expected one of"):
        HierarchicalMemory(2, 2, 3, combine="max")


def test_no_images_change_nothing() -> None:
    memory = HierarchicalMemory(2, 2, 3, k=1)
    memory.store(torch.randn(0, 4, 3))
    assert not any(level.get_buffer("written").any() for level in memory.levels)
