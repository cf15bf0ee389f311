"""What holds of every op on the GPU: the same bits again, no waiting, graphs, streams, devices, compilers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from calls import (
    CALLS,
    Call,
    assert_same,
    each_call,
    each_call_by_each_backend,
    is_served,
    outputs,
    outputs_and_gradients,
)
from torch import Tensor
from where import DEVICE, HAS_GPU, has_kernels, needs_gpu

import memad_fast
from memad_fast import _triton

OPS = [name.removeprefix("memad_fast::") for name in torch._C._dispatch_get_all_op_names() if "memad_fast::" in name]

# A GPU's backends compose what these do of other ops.
COMPOSED = ("nearest_keys_merge_", "prepare_keys_with_room")


@needs_gpu
@pytest.mark.parametrize("op", [op for op in OPS if op not in COMPOSED])
def test_it_is_served_on_a_gpu(op: str) -> None:
    """By C++ or by Triton; else every call of it on a GPU is an error."""
    assert has_kernels("triton", op) or has_kernels("cuda", op)


@needs_gpu
def test_both_backends_are_there() -> None:
    for name in ("triton", "cuda"):
        row = memad_fast.backends()[name]
        assert row.available, f"{row.reason}; {row.fix}"
    assert _triton.ON_GPU


def on_device(call: Call, device: str = DEVICE) -> tuple[Tensor, ...]:
    return tuple(value.to(device) for value in call.inputs())


@each_call_by_each_backend
def test_repeats_give_the_same_bits(call: Call, backend: str) -> None:
    inputs = on_device(call)
    first = outputs_and_gradients(call, tuple(value.clone() for value in inputs))
    for _ in range(4):
        assert_same(outputs_and_gradients(call, tuple(value.clone() for value in inputs)), first)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error."""
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("default")


@each_call_by_each_backend
def test_nothing_waits_for_the_device(call: Call, backend: str) -> None:
    inputs = on_device(call)
    outputs_and_gradients(call, inputs)  # loads and compiles
    with no_waiting():
        outputs_and_gradients(call, inputs)


