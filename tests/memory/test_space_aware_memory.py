"""SpaceAwareMemory: writes at the patch's own position, reads by Gumbel top-k among written rows."""

from __future__ import annotations

import pytest
import torch
from devices import NothingWaits, captured, fake_gpu

from memad_fast.memory import SpaceAwareMemory


def test_a_new_feature_goes_to_its_own_position() -> None:
    memory = SpaceAwareMemory(6, 4, k=1)
    features = torch.randn(3, 4)
    memory.write(features, torch.tensor([5, 0, 2]))
    assert torch.equal(memory.memory[[5, 0, 2]], features)
    assert memory.written.tolist() == [True, False, True, False, False, True]


def test_a_similar_feature_is_known_and_a_different_one_replaces() -> None:
    memory = SpaceAwareMemory(2, 2, k=1, threshold=0.5)
    memory.write(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    memory.write(torch.tensor([[2.0, 0.1]]), torch.tensor([0]))
    assert memory.memory[0].tolist() == [1.0, 0.0]
    memory.write(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert memory.memory[0].tolist() == [0.0, 1.0]


def test_repeated_positions_are_written_in_order() -> None:
    one_call, one_by_one = SpaceAwareMemory(5, 3, k=1), SpaceAwareMemory(5, 3, k=1)
    one_by_one.load_state_dict(one_call.state_dict())
    features, positions = torch.randn(40, 3), torch.randint(0, 5, (40,))
    one_call.write(features, positions)
    for feature, position in zip(features, positions, strict=True):
        one_by_one.write(feature[None], position[None])
    assert torch.equal(one_call.memory, one_by_one.memory)


def test_an_all_zero_feature_is_stored_and_can_be_replaced() -> None:
    memory = SpaceAwareMemory(2, 2, k=1)
    memory.write(torch.zeros(1, 2), torch.tensor([0]))
    assert memory.memory[0].tolist() == [0.0, 0.0]
    memory.write(torch.ones(1, 2), torch.tensor([0]))
    assert memory.memory[0].tolist() == [1.0, 1.0]


def test_an_unwritten_position_never_wins() -> None:
    memory = SpaceAwareMemory(50, 4, k=2)
    positions = torch.tensor([7, 31, 48])
    memory.write(-torch.rand(3, 4), positions)  # scores below those of the noise in unwritten rows
    for seed in range(20):
        _, indices, _ = memory(torch.rand(16, 4), seed=seed)
        assert set(indices.flatten().tolist()) <= set(positions.tolist())


def test_eval_reads_the_sum_of_the_best_rows_without_noise() -> None:
    memory = SpaceAwareMemory(8, 4, k=3)
    features = torch.randn(8, 4)
    memory.write(features, torch.arange(8))
    query = torch.randn(5, 4)
    read, indices, _ = memory.eval()(query)
    best = (query.double() @ features.double().T).topk(3, dim=1).indices
    assert indices.tolist() == best.tolist()
    torch.testing.assert_close(read, features[best].sum(dim=1))
    assert torch.equal(memory(query)[0], read)


def test_training_reads_with_noise_that_the_seed_fixes() -> None:
    memory = SpaceAwareMemory(32, 4, k=3)
    memory.write(0.1 * torch.randn(32, 4), torch.arange(32))
    query = torch.randn(5, 4)
    assert torch.equal(memory(query, seed=1)[1], memory(query, seed=1)[1])
    assert not torch.equal(memory(query, seed=1)[1], memory(query, seed=2)[1])


def test_eval_mode_is_read_only() -> None:
    memory = SpaceAwareMemory(4, 2, k=1)
    memory.eval()
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        memory.write(torch.ones(1, 2), torch.tensor([0]))
    assert not memory.written.any()


def test_state_dict_round_trip_is_bit_identical() -> None:
    memory, copy = SpaceAwareMemory(8, 4, k=3), SpaceAwareMemory(8, 4, k=3)
    memory.write(torch.randn(6, 4), torch.arange(6))
    copy.load_state_dict(memory.state_dict())
    assert set(memory.state_dict()) == {"memory", "written"}
    query = torch.randn(5, 4)
    for ours, theirs in zip(memory.eval()(query), copy.eval()(query), strict=True):
        assert torch.equal(ours, theirs)


def test_reading_fewer_written_rows_than_k_is_an_error() -> None:
    memory = SpaceAwareMemory(8, 4, k=3)
    memory.write(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="only 2 positions are written"):
        memory(torch.randn(1, 4))


def test_bad_input_is_refused() -> None:
    memory = SpaceAwareMemory(4, 2, k=1)
    with pytest.raises(ValueError, match="positions: expected 0 to 3, got 0 to 4"):
        memory.write(torch.ones(2, 2), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="features, positions"):
        memory.write(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="finite"):
        memory.write(torch.full((1, 2), torch.nan), torch.tensor([0]))
    with pytest.raises(ValueError, match="k: expected 1 to 4"):
        SpaceAwareMemory(4, 2, k=5)


def _written(memory: SpaceAwareMemory, *positions: int) -> SpaceAwareMemory:
    memory.write(torch.randn(len(positions), memory.memory.shape[1]), torch.tensor(positions))
    return memory


@pytest.mark.parametrize("training", [True, False])
def test_a_read_waits_for_no_device(training: bool) -> None:
    memory = _written(SpaceAwareMemory(8, 4, k=2), 1, 5, 6).train(training)
    query = torch.randn(3, 4)
    memory(query)  # the first one looks whether there are enough rows
    with NothingWaits():
        memory(query, seed=1)


def test_a_captured_read_sees_what_was_written_since() -> None:
    memory = _written(SpaceAwareMemory(8, 4, k=2), 1, 5, 6).eval()
    memory(torch.randn(3, 4))  # looks whether there are enough rows, as a call before a capture does
    read = captured(lambda query: memory(query), torch.randn(3, 4))
    for position in (0, 5, 7):
        _written(memory.train(), position).eval()
        query = torch.randn(3, 4)
        for got, expected in zip(read(query), memory(query), strict=True):
            assert torch.equal(got, expected)


def test_a_gpus_memory_is_read_on_that_gpu() -> None:
    state = _written(SpaceAwareMemory(8, 4, k=2), 1, 5).state_dict()
    memory = SpaceAwareMemory(8, 4, k=2)
    memory.load_state_dict(state)  # tells that there is enough to read
    with fake_gpu() as gpu:
        on_gpu = SpaceAwareMemory(8, 4, k=2).to(gpu)
        on_gpu._is_readable = memory._is_readable
        assert {part.device for part in on_gpu(torch.randn(3, 4, device=gpu))} == {gpu}


def test_a_memory_that_is_loaded_with_too_few_rows_is_refused() -> None:
    memory = _written(SpaceAwareMemory(8, 4, k=2), 1, 5)
    memory(torch.randn(1, 4))
    memory.load_state_dict(_written(SpaceAwareMemory(8, 4, k=2), 3).state_dict())
    with pytest.raises(RuntimeError, match="only 1 positions are written"):
        memory(torch.randn(1, 4))


def test_noise_belongs_to_the_position_whatever_else_is_written() -> None:
    few, many = SpaceAwareMemory(8, 4, k=1), SpaceAwareMemory(8, 4, k=1)
    _written(few, 6)
    many.load_state_dict(few.state_dict())
    _written(many, 2, 3)
    query = torch.zeros(50, 4)
    for seed in range(3):
        _, indices, scores = many(query, seed=seed)
        chosen = indices[:, 0] == 6
        assert chosen.any()
        assert torch.equal(scores[chosen], few(query, seed=seed)[2][chosen])


def test_a_read_compiles_as_one_graph() -> None:
    memory = _written(SpaceAwareMemory(8, 4, k=2), 1, 5, 6).eval()
    query = torch.randn(3, 4)
    compiled = torch.compile(memory, fullgraph=True, mode="reduce-overhead")(query)
    for got, expected in zip(compiled, memory(query), strict=True):
        assert torch.equal(got, expected)


def test_a_grown_memory_keeps_what_it_holds_and_takes_more() -> None:
    memory = _written(SpaceAwareMemory(3, 4, k=1), 0, 2)
    before = memory.memory.clone()
    memory.grow(5)
    assert torch.equal(memory.memory[:3], before)
    assert memory.written.tolist() == [True, False, True, False, False]
    assert memory.memory[3:].any(dim=1).all()  # noise: the cosine with it is defined
    _written(memory, 4)
    assert memory.written.tolist() == [True, False, True, False, True]
    with pytest.raises(ValueError, match="blocks: expected at least 5"):
        memory.grow(4)
    with pytest.raises(RuntimeError, match=r"read-only in eval mode: call train\(\) before grow"):
        memory.eval().grow(6)


def test_a_memory_that_has_grown_can_be_loaded() -> None:
    memory, other = _written(SpaceAwareMemory(3, 4, k=1), 0, 1, 2), SpaceAwareMemory(3, 4, k=1)
    memory.grow(6)
    _written(memory, 5)
    other.load_state_dict(memory.state_dict())
    query = torch.randn(7, 4)
    assert torch.equal(other.eval()(query)[1], memory.eval()(query)[1])
    with pytest.raises(RuntimeError, match="size mismatch"):
        memory.load_state_dict(SpaceAwareMemory(3, 4, k=1).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        memory.load_state_dict(SpaceAwareMemory(8, 5, k=1).state_dict())


def test_reads_can_be_combined_otherwise_and_be_without_noise() -> None:
    memory, query = SpaceAwareMemory(8, 4, k=2, noise=False, combine="mean"), torch.randn(5, 4)
    summed = SpaceAwareMemory(8, 4, k=2)
    _written(memory, *range(8))
    summed.load_state_dict(memory.state_dict())
    torch.testing.assert_close(2 * memory(query)[0], summed.eval()(query)[0])
    with pytest.raises(ValueError, match="combine: expected one of"):
        SpaceAwareMemory(8, 4, k=2, combine="max")
