"""StructureTextureMemory: nearest key's value, ring writes, read-only in eval, resumable."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import NothingWaits, captured, fake_gpu

import memad_fast
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


def _step(memory: StructureTextureMemory, query: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = memory(query)
    memory.write(query, values)
    return found


def test_a_captured_step_is_replayed_with_new_contents() -> None:
    """Read and write follow the cursor and the number of pairs that they find, not those of the capture."""
    memory = StructureTextureMemory(8, 6, 3)
    memory.write(*_pairs(3))
    twin = copy.deepcopy(memory)
    step = captured(lambda query, values: _step(memory, query, values), *_pairs(2, seed=1))
    _step(twin, *_pairs(2, seed=1))
    for seed in range(2, 8):
        pairs = _pairs(2, seed=seed)
        for got, expected in zip(step(*pairs), _step(twin, *pairs), strict=True):
            assert torch.equal(got, expected)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in memory.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_the_device(training: bool) -> None:
    memory = StructureTextureMemory(8, 6, 3)
    memory.write(*_pairs(3))
    with NothingWaits():
        memory.train(training)(torch.randn(2, 6))
        if training:
            memory.write(*_pairs(2))


def test_a_gpus_memory_reads_and_writes_on_that_gpu() -> None:
    with fake_gpu() as gpu:
        memory = StructureTextureMemory(8, 6, 3).to(gpu)
        keys, values = torch.randn(3, 6, device=gpu), torch.randn(3, 3, device=gpu)
        memory.write(keys, values)
        for mode in (True, False):
            assert {part.device for part in memory.train(mode)(keys)} == {gpu}
        assert {part.device for part in memory.state_dict().values()} == {gpu}


def test_a_loaded_memory_is_known_to_hold_pairs() -> None:
    """So that its first read need not look; and one that was loaded empty is empty."""
    memory, empty = StructureTextureMemory(5, 6, 3), StructureTextureMemory(5, 6, 3)
    state = {"inner." + name: value for name, value in empty.state_dict().items()}
    memory.write(*_pairs(2))
    loaded = torch.nn.ModuleDict({"inner": StructureTextureMemory(5, 6, 3)})
    loaded.load_state_dict({"inner." + name: value for name, value in memory.state_dict().items()})
    with NothingWaits():
        loaded["inner"](torch.randn(2, 6))
    loaded.load_state_dict(state)
    with pytest.raises(RuntimeError, match="memory is empty"):
        loaded["inner"](torch.randn(2, 6))


def test_a_memory_filled_from_outside_is_read() -> None:
    """As weight averaging does: buffers are copied in place, with no write and no load."""
    memory, copied = StructureTextureMemory(5, 6, 3), StructureTextureMemory(5, 6, 3)
    memory.write(*_pairs(4))
    for mine, theirs in zip(copied.buffers(), memory.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(copied(torch.ones(1, 6))[0], memory(torch.ones(1, 6))[0])


def _change_by_load(memory: StructureTextureMemory) -> StructureTextureMemory:
    other = StructureTextureMemory(30, 6, 3)
    other.write(*_pairs(30, seed=5))
    memory.load_state_dict(other.state_dict())
    return memory


def _change_by_write(memory: StructureTextureMemory) -> StructureTextureMemory:
    memory.train().write(*_pairs(7, seed=5))
    return memory.eval()


def _change_unseen(memory: StructureTextureMemory) -> StructureTextureMemory:
    """As a replayed CUDA graph does: torch counts no change."""
    memory.train()
    memory.keys.data[:] = _pairs(30, seed=5)[0]
    return memory.eval()


def _change_copy(memory: StructureTextureMemory) -> StructureTextureMemory:
    """Until torch counts as many changes of the copy as of the original when that was packed."""
    for _ in range(5):
        memory.keys.mul_(1)
    memory(torch.zeros(1, 6))
    copied = copy.deepcopy(memory)
    while copied.keys._version < memory.keys._version:
        copied.keys.copy_(_pairs(30, seed=5)[0])
    return copied


@pytest.mark.parametrize(
    "change",
    [
        _change_by_load,
        _change_by_write,
        _change_unseen,
        _change_copy,
        lambda memory: memory.half(),
        lambda memory: memory.double(),
    ],
)
def test_packed_keys_follow_every_change(change: object) -> None:
    memory = StructureTextureMemory(30, 6, 3)
    memory.write(*_pairs(30))
    query = torch.randn(20, 6)
    memory.eval()(query)  # packs the keys
    memory = change(memory)  # type: ignore[operator]
    expected = memad_fast.stcm_lookup(query.to(memory.keys.dtype), memory.keys.clone(), memory.values)
    for got, want in zip(memory(query), expected, strict=True):
        assert torch.equal(got, want)


def test_keys_are_packed_once_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    prepare = memad_fast.prepare_keys
    monkeypatch.setattr(
        "memad_fast.memory.structure_texture_memory.prepare_keys", lambda keys: packed.append(keys) or prepare(keys)
    )
    memory = StructureTextureMemory(30, 6, 3)
    memory.write(*_pairs(30))
    memory(torch.randn(2, 6))
    assert not packed
    for _ in range(3):
        with torch.inference_mode():
            memory.eval()(torch.randn(2, 6))
    assert len(packed) == 1
    assert "_prepared" not in memory.state_dict()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_step_compiles_as_one_graph(mode: str) -> None:
    memory = StructureTextureMemory(8, 6, 3)
    memory.write(*_pairs(3))
    twin = copy.deepcopy(memory)
    step = torch.compile(lambda query, values: _step(memory, query, values), fullgraph=True, mode=mode)
    for seed in range(1, 5):
        for got, expected in zip(step(*_pairs(2, seed)), _step(twin, *_pairs(2, seed)), strict=True):
            assert torch.equal(got, expected)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in memory.state_dict().items())


def test_a_compiled_read_in_eval_mode_sees_what_was_written_since() -> None:
    memory = StructureTextureMemory(8, 6, 3)
    read = torch.compile(memory, fullgraph=True)
    for seed in range(3):
        memory.train().write(*_pairs(3, seed))
        memory.eval()
        for got, expected in zip(read(torch.ones(4, 6)), memory(torch.ones(4, 6)), strict=True):
            assert torch.equal(got, expected)


def test_tensors_of_another_device_are_refused() -> None:
    memory = StructureTextureMemory(8, 6, 3)
    memory.write(*_pairs(3))
    with pytest.raises(ValueError, match="keys: expected device meta like query, got cpu"):
        memory(torch.ones(2, 6, device="meta"))
    with pytest.raises(ValueError, match="new_keys: expected device cpu like keys, got meta"):
        memory.write(torch.ones(2, 6, device="meta"), torch.ones(2, 3, device="meta"))


_RANK = """
import sys, torch
from memad_fast.memory import StructureTextureMemory
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
memory = StructureTextureMemory(7, 2, 1)
for step, counts in enumerate([(2, 1), (3, 0), (0, 0), (2, 2)]):  # 10 pairs in all
    keys = 100.0 * step + 10.0 * rank + torch.arange(2.0 * counts[rank]).reshape(-1, 2)
    memory.write(keys, keys[:, :1].double())
