"""PartitionMemoryBank against eq. 2 to 5 written out, and its contract."""

from __future__ import annotations

import pytest
import torch
from devices import NothingWaits
from torch.nn import functional

from memad_fast.memory import PartitionMemoryBank


def _read_by_hand(memory: PartitionMemoryBank, features: torch.Tensor) -> torch.Tensor:
    """Strip by strip, channel by channel, in float64."""
    partitions, items, _ = memory.bank.shape
    strips = features.double().chunk(partitions, dim=2)
    reads = []
    for strip, bank in zip(strips, memory.bank.double(), strict=True):
        query = strip.flatten(2)
        similarity = functional.normalize(query, dim=-1) @ functional.normalize(bank, dim=-1).T
        weights = (similarity.softmax(-1) - 1 / items).clamp(min=0)
        reads.append((weights @ bank).reshape(strip.shape))
    return torch.cat(reads, dim=2)


def test_each_channel_of_each_strip_reads_its_own_bank() -> None:
    memory = PartitionMemoryBank(partitions=4, items=7, height=8, width=6)
    features = torch.randn(3, 5, 8, 6)
    torch.testing.assert_close(memory(features).double(), _read_by_hand(memory, features), rtol=1e-5, atol=1e-7)


def test_one_partition_is_the_whole_map() -> None:
    memory = PartitionMemoryBank(partitions=1, items=3, height=4, width=4)
    features = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(memory(features).double(), _read_by_hand(memory, features), rtol=1e-5, atol=1e-7)


def test_the_query_is_a_view_of_the_features() -> None:
    memory = PartitionMemoryBank(partitions=4, items=7, height=8, width=6)
    features = torch.randn(3, 5, 8, 6)
    query = memory._query(features)
    assert query.data_ptr() == features.data_ptr()
    assert query.shape == (3, 4, 5, 12)
    assert query.stride(-1) == 1


def test_channels_last_features_give_the_same_read() -> None:
    memory = PartitionMemoryBank(partitions=4, items=7, height=8, width=6)
    features = torch.randn(3, 5, 8, 6)
    assert torch.equal(memory(features.contiguous(memory_format=torch.channels_last)), memory(features))


def test_a_change_in_one_strip_leaves_the_others() -> None:
    memory = PartitionMemoryBank(partitions=4, items=7, height=8, width=6)
    features = torch.randn(1, 5, 8, 6)
    changed = features.clone()
    changed[:, :, 2:4] += 1.0
    before, after = memory(features), memory(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert torch.equal(before[:, :, 4:], after[:, :, 4:])
    assert not torch.equal(before[:, :, 2:4], after[:, :, 2:4])


def test_features_and_bank_get_gradients() -> None:
    memory = PartitionMemoryBank(partitions=2, items=7, height=4, width=4)
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    memory(features).square().sum().backward()
    assert features.grad is not None
    assert memory.bank.grad is not None
    assert features.grad.abs().sum() > 0
    assert memory.bank.grad.abs().flatten(1).sum(dim=1).min() > 0


def test_identical_items_make_every_row_dead() -> None:
    memory = PartitionMemoryBank(partitions=2, items=4, height=4, width=4)
    with torch.no_grad():
        memory.bank.copy_(memory.bank[:, :1].expand_as(memory.bank))
    features = torch.randn(2, 3, 4, 4)
    assert torch.count_nonzero(memory(features)) == 0
    assert float(memory.stats(features).dead_share.max()) == 1.0


def test_options_reach_the_read() -> None:
    features = torch.randn(2, 3, 4, 4)
    soft = PartitionMemoryBank(2, 5, 4, 4)
    others = [
        PartitionMemoryBank(2, 5, 4, 4, renormalize=True),
        PartitionMemoryBank(2, 5, 4, 4, shrink="hard"),
        PartitionMemoryBank(2, 5, 4, 4, shrink="none"),
        PartitionMemoryBank(2, 5, 4, 4, threshold=0.19),
    ]
    for other in others:
        other.load_state_dict(soft.state_dict())
        assert not torch.allclose(other(features), soft(features))


def test_state_dict_round_trip_is_bit_identical() -> None:
    memory, copy = PartitionMemoryBank(2, 5, 4, 4), PartitionMemoryBank(2, 5, 4, 4)
    features = torch.randn(2, 3, 4, 4)
    copy.load_state_dict(memory.state_dict())
    assert list(memory.state_dict()) == ["bank"]
    assert torch.equal(copy(features), memory(features))


def test_bfloat16_features_are_read_in_bfloat16() -> None:
    memory = PartitionMemoryBank(2, 5, 4, 4)
    assert memory(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_partitions_that_do_not_divide_are_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"3 does not divide height 8; these do: 1, 2, 4, 8"):
        PartitionMemoryBank(3, 5, 8, 8)
    with pytest.raises(ValueError, match="partitions"):
        PartitionMemoryBank(0, 5, 8, 8)
    with pytest.raises(ValueError, match="items"):
        PartitionMemoryBank(2, 0, 8, 8)


def test_features_of_another_size_are_refused() -> None:
    memory = PartitionMemoryBank(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"expected \[B, C, 4, 4\], got \[2, 3, 8, 8\]"):
        memory(torch.randn(2, 3, 8, 8))


def test_nothing_waits_for_the_device() -> None:
    memory = PartitionMemoryBank(4, 10, 16, 16)
    with NothingWaits():
        memory(torch.randn(2, 3, 16, 16, requires_grad=True)).sum().backward()
        memory.stats(torch.randn(2, 3, 16, 16))


def test_a_read_and_its_gradient_compile_as_one_graph() -> None:
    memory = PartitionMemoryBank(4, 10, 16, 16)
    features = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")  # seconds sooner than C++
    grads = []
    for read in (memory, compiled):
        grads.append(torch.autograd.grad(read(features).square().sum(), memory.bank)[0])
        assert torch.equal(read(features), memory(features))
    torch.testing.assert_close(*grads)


def test_features_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="bank: expected device meta like query, got cpu"):
        PartitionMemoryBank(4, 10, 16, 16)(torch.ones(2, 3, 16, 16, device="meta"))