@needs_gpu
@each_call_by_each_backend
def test_a_captured_graph_replays_with_new_contents(call: Call, backend: str) -> None:
    """Forward and backward in one graph; the inputs are overwritten between replays."""
    inputs = on_device(call)
    originals = tuple(value.clone() for value in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            outputs_and_gradients(call, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = outputs_and_gradients(call, inputs)
    for contents in (originals, on_device(call), on_device(call), tuple(torch.zeros_like(x) for x in inputs)):
        for value, content in zip(inputs, contents, strict=True):
            value.copy_(content)
        graph.replay()
        replayed = tuple(result.clone() for result in results)
        assert_same(replayed, outputs_and_gradients(call, tuple(content.clone() for content in contents)))


@needs_gpu
@each_call_by_each_backend
def test_it_runs_on_the_current_stream(call: Call, backend: str) -> None:
    """The inputs arrive on a side stream after a long wait: work on another stream would not see them."""
    contents = on_device(call)
    expected = outputs_and_gradients(call, tuple(content.clone() for content in contents))
    inputs = tuple(torch.zeros_like(content) for content in contents)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for value, content in zip(inputs, contents, strict=True):
            value.copy_(content)
        got = outputs_and_gradients(call, inputs)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_call_by_each_backend
def test_it_runs_on_the_device_of_its_tensors(call: Call, backend: str) -> None:
    contents = call.inputs()
    first = outputs_and_gradients(call, tuple(content.to("cuda:0") for content in contents))
    second = outputs_and_gradients(call, tuple(content.to("cuda:1") for content in contents))
    assert {result.device.index for result in second} == {1}
    assert torch.cuda.current_device() == 0
    assert_same(tuple(result.to("cuda:0") for result in second), first)


@each_call_by_each_backend
def test_autocast_changes_nothing(call: Call, backend: str) -> None:
    """The ops say themselves in what they accumulate; autocast neither lowers nor raises it."""
    inputs = on_device(call)
    expected = outputs_and_gradients(call, tuple(value.clone() for value in inputs))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same(outputs_and_gradients(call, tuple(value.clone() for value in inputs)), expected)


@each_call
def test_it_compiles_to_one_graph_that_replays(call: Call) -> None:
    """reduce-overhead captures CUDA graphs: the third call and later ones replay them, with the inputs of each call."""
    if not is_served(call):
        pytest.skip("no backend has a kernel for it")
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        inputs = on_device(call)
        expected = outputs(call, tuple(value.clone() for value in inputs))
        if HAS_GPU:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            got = compiled(*inputs)
        got = tuple(value.clone() for value in ((got,) if isinstance(got, Tensor) else got))
        assert_same(got, expected)


@pytest.mark.parametrize("name", ["nearest_keys", "bank_attention", "histogram_correction", "ssim_loss"])
def test_a_compiled_training_step_has_the_eager_gradients(name: str) -> None:
    call = CALLS[name]
    if not is_served(call):
        pytest.skip("no backend has a kernel for it")
    torch._dynamo.reset()
    inputs = on_device(call)

    def loss(*leaves: Tensor) -> Tensor:
        result = call.function(*leaves)
        return (result if isinstance(result, Tensor) else result[0]).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = tuple(value.detach().clone().requires_grad_() for value in inputs)
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def _opcheck_arguments() -> dict[str, tuple]:
    """Of every op that a user can reach through ``torch.ops``."""
    query, keys, values = (torch.randn(shape, device=DEVICE) for shape in ((9, 5), (8, 5), (8, 7)))
    attended, bank = torch.randn(2, 3, 5, 4, device=DEVICE), torch.randn(3, 6, 4, device=DEVICE)
    images = torch.rand(2, 2, 1, 12, 13, device=DEVICE)
    indices = torch.randint(0, 8, (9, 2), device=DEVICE)
    ranks = torch.full((9, 2), 1e9, dtype=torch.float64, device=DEVICE)
    options = (0.2, "soft", True, "cosine", 0.9)
    seed, window = torch.tensor(3, device=DEVICE), (11, 1.5, 1.0, False)
    error = torch.randn(2, 15, device=DEVICE).abs()
    scalars = torch.randn(2, device=DEVICE)
    return {
        "nearest_keys": (query, keys, None, 2, "ip"),
        "nearest_keys_stats": (query, keys, None, 2, "l2"),
        "nearest_keys_backward_query": (torch.randn(9, 2, device=DEVICE), query, keys, indices, "l2"),
        "nearest_keys_backward_keys": (torch.randn(9, 2, device=DEVICE), query, keys, indices, "cosine"),
        "nearest_keys_merge_": (ranks, indices, query, keys, None, 1, 8, 5, "l2"),
        "prepare_keys": (keys, "l2"),
        "prepare_keys_with_room": (keys, 70, "l2"),
        "prepare_keys_rows_": ("packed", keys, torch.tensor([3, 7], device=DEVICE), "l2"),
        "stcm_lookup": (query, keys, values, None, torch.tensor(5, device=DEVICE)),
        "stcm_lookup_backward_values": (torch.randn(9, 7, device=DEVICE), values, indices[:, 0]),
        "fifo_write_": (keys.clone(), values.clone(), seed.clone(), query, torch.randn(9, 7, device=DEVICE)),
        "bank_attention": (attended, bank, *options),
        "bank_attention_backward": (torch.randn_like(attended), attended, bank, *options),
        "bank_attention_stats": (attended, bank, 0.2, "soft", "cosine", 0.9),
        "gumbel_topk": (query, keys, 3, 0.9, seed, "straight_through"),
        "gumbel_topk_backward": (
            torch.randn_like(query), torch.randn(9, 2, device=DEVICE), query, keys, 0.9, seed, "softmax", indices,
            torch.randn(9, 2, device=DEVICE),
        ),
        "histogram_correction": (error, 0.5),
        "histogram_correction_backward": (torch.randn_like(error), scalars, scalars, error, scalars, 0.5),
        "ssim_map": (*images, *window),
        "ssim_loss": (*images, *window),
        "ssim_map_backward": (torch.randn(2, 1, 2, 3, device=DEVICE), *images, *window),
        "ssim_loss_backward": (torch.randn((), device=DEVICE), *images, *window),
    }  # fmt: skip


DIFFERENTIABLE = {
    "nearest_keys", "stcm_lookup", "bank_attention", "gumbel_topk", "histogram_correction", "ssim_map", "ssim_loss",
}  # fmt: skip


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    if HAS_GPU and not (has_kernels("cuda", op) or has_kernels("triton", op)):
        pytest.skip("no backend has a kernel for it")
    arguments = _opcheck_arguments()[op]
    if op == "prepare_keys_rows_":
        arguments = (torch.ops.memad_fast.prepare_keys(arguments[1], "l2"), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.memad_fast, op).default, arguments)
    if op in DIFFERENTIABLE:
        torch.library.opcheck(
            getattr(torch.ops.memad_fast, op).default,
            tuple(value.requires_grad_() if _is_float(value) else value for value in arguments),
        )