torch.save((memory.state_dict(), memory.is_empty), out)
torch.distributed.destroy_process_group()
"""


def test_the_memories_of_all_ranks_hold_the_pairs_of_all(tmp_path: Path) -> None:
    """Also where the ranks' batches differ in size, or are empty."""
    outs = [tmp_path / f"{rank}.pt" for rank in (0, 1)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(tmp_path / "store"), str(outs[rank])])
        for rank in (0, 1)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected = StructureTextureMemory(7, 2, 1)
    for step, counts in enumerate([(2, 1), (3, 0), (0, 0), (2, 2)]):
        for rank in (0, 1):
            keys = 100.0 * step + 10.0 * rank + torch.arange(2.0 * counts[rank]).reshape(-1, 2)
            expected.write(keys, keys[:, :1])
    for out in outs:
        state, is_empty = torch.load(out)
        assert not is_empty
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in state.items())


def test_a_memory_is_empty_until_it_holds_a_pair() -> None:
    memory, loaded = StructureTextureMemory(5, 6, 3), StructureTextureMemory(5, 6, 3)
    memory.write(*_pairs(0))
    assert memory.is_empty
    memory.write(*_pairs(1))
    assert not memory.is_empty
    loaded.load_state_dict(memory.state_dict())
    assert not loaded.is_empty
    loaded.load_state_dict(StructureTextureMemory(5, 6, 3).state_dict())
    assert loaded.is_empty
