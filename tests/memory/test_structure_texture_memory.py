"""StructureTextureMemory: nearest key's value, ring writes, read-only in eval, resumable."""

from __future__ import annotations

import pytest
import torch

from memad_fast.memory import StructureTextureMemory


def _pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator)


def test_a_stored_key_reads_its_value_at_distance_zero() -> None:
    memory = StructureTextureMemory(8, 6, 3)
    keys, values = _pairs(8)
    memory.write(keys, values)
    read, distances, indices = memory(keys)
    assert torch.equal(read, values)
    assert torch.count_nonzero(distances) == 0
    assert indices.tolist() == list(range(8))


def test_only_the_filled_part_is_searched() -> None:
    memory = StructureTextureMemory(8, 6, 3)
    keys, values = _pairs(3)
    memory.write(10 + keys, values)
    _, _, indices = memory(torch.zeros(5, 6))  # an unwritten slot holds zeros and would be nearest
    assert int(indices.max()) < 3


def test_the_newest_pairs_replace_the_oldest() -> None:
    memory = StructureTextureMemory(4, 6, 3)
    keys, values = _pairs(10)
    for start in range(0, 10, 2):
        memory.write(keys[start : start + 2], values[start : start + 2])
    read, distances, _ = memory(keys[6:])
    assert torch.equal(read, values[6:])
    assert float(memory(keys[:6])[1].min()) > 0
    assert torch.count_nonzero(distances) == 0


def test_more_rows_than_slots_keep_the_newest() -> None:
    memory = StructureTextureMemory(4, 6, 3)
    keys, values = _pairs(10)
    memory.write(keys, values)
    assert torch.equal(memory(keys[6:])[0], values[6:])
    assert int(memory.filled) == 4


def test_stored_pairs_are_detached_and_the_distance_reaches_the_query() -> None:
    memory = StructureTextureMemory(4, 6, 3)
    keys, values = _pairs(4)
    memory.write(keys.requires_grad_(), values.requires_grad_())
    query = torch.randn(2, 6, requires_grad=True)
    _, distances, _ = memory(query)
    assert not memory.keys.requires_grad
    assert not memory.values.requires_grad
    distances.sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0


def test_eval_mode_is_read_only() -> None:
    memory = StructureTextureMemory(4, 6, 3)
    memory.write(*_pairs(4))
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    memory.eval()
    memory(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        memory.write(*_pairs(2, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


def test_loading_continues_the_ring_where_it_was() -> None:
    memory, copy = StructureTextureMemory(5, 6, 3), StructureTextureMemory(5, 6, 3)
    memory.write(*_pairs(7))
    copy.load_state_dict(memory.state_dict())
    for each in (memory, copy):
        each.write(*_pairs(2, seed=1))
    query = torch.randn(9, 6)
    for ours, theirs in zip(memory(query), copy(query), strict=True):
        assert torch.equal(ours, theirs)
    assert set(memory.state_dict()) == {"keys", "values", "cursor", "filled"}
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in memory.state_dict().items())


def test_reading_an_empty_memory_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="memory is empty"):
        StructureTextureMemory(5, 6, 3)(torch.randn(1, 6))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        StructureTextureMemory(0, 6, 3)
    memory = StructureTextureMemory(5, 6, 3)
    with pytest.raises(ValueError):
        memory.write(torch.randn(2, 7), torch.randn(2, 3))
    with pytest.raises(ValueError):
        memory.write(torch.randn(2, 6), torch.randn(3, 3))
    assert int(memory.filled) == 0
