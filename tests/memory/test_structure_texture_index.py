"""StructureTextureIndex: what the memory on tensors reads, from any index."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memad_fast.index import ExactIndex, FaissIndex, Index
from memad_fast.memory import StructureTextureIndex, StructureTextureMemory

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, KEY, VALUE = 70, 6, 3


def _pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, KEY, generator=generator), torch.randn(count, VALUE, generator=generator)


def _on_index(size: int | None = SIZE, path: Path | None = None) -> StructureTextureIndex:
    return StructureTextureMemory.on(ExactIndex(KEY, values_dim=VALUE, capacity=size, chunk_rows=64, path=path))


def assert_same_reads(memory: StructureTextureIndex, expected: StructureTextureMemory, query: Tensor) -> None:
    read, distances, indices = memory(query)
    slots = torch.where(indices < 0, indices, indices % SIZE)
    for got, wanted in zip((read, distances, slots), expected(query), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", ["ram", "disk"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.sampled_from([0, 1, 7, 30, 69, 70, 71, 200]), min_size=1, max_size=6), data=st.data())
def test_reads_are_those_of_the_tensors_bit_for_bit(
    where: str, counts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("index") if where == "disk" else None
    memory, expected = _on_index(path=path), StructureTextureMemory(SIZE, KEY, VALUE)
    for seed, count in enumerate(counts):
        keys, values = _pairs(count, seed)
        memory.write(keys, values)
        expected.write(keys, values)
        if not expected.is_empty:
            query = torch.cat((_pairs(9, seed + 100)[0], keys[:2], torch.full((1, KEY), torch.nan)))
            for mode in (True, False):
                assert_same_reads(memory.train(mode), expected.train(mode), query)
            memory.train()
            expected.train()
    assert memory.is_empty == expected.is_empty
    keys, values = expected.pairs()
    pieces = list(memory.index.pieces())  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([keys[:0], *(piece.keys for piece in pieces)]), keys)
    assert torch.equal(torch.cat([values[:0], *(piece.values for piece in pieces)]), values)


def test_the_distance_reaches_the_query_as_on_tensors() -> None:
    memory, expected = _on_index(), StructureTextureMemory(SIZE, KEY, VALUE)
    gradients = []
    for each in (memory, expected):
        each.write(*_pairs(50))
        query = _pairs(9, seed=1)[0]
        query[3] = torch.nan
        query.requires_grad_()
        _, distances, _ = each(query)
        distances[[0, 1, 2, 4, 5, 6, 7, 8]].square().sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0] is not None
    assert gradients[0].abs().sum() > 0
    with mock.patch.object(ExactIndex, "rows", new_callable=mock.PropertyMock, side_effect=AttributeError):
        memory(_pairs(2)[0])
        with pytest.raises(RuntimeError, match="query: the gradient takes the keys, which ExactIndex does not give"):
            memory(_pairs(2)[0].requires_grad_())


def test_pairs_are_detached_and_take_the_dtypes_of_the_index() -> None:
    index = ExactIndex(KEY, dtype=torch.bfloat16, values_dim=VALUE, values_dtype=torch.float16)
    memory = StructureTextureMemory.on(index)
    keys, values = _pairs(5)
    memory.write(keys.double().requires_grad_(), values.requires_grad_())
    read, distances, _ = memory(keys.bfloat16().float())
    assert torch.equal(read, values.half())
    assert not read.requires_grad
    assert torch.count_nonzero(distances) == 0


def test_faiss_reads_what_was_written() -> None:
    pytest.importorskip("faiss")
    index = FaissIndex(KEY, "IVF2,Flat", values_dim=VALUE, capacity=100, training_rows=60, rerank=2)
    memory, expected = StructureTextureMemory.on(index), StructureTextureMemory(100, KEY, VALUE)
    for seed in range(5):
        memory.write(*_pairs(50, seed))
        expected.write(*_pairs(50, seed))
        index.set(nprobe=2)  # all lists
        query = _pairs(20, seed + 100)[0]
        for got, wanted in zip(memory(query)[:2], expected(query)[:2], strict=True):
            assert torch.equal(got, wanted)


def test_without_a_capacity_every_pair_is_kept() -> None:
    memory = _on_index(size=None)
    for seed in range(5):
        memory.write(*_pairs(100, seed))
    for seed in range(5):
        keys, values = _pairs(100, seed)
        read, _, indices = memory(keys)
        assert torch.equal(read, values)
        assert torch.equal(indices, torch.arange(100) + 100 * seed)


def test_eval_mode_is_read_only() -> None:
    memory = _on_index().eval()
    with pytest.raises(RuntimeError, match=r"read-only in eval mode: call train\(\)"):
        memory.write(*_pairs(4))
    assert memory.is_empty


def test_reading_an_empty_memory_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="memory is empty"):
        _on_index()(torch.randn(1, KEY))


def test_a_pair_that_does_not_fit_changes_nothing() -> None:
    memory = _on_index()
    memory.write(*_pairs(4))
    for keys, values in (
        (torch.randn(2, KEY + 1), torch.randn(2, VALUE)),
        (torch.randn(2, KEY), torch.randn(3, VALUE)),
    ):
        with pytest.raises(ValueError):
            memory.write(keys, values)
    with pytest.raises(ValueError, match="row 1"):
        memory.write(torch.tensor([[0.0], [torch.inf]]).expand(2, KEY), torch.zeros(2, VALUE))
    assert len(memory.index) == 4


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda: ExactIndex(KEY), "index: expected one with values, got values_dim None"),
        (lambda: ExactIndex(KEY, metric="ip", values_dim=VALUE), "index: expected metric 'l2', got 'ip'"),
    ],
)
def test_an_index_that_does_not_fit_is_named(index: Callable[[], Index], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructureTextureMemory.on(index())


def test_what_is_no_index_is_named() -> None:
    with pytest.raises(TypeError, match=r"index: expected a memad_fast\.index\.Index, got int"):
        StructureTextureMemory.on(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_it_is_neither_copied_nor_pickled(copied: Callable[[StructureTextureIndex], object]) -> None:
    with pytest.raises(TypeError, match="ExactIndex: an index is neither copied nor pickled; save it"):
        copied(_on_index())


def test_a_saved_memory_reads_the_same_bits_and_goes_on(tmp_path: Path) -> None:
    memory, expected = _on_index(path=tmp_path), StructureTextureMemory(SIZE, KEY, VALUE)
    for each in (memory, expected):
        each.write(*_pairs(100))
    memory.index.save()
    state = memory.state_dict()
    assert set(state) == {"next_id"}
    memory.index.close()
    opened = StructureTextureMemory.on(ExactIndex.open(tmp_path))
    opened.load_state_dict(state)
    assert_same_reads(opened, expected, torch.randn(20, KEY))
    for each in (opened, expected):
        each.write(*_pairs(30, seed=1))
    assert_same_reads(opened, expected, torch.randn(20, KEY))


def test_a_state_of_pairs_that_are_gone_is_refused() -> None:
    memory = _on_index()
    memory.write(*_pairs(100))
    with pytest.raises(RuntimeError, match="index: 0 pairs were ever added to it, 100 to that of the state"):
        _on_index().load_state_dict(memory.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*next_id"):
        _on_index().load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*next_id"):
        StructureTextureMemory(SIZE, KEY, VALUE).load_state_dict(memory.state_dict())


_RANK = """
import sys
import torch
from torch import distributed
from memad_fast.index import ExactIndex, ShardedIndex
from memad_fast.memory import StructureTextureMemory

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
alone = StructureTextureMemory(9, 2, 1)
alone.write(torch.full((3, 2), float(rank)), torch.full((3, 1), -1.0))  # gathered by the tensors too
queries = torch.randn(20, 2, generator=torch.Generator().manual_seed(5))
for make in (ExactIndex, ShardedIndex):
    memory, expected = StructureTextureMemory.on(make(2, values_dim=1, capacity=9)), StructureTextureMemory(9, 2, 1)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        keys, values = torch.randn(1 + rank + step, 2, generator=generator), torch.randn(1 + rank + step, 1)
        memory.write(keys, values)
        expected.write(keys, values)
        for got, wanted in zip(memory(queries)[:2], expected(queries)[:2], strict=True):
            assert torch.equal(got, wanted), (make, step)
    copied = StructureTextureMemory.on(make(2, values_dim=1, capacity=9))
    copied.copy_from(expected)
    assert len(copied.index) == 9
    assert torch.equal(copied(queries)[0], expected(queries)[0])
distributed.destroy_process_group()
"""


def test_all_ranks_read_the_pairs_of_all(tmp_path: Path) -> None:
    """Each rank's own index gets all pairs; one that is spread over the ranks gets them once."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
