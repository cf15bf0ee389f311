"""One call of every op, for what must hold of all of them: graphs, streams, repeats, compilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from where import HAS_GPU, each_backend, has_kernels, sized

import memad_fast


@dataclass(frozen=True)
class Call:
    """A function of tensors that all lie on one device."""

    ops: tuple[str, ...]
    """The ops that must have kernels."""
    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    """Fresh ones on the CPU, from torch's generator."""
    leaves: tuple[int, ...] = ()
    """Positions of the inputs that get gradients."""


def random_rows(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs of these shapes."""
    return lambda: tuple(torch.randn(shape).to(dtype) for shape in shapes)


def _with(make: Callable[[], tuple[Tensor, ...]], *more: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*make(), *(value() for value in more))


def _seed() -> Tensor:
    return torch.randint(-(2**62), 2**62, ())


def write_ring(
    keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor
) -> tuple[Tensor, ...]:
    """The ring after the write."""
    memad_fast.fifo_write_(keys, values, cursor, new_keys, new_values)
    return keys.clone(), values.clone(), cursor.clone()


N, M = sized((300, 1000), (20, 70))
_SEARCH = ("nearest_keys",)

CALLS: dict[str, Call] = {
    "nearest_keys": Call(
        _SEARCH, lambda q, keys: memad_fast.nearest_keys(q, keys), random_rows((N, 64), (M, 64)), leaves=(0, 1)
    ),
    "nearest_keys k=3 cosine bfloat16": Call(
        _SEARCH,
        lambda q, keys: memad_fast.nearest_keys(q, keys, 3, metric="cosine"),
        random_rows((N, 64), (M, 64), dtype=torch.bfloat16),
        leaves=(0, 1),
    ),
    "nearest_keys few queries": Call(_SEARCH, memad_fast.nearest_keys, random_rows((2, 64), (sized(50_000, 70), 64))),
    "prepare_keys": Call(
        ("nearest_keys", "prepare_keys"),
        lambda q, keys: memad_fast.nearest_keys(q, memad_fast.prepare_keys(keys)),
        random_rows((N, 64), (M, 64)),
    ),
    "nearest_keys_stats": Call(("nearest_keys_stats",), memad_fast.nearest_keys_stats, random_rows((N, 64), (M, 64))),
    "stcm_lookup": Call(
        ("stcm_lookup",), memad_fast.stcm_lookup, random_rows((N, 64), (M, 64), (M, 33)), leaves=(0, 1, 2)
    ),
    "stcm_lookup filled": Call(
        ("stcm_lookup",),
        lambda q, keys, values, filled: memad_fast.stcm_lookup(q, keys, values, filled=filled),
        _with(random_rows((N, 64), (M, 64), (M, 33)), lambda: torch.randint(1, M, ())),
    ),
    "fifo_write_": Call(
        ("fifo_write_",),
        write_ring,
        lambda: (*random_rows((M, 64), (M, 33))(), torch.randint(0, M, ()), *random_rows((N, 64), (N, 33))()),
    ),
    "bank_attention": Call(
        ("bank_attention",),
        lambda q, bank: memad_fast.bank_attention(q, bank, threshold=0.02),
        random_rows((3, 4, sized(100, 9), 64), (4, 50, 64)),
        leaves=(0, 1),
    ),
    "bank_attention hard dot float16": Call(
        ("bank_attention",),
        lambda q, bank: memad_fast.bank_attention(
            q, bank, threshold=0.02, shrink="hard", renormalize=True, similarity="dot", temperature=9.0
        ),
        random_rows((3, 4, sized(100, 9), 64), (4, 50, 64), dtype=torch.float16),
        leaves=(0, 1),
    ),
    "bank_attention_stats": Call(
        ("bank_attention_stats",),
        lambda q, bank: memad_fast.bank_attention_stats(q, bank, threshold=0.02),
        random_rows((3, 4, sized(100, 9), 64), (4, 50, 64)),
    ),
    **{
        f"gumbel_topk {combine}": Call(
            ("gumbel_topk",),
            lambda q, memory, seed, combine=combine: memad_fast.gumbel_topk(q, memory, 5, seed=seed, combine=combine),
            _with(random_rows((N, 64), (M, 64)), _seed),
            leaves=(0, 1),
        )
        for combine in ("sum", "softmax", "straight_through")
    },
    "histogram_correction": Call(
        ("histogram_correction",),
        memad_fast.histogram_correction,
        lambda: (torch.randn(4, sized(90_000, 500)).abs(),),
        leaves=(0,),
    ),
    "ssim_loss": Call(("ssim_loss",), memad_fast.ssim_loss, lambda: tuple(torch.rand(2, 2, 3, 40, 90)), leaves=(0, 1)),
    "ssim_map same": Call(
        ("ssim_map",),
        lambda x, y: memad_fast.ssim_map(x, y, padding="same"),
        lambda: tuple(torch.rand(2, 2, 3, 40, 90).half()),
        leaves=(0, 1),
    ),
}

each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def _by_each_backend() -> pytest.MarkDecorator:
    """Every call by every backend that has its ops."""
    cases = []
    for name, call in CALLS.items():
        mark = each_backend(*call.ops)
        cases += [
            pytest.param(call, *backend.values, marks=backend.marks, id=f"{name}-{backend.values[0]}")
            for backend in mark.args[1]
        ]
    return pytest.mark.parametrize(("call", "backend"), cases, indirect=["backend"])


each_call_by_each_backend = _by_each_backend()


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def outputs(call: Call, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return as_tuple(call.function(*inputs))


def outputs_and_gradients(call: Call, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results, and the gradients of the leaves for fixed gradients of the results."""
    inputs = tuple(
        value.detach().requires_grad_() if at in call.leaves else value.detach() for at, value in enumerate(inputs)
    )
    results = as_tuple(call.function(*inputs))
    if not call.leaves:
        return results
    differentiable = [result for result in results if result.requires_grad]
    upstream = [torch.full_like(result, 0.5) for result in differentiable]
    leaves = [inputs[at] for at in call.leaves]
    return (*(result.detach() for result in results), *torch.autograd.grad(differentiable, leaves, upstream))


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def is_served(call: Call) -> bool:
    """Whether the backend that the device picks has the call's ops."""
    return not HAS_GPU or any(has_kernels(backend, *call.ops) for backend in ("cuda", "triton"))
