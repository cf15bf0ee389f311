"""What ``define`` and ``call`` add to every op: changes are counted, and calls past autograd are the same calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from memad_fast.ops import fifo_write_, nearest_keys

OPS = torch.ops.memad_fast


def ring() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.zeros(3, 2), torch.zeros(3, 1), torch.tensor(0), torch.ones(1, 2), torch.ones(1, 1)


def test_a_direct_call_of_a_writing_op_counts_as_a_change_of_what_it_writes() -> None:
    arguments = ring()
    OPS.fifo_write_(*arguments)
    assert [x._version for x in arguments] == [1, 1, 1, 0, 0]
    keys = torch.ones(2, 3)
    packed = OPS.prepare_keys(keys, "l2")
    OPS.prepare_keys_rows_(packed, keys, torch.tensor([1]), "l2")
    assert packed._version == 1
    assert keys._version == 0


def test_a_backward_that_needs_what_a_direct_call_overwrote_is_an_error() -> None:
    arguments = ring()
    read = (arguments[0] * torch.ones(2, requires_grad=True)).sum()
    OPS.fifo_write_(*arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.backward()


def test_inference_tensors_are_written_without_a_count() -> None:
    with torch.inference_mode():
        keys = torch.zeros(3, 2)
    _, *others = ring()
    OPS.fifo_write_(keys, *others)
    assert keys[0].tolist() == [1, 1]
    assert others[0]._version == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_write_of_rows_that_want_a_gradient_is_not_recorded(compiled: bool) -> None:
    torch._dynamo.reset()
    keys, values, cursor, new_keys, new_values = ring()
    new_keys.requires_grad_()

    def write(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> Tensor:
        fifo_write_(keys, values, cursor, new_keys, new_values)
        return (new_keys * 3).sum()

    if compiled:
        write = torch.compile(write, fullgraph=True)
    write(keys, values, cursor, new_keys, new_values).backward()
    assert keys[0].tolist() == [1, 1]
    assert not keys.requires_grad
    assert new_keys.grad is not None
    assert new_keys.grad.tolist() == [[3, 3]]


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_tracing_records_the_op_whether_or_not_a_gradient_is_wanted(wants_gradient: bool) -> None:
    query, keys = torch.randn(2, 3, requires_grad=wants_gradient), torch.randn(4, 3)
    graph = make_fx(lambda query, keys: nearest_keys(query, keys))(query, keys)
    assert OPS.nearest_keys.default in [node.target for node in graph.graph.nodes]
