"""What one call costs on inputs of a few values: the Python layer of every op, checks included, and torch for scale.

The compiled op alone is called on the CPU key, past autograd and past every check in Python; what the public call takes
longer is the Python layer, which may take 10 µs. A "recorded" call has an input that wants a gradient: it passes
through the Python kernel that ``torch.library.register_autograd`` makes, and has no target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Provider, as_tuple, bare, each_provider, largest_error, ours
from torch import Tensor

import memad_fast
from memad_fast.ops.bank_attention import reference as attention_reference
from memad_fast.ops.bank_attention import reference_stats
from memad_fast.ops.fifo_write_ import reference as write_in_torch
from memad_fast.ops.gumbel_topk import reference as gumbel_reference
from memad_fast.ops.histogram_correction import reference as histogram_reference
from memad_fast.ops.nearest_keys import reference as search_reference
from memad_fast.ops.prepare_keys import PreparedKeys
from memad_fast.ops.ssim import reference as ssim_reference
from memad_fast.ops.stcm_lookup import reference as lookup_reference

LAYER_US = 10.0
SEED = 7

Function = Callable[..., Any]


def compiled_op(name: str, *arguments: Any) -> Any:
    op = getattr(torch.ops.memad_fast, name).default
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)


def for_scale(name: str, function: Function) -> Provider:
    """An op of torch on the same inputs, whose result is another one and not compared."""

    def prepare(*inputs: Any) -> Callable[[], None]:
        def call() -> None:
            function(*inputs)

        return call

    return Provider(f"{name}, for scale", prepare)


def error_where_comparable(got: Any, exact: Any) -> float:
    return float("nan") if got is None else largest_error([x.detach() for x in as_tuple(got)], exact)


def case(
    name: str,
    inputs: Function,
    public: Function,
    alone: Function,
    expected: Function,
    *scale: Any,
    recorded: bool = False,
) -> Case:
    return Case(
        name,
        inputs=inputs,
        providers=[ours(public), bare(alone), *([for_scale(*scale)] if scale else [])],
        expected=expected,
        error=error_where_comparable,
        tolerance=1e-5,
        calls=20,  # less than a time slice: on a busy machine most rounds then run undisturbed
        layer_us=None if recorded else LAYER_US,
    )


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 8), torch.randn(4, 8)


def recorded_rows() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 8, requires_grad=True), torch.randn(4, 8)


def rows_and_prepared() -> tuple[Tensor, PreparedKeys]:
    query, keys = rows()
    return query, memad_fast.prepare_keys(keys)


def rows_and_values() -> tuple[Tensor, Tensor, Tensor]:
    return *rows(), torch.randn(4, 8)


def ring() -> tuple[Tensor, ...]:
    return torch.zeros(4, 8), torch.zeros(4, 8), torch.tensor(0), torch.ones(1, 8), torch.ones(1, 8)


def query_and_bank() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, 8), torch.randn(1, 4, 8)


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 1, 11, 11), torch.rand(1, 1, 11, 11)


def written(write: Function) -> Function:
    """``write`` on a ring, with the ring as its result."""

    def call(*arguments: Any) -> Tensor:
        write(*arguments)
        return arguments[0]

    return call


def overwritten(prepared: PreparedKeys, row: Tensor, new_keys: Tensor) -> Tensor:
    return prepared.overwrite_(row, new_keys).keys


def overwritten_alone(prepared: PreparedKeys, row: Tensor, new_keys: Tensor) -> Tensor:
    prepared.keys.index_copy_(0, row, new_keys)
    compiled_op("prepare_keys_rows_", prepared.packed, prepared.keys, row, "l2")
    return prepared.keys


CASES = [
    case(
        "nearest_keys",
        rows,
        memad_fast.nearest_keys,
        lambda query, keys: compiled_op("nearest_keys", query, keys, None, 1, "l2"),
        lambda query, keys: search_reference(query.double(), keys.double(), 1),
        "torch.cdist",
        torch.cdist,
    ),
    case(
        "nearest_keys, recorded",
        recorded_rows,
        memad_fast.nearest_keys,
        lambda query, keys: compiled_op("nearest_keys", query.detach(), keys, None, 1, "l2"),
        lambda query, keys: search_reference(query.double(), keys.double(), 1),
        "torch.cdist",
        torch.cdist,
        recorded=True,
    ),
    case(
        "nearest_keys, prepared",
        rows_and_prepared,
        memad_fast.nearest_keys,
        lambda query, prepared: compiled_op("nearest_keys", query, prepared.keys, prepared.packed, 1, "l2"),
        lambda query, prepared: search_reference(query.double(), prepared.keys.double(), 1),
    ),
    case(
        "prepare_keys",
        lambda: (torch.randn(4, 8),),
        lambda keys: memad_fast.prepare_keys(keys).keys,
        lambda keys: (compiled_op("prepare_keys", keys, "l2"), keys)[1],
        lambda keys: keys,
    ),
    case(
        "PreparedKeys.overwrite_",
        lambda: (memad_fast.prepare_keys(torch.ones(4, 8)), torch.tensor([2]), torch.ones(1, 8)),
        overwritten,
        overwritten_alone,
        lambda prepared, row, new_keys: prepared.keys.clone(),
        "index_copy_",
        lambda prepared, row, new_keys: prepared.keys.index_copy_(0, row, new_keys),
    ),
    case(
        "stcm_lookup",
        rows_and_values,
        memad_fast.stcm_lookup,
        lambda query, keys, values: compiled_op("stcm_lookup", query, keys, values, None, None),
        lambda query, keys, values: lookup_reference(query.double(), keys.double(), values.double()),
    ),
    case(
        "stcm_lookup, filled=3",
        lambda: (*rows_and_values(), torch.tensor(3)),
        lambda query, keys, values, _: memad_fast.stcm_lookup(query, keys, values, filled=3),
        lambda query, keys, values, filled: compiled_op("stcm_lookup", query, keys, values, None, filled),
        lambda query, keys, values, filled: lookup_reference(query.double(), keys.double(), values.double(), filled),
    ),
    case(
        "fifo_write_",
        ring,
        written(memad_fast.fifo_write_),
        written(lambda *arguments: compiled_op("fifo_write_", *arguments)),
        written(lambda *arguments: write_in_torch(*(x.clone() for x in arguments))),
        "plain torch",
        write_in_torch,
    ),
    case(
        "bank_attention",
        query_and_bank,
        lambda query, bank: memad_fast.bank_attention(query, bank, threshold=0.25),
        lambda query, bank: compiled_op("bank_attention", query, bank, 0.25, "soft", False, "cosine", 1.0),
        lambda query, bank: attention_reference(query.double(), bank.double(), 0.25),
        "torch.bmm",
        lambda query, bank: torch.bmm(query, bank.mT),
    ),
    case(
        "bank_attention_stats",
        query_and_bank,
        lambda query, bank: memad_fast.bank_attention_stats(query, bank, threshold=0.25),
        lambda query, bank: compiled_op("bank_attention_stats", query, bank, 0.25, "soft", "cosine", 1.0),
        lambda query, bank: reference_stats(query.double(), bank.double(), 0.25, "soft", "cosine", 1.0),
    ),
    case(
        "gumbel_topk, noise=False",
        rows,
        lambda query, memory: memad_fast.gumbel_topk(query, memory, 2, noise=False),
        lambda query, memory: compiled_op("gumbel_topk", query, memory, 2, 1.0, None, "sum"),
        lambda query, memory: gumbel_reference(query.double(), memory.double(), 2, 1.0, None, "sum"),
        "torch.topk",
        lambda query, memory: torch.topk(query, 2),
    ),
    case(
        "gumbel_topk, seed=7",
        lambda: (*rows(), torch.tensor(SEED)),
        lambda query, memory, _: memad_fast.gumbel_topk(query, memory, 2, seed=SEED),
        lambda query, memory, seed: compiled_op("gumbel_topk", query, memory, 2, 1.0, seed, "sum"),
        lambda query, memory, seed: gumbel_reference(query.double(), memory.double(), 2, 1.0, seed, "sum"),
    ),
    case(
        "histogram_correction",
        lambda: (torch.rand(1, 16),),
        memad_fast.histogram_correction,
        lambda error: compiled_op("histogram_correction", error, 0.5),
        lambda error: histogram_reference(error.double()),
        "torch.sort",
        torch.sort,
    ),
    case(
        "ssim_loss",
        images,
        memad_fast.ssim_loss,
        lambda x, y: compiled_op("ssim_loss", x, y, 11, 1.5, 1.0, False),
        lambda x, y: (1 - ssim_reference(x.double(), y.double())).mean(),
        "F.mse_loss",
        torch.nn.functional.mse_loss,
    ),
    case(
        "ssim_map",
        images,
        memad_fast.ssim_map,
        lambda x, y: compiled_op("ssim_map", x, y, 11, 1.5, 1.0, False),
        lambda x, y: ssim_reference(x.double(), y.double()),
    ),
]


@each_provider(CASES)
def bench_latency(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
