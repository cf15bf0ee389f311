"""Whole steps of a memory in one CUDA graph: read with prepared keys, write at a cursor on the device, replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from where import DEVICE, HAS_GPU, each_backend, sized

import memad_fast
from memad_fast.memory import StructureTextureMemory

State = dict[str, Tensor]

SLOTS, NEW, DIM = sized((300, 196, 64), (30, 20, 8))


def captured(step: Callable[[], State], state: State) -> Callable[[], State]:
    """``step`` as a graph (as it is on a CPU), with ``state`` as it was before."""
    before = {name: value.clone() for name, value in state.items()}

    def restore() -> None:
        for name, value in before.items():
            state[name].copy_(value)

    if not HAS_GPU:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    restore()

    def replay() -> State:
        graph.replay()
        return results

    return replay


@each_backend("nearest_keys", "prepare_keys", "prepare_keys_rows_", "stcm_lookup", "fifo_write_")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_read_and_write_of_prepared_keys_at_a_cursor(backend: str, metric: str) -> None:
    """Nothing of the step is known on the host: not the cursor, not the rows, not how many slots are filled."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(SLOTS, DIM, generator=generator), torch.randn(SLOTS, 5, generator=generator)
    state = {
        "keys": keys.to(DEVICE), "values": values.to(DEVICE), "cursor": torch.tensor(SLOTS - 30, device=DEVICE),
        "query": torch.zeros(NEW, DIM, device=DEVICE), "new_values": torch.zeros(NEW, 5, device=DEVICE),
    }  # fmt: skip
    state["packed"] = torch.ops.memad_fast.prepare_keys(state["keys"], metric)

    def step() -> State:
        found = torch.ops.memad_fast.nearest_keys(state["query"], state["keys"], state["packed"], 2, metric)
        rows = (state["cursor"] + torch.arange(NEW, device=DEVICE)) % SLOTS
        memad_fast.fifo_write_(state["keys"], state["values"], state["cursor"], state["query"], state["new_values"])
        torch.ops.memad_fast.prepare_keys_rows_(state["packed"], state["keys"], rows, metric)
        return {"distances": found[0], "indices": found[1]}

    run = captured(step, state)
    expected = {"keys": keys.clone(), "values": values.clone(), "cursor": torch.tensor(SLOTS - 30)}
    for number in range(4):
        query = torch.randn(NEW, DIM, generator=generator) * (1 + 10 * number)
        state["query"].copy_(query)
        state["new_values"].fill_(number)
        found = run()
        with memad_fast.use_backend("cpu"):
            want = memad_fast.nearest_keys(query, expected["keys"], 2, metric=metric)
            memad_fast.fifo_write_(*expected.values(), query, torch.full((NEW, 5), float(number)))
        assert torch.equal(found["indices"].cpu(), want[1])
        assert torch.equal(found["distances"].cpu(), want[0])
        for name, value in expected.items():
            assert torch.equal(state[name].cpu(), value)


@each_backend("stcm_lookup", "fifo_write_")
def test_structure_texture_memory(backend: str) -> None:
    """The module's own state is the graph's: cursor and fill count are buffers on the device."""
    memory = StructureTextureMemory(SLOTS, DIM, 5).to(DEVICE)
    twin = StructureTextureMemory(SLOTS, DIM, 5)
    first = torch.randn(9, DIM), torch.randn(9, 5)
    memory.write(*(part.to(DEVICE) for part in first))
    state = {"query": torch.zeros(NEW, DIM, device=DEVICE), "textures": torch.zeros(NEW, 5, device=DEVICE)}

    def step() -> State:
        read, distances, indices = memory(state["query"])
        memory.write(state["query"], state["textures"])
        return {"read": read, "distances": distances, "indices": indices}

    buffers = dict(memory.named_buffers())
    run = captured(step, {**state, **buffers})
    with memad_fast.use_backend("cpu"):
        twin.write(*first)
    for number in range(4):
        query, textures = torch.randn(NEW, DIM), torch.randn(NEW, 5)
        state["query"].copy_(query)
        state["textures"].copy_(textures)
        found = run()
        with memad_fast.use_backend("cpu"):
            want = twin(query)
            twin.write(query, textures)
        for got, expected in zip(found.values(), want, strict=True):
            assert torch.equal(got.cpu(), expected), number
        for name, value in twin.named_buffers():
            assert torch.equal(buffers[name].cpu(), value), name
