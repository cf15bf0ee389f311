"""The model of CUDA does what a device does, and shows the mistakes that it is for."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_model.build import CSRC, ORDERS, Model, at_end_of_page, model, needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def kernels() -> Model:
    return model(HERE / "test_model.cu")


@pytest.fixture(params=ORDERS)
def in_order(request: pytest.FixtureRequest, kernels: Model) -> Model:
    kernels.set_order(request.param)
    return kernels


def wrong_in_some_order(kernels: Model, compute: object, expected: np.ndarray) -> bool:
    wrong = False
    for order in ORDERS:
        kernels.set_order(order)
        wrong |= not np.array_equal(compute(), expected)
    return wrong


def test_blocks_and_threads(in_order: Model) -> None:
    out = np.zeros((3, 64), np.int32)
    in_order.call("turn_around_", out, 3, 64, 1)
    assert np.array_equal(out, np.tile(np.arange(63, -1, -1), (3, 1)))


@pytest.mark.parametrize("barrier", [False, True])
def test_a_missing_barrier_before_reading_shows(kernels: Model, barrier: bool) -> None:
    def compute() -> np.ndarray:
        out = np.zeros(64, np.int32)
        kernels.call("turn_around_", out, 1, 64, int(barrier))
        return out

    assert wrong_in_some_order(kernels, compute, np.arange(63, -1, -1)) is not barrier


@pytest.mark.parametrize("barrier", [False, True])
def test_a_missing_barrier_before_writing_again_shows(kernels: Model, barrier: bool) -> None:
    def compute() -> np.ndarray:
        out = np.zeros(64, np.int32)
        kernels.call("shift_", out, 5, int(barrier))
        return out

    assert wrong_in_some_order(kernels, compute, (np.arange(64) + 5) % 64) is not barrier


@pytest.mark.parametrize("wait", [False, True])
def test_a_missing_wait_for_a_copy_shows(in_order: Model, wait: bool) -> None:
    values = np.arange(256, dtype=np.int32)
    out = np.zeros_like(values)
    in_order.call("copy_", values, out, int(wait))
    expected = values.reshape(2, 32, 4)[:, ::-1].reshape(-1)
    assert np.array_equal(out[:128], expected[:128])
    assert np.array_equal(out[128:], expected[128:]) is wait


def test_threads_that_wait_forever_are_an_error(in_order: Model) -> None:
    with pytest.raises(RuntimeError, match=r"the mask names a lane that is not there any more|wait for each other"):
        in_order.call("half_a_barrier_")
    with pytest.raises(RuntimeError, match=r"forever: 48 in __syncthreads; 1[56] in __syncwarp|does not name"):
        in_order.call("two_barriers_")
    test_blocks_and_threads(in_order)  # the next launch is not harmed


def test_lanes_exchange_values(in_order: Model) -> None:
    values = np.random.default_rng(0).integers(-100, 100, 64, dtype=np.int32)
    out = np.zeros((64, 12), np.int32)
    in_order.call("of_lanes_", values, out)
    lanes = np.arange(32)
    for warp, rows in zip(values.reshape(2, 32), out.reshape(2, 32, 12), strict=True):
        expected = np.stack(
            [
                warp[(lanes * 7 + 3) % 32],
                np.where(lanes >= 3, warp[lanes - 3], warp),
                np.where(lanes < 27, warp[(lanes + 5) % 32], warp),
                warp[lanes ^ 8],
                np.full(32, bits(warp > 0)),
                np.full(32, 2 * (warp > 90).any() + (warp > -200).all()),
                np.full(32, warp.sum()),
                np.full(32, warp.min()),
                np.array([bits(np.fmod(warp, 3) == np.fmod(value, 3)) for value in warp]),
                np.where(lanes % 2, warp[lanes ^ 2], warp[lanes ^ 4]),
                warp[lanes // 8 * 8 + 1],
                np.full(32, (values > 0).sum()),
            ],
            axis=1,
        )
        assert np.array_equal(rows, expected)


def bits(votes: np.ndarray) -> np.int32:
    return np.packbits(votes, bitorder="little").view(np.int32)[0]


def test_matrix_product_of_bytes(in_order: Model) -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.integers(-128, 128, (rows, 32), dtype=np.int8) for rows in (16, 8))
    out = np.zeros((16, 8), np.int32)
    in_order.call("product_", a, b, out)
    assert np.array_equal(out, a.astype(np.int32) @ b.astype(np.int32).T + 1)


def test_a_cluster_reads_its_neighbours_shared_memory(in_order: Model) -> None:
    out = np.zeros((8, 32), np.int32)
    in_order.call("of_neighbour_", out, 8, 4, 1)
    neighbour = np.arange(8) // 4 * 4 + (np.arange(8) + 1) % 4
    assert np.array_equal(out, 2 * (neighbour[:, None] * 100 + 31 - np.arange(32)))


def test_a_missing_barrier_of_a_cluster_shows(in_order: Model) -> None:
    out = np.zeros((8, 32), np.int32)
    in_order.call("of_neighbour_", out, 8, 4, 0)
    neighbour = np.arange(8) // 4 * 4 + (np.arange(8) + 1) % 4
    assert not np.array_equal(out, 2 * (neighbour[:, None] * 100 + 31 - np.arange(32)))


def test_shared_memory_is_poisoned_for_every_block(in_order: Model) -> None:
    out = np.zeros(4, np.float32)
    in_order.call("poisoned_", out, 4)
    assert np.isnan(out).all()


def test_writing_past_dynamic_shared_memory_shows(kernels: Model) -> None:
    kernels.call("write_at_", 100, 99)
    for at in (100, 101, 355, -1):
        with pytest.raises(RuntimeError, match="outside of the dynamic shared memory"):
            kernels.call("write_at_", 100, at)


def test_accesses_past_the_end_of_device_memory_show(kernels: Model) -> None:
    values = at_end_of_page(torch.arange(50.0))
    copy = at_end_of_page(torch.zeros(50))
    kernels.call("copy_n_", values, copy, 50)
    assert torch.equal(copy, values)
    for other in (torch.zeros(64), copy):
        with pytest.raises(RuntimeError, match=r"thread \(50, 0, 0\).*memory that is not there"):
            kernels.call("copy_n_", values, other, 51)
    with pytest.raises(RuntimeError, match="memory that is not there"):
        kernels.call("copy_n_", torch.zeros(64), copy, 51)


def test_the_instructions_are_those_of_the_sources() -> None:
    """Each function of csrc/cuda/ptx.cuh has its model, with the same parameters."""
    declared = [functions_of(folder / "cuda" / "ptx.cuh") for folder in (CSRC, HERE / "include")]
    assert declared[0]
    assert declared[0] == declared[1]


def functions_of(header: Path) -> set[str]:
    return {
        " ".join(text.split())
        for text in re.findall(r"\b(?:void|\w+_t|int) (\w+\([^)]*(?:\)\[)?[^)]*\)) \{", header.read_text())
    }


def test_a_device_refuses_what_it_cannot_run(kernels: Model) -> None:
    with pytest.raises(RuntimeError, match="a block of 2048 threads"):
        kernels.call("turn_around_", np.zeros(1, np.int32), 1, 2048, 1)
    with pytest.raises(RuntimeError, match="an empty grid"):
        kernels.call("turn_around_", np.zeros(1, np.int32), 0, 64, 1)
    with pytest.raises(RuntimeError, match="clusters of 3 blocks"):
        kernels.call("of_neighbour_", np.zeros((8, 32), np.int32), 8, 3, 1)
    with pytest.raises(RuntimeError, match="300000 bytes of dynamic shared memory"):
        kernels.call("write_at_", 300000, 0)


def test_directed_rounding(kernels: Model) -> None:
    rounded = kernels.library.rounded_
    rounded.argtypes = [ctypes.c_float, ctypes.c_float, ctypes.c_int64]
    rounded.restype = ctypes.c_float
    assert rounded(1.0, 1e-10, 0) == 1.0
    assert rounded(1.0, 1e-10, 1) == np.nextafter(np.float32(1), np.float32(2))
