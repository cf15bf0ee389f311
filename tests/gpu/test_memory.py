"""What a call takes of the GPU's memory, and offsets beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from where import DEVICE, each_backend, needs_gpu

import memad_fast

pytestmark = needs_gpu

MIB = 2**20


def growth(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest growth during a second call, and of the results it leaves."""
    function()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = function()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del results
    return peak - before, after - before


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


@each_backend("nearest_keys", "prepare_keys")
@pytest.mark.parametrize("k", [1, 3])
def test_no_matrix_of_queries_by_keys(backend: str, k: int) -> None:
    """200,000 x 20,000 scores would take 16 GB. Beyond the results: 64 MiB, and packed keys if none are given."""
    query, keys = rows(200_000, 64), rows(20_000, 64)
    prepared = memad_fast.prepare_keys(keys)
    peak, left = growth(lambda: memad_fast.nearest_keys(query, prepared, k))
    assert peak - left < 64 * MIB + 64 * k * len(query)
    peak, left = growth(lambda: memad_fast.nearest_keys(query, keys, k))
    assert peak - left < 64 * MIB + 64 * k * len(query) + 2 * prepared.nbytes


@each_backend("stcm_lookup")
def test_a_lookup_takes_no_more_than_its_search(backend: str) -> None:
    query, keys, values = rows(200_000, 64), rows(20_000, 64), rows(20_000, 64)
    peak, left = growth(lambda: memad_fast.stcm_lookup(query, keys, values))
    assert peak - left < 64 * MIB + 64 * len(query) + 4 * keys.numel()


@each_backend("bank_attention")
def test_no_weights_of_a_bank_are_stored(backend: str) -> None:
    """The weights would take 1,600 MB. Backward: the two gradients, partial ones of the bank, and tiles."""
    query, bank = rows(200, 8, 512, 32).requires_grad_(), rows(8, 500, 32).requires_grad_()
    size = query.numel() * 4
    peak, left = growth(lambda: memad_fast.bank_attention(query.detach(), bank.detach(), threshold=0.002))
    assert left < size + MIB
    assert peak - left < 8 * MIB
    read = memad_fast.bank_attention(query, bank, threshold=0.002)
    upstream = torch.ones_like(read)
    peak, _ = growth(lambda: torch.autograd.grad(read, (query, bank), upstream, retain_graph=True))
    assert peak < size + 64 * MIB


@each_backend("gumbel_topk")
@pytest.mark.parametrize("combine", ["sum", "softmax", "straight_through"])
def test_no_matrix_of_scores(backend: str, combine: str) -> None:
    """60,000 x 30,000 scores would take 7.2 GB."""
    query, memory = rows(60_000, 64).requires_grad_(), rows(30_000, 64).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        read, _, scores = memad_fast.gumbel_topk(query, memory, 5, seed=1, combine=combine)
        return torch.autograd.grad(read.sum() + scores.sum(), (query, memory))

    peak, _ = growth(step)
    assert peak < 512 * MIB


@each_backend("histogram_correction")
def test_a_correction_takes_its_results(backend: str) -> None:
    error = rows(16, 2048, 2048).abs_()
    peak, left = growth(lambda: memad_fast.histogram_correction(error))
    assert left < error.numel() * 4 + MIB
    assert peak - left < 8 * MIB


@each_backend("ssim_loss")
def test_nothing_of_the_size_of_an_image_is_stored(backend: str) -> None:
    x, y = rows(8, 3, 1024, 1024).abs_().requires_grad_(), rows(8, 3, 1024, 1024).abs_()
    size = x.numel() * 4
    with torch.no_grad():
        peak, _ = growth(lambda: memad_fast.ssim_loss(x, y))
    assert peak < 8 * MIB
    loss = memad_fast.ssim_loss(x, y)
    peak, _ = growth(lambda: torch.autograd.grad(loss, x, retain_graph=True))
    derivatives = 256 * MIB if backend == "triton" else 0  # of a part of the batch at a time
    assert peak < 2 * size + derivatives + 16 * MIB


# --- offsets beyond 2^31 elements -------------------------------------------------------------------------------

LARGE = 2**31


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory on the device, there are {free:.1f}")


@pytest.fixture(autouse=True)
def _give_back():
    yield
    torch.cuda.empty_cache()


@each_backend("nearest_keys", "prepare_keys")
def test_many_queries(backend: str) -> None:
    needs_memory(20)
    count, dim = LARGE // 64 + 1000, 64
    query = torch.empty(count, dim, dtype=torch.float16, device=DEVICE).normal_()
    keys = rows(40, dim, dtype=torch.float16)
    distances, indices = memad_fast.nearest_keys(query, memad_fast.prepare_keys(keys))
    for part in (slice(0, 500), slice(count // 2, count // 2 + 500), slice(count - 1500, count)):
        expected = memad_fast.nearest_keys(query[part].clone(), keys)
        assert torch.equal(indices[part], expected[1])
        assert torch.equal(distances[part], expected[0])


@each_backend("nearest_keys", "prepare_keys")
@pytest.mark.parametrize("k", [1, 2])
def test_many_keys(backend: str, k: int) -> None:
    needs_memory(24)
    count, dim = LARGE // 64 + 1000, 64
    keys = torch.empty(count, dim, dtype=torch.float16, device=DEVICE).normal_()
    places = torch.tensor([0, 77, count // 2, LARGE // 64 + 3, count - 1], device=DEVICE)
    query = keys[places] + 0.01 * rows(5, dim, dtype=torch.float16)
    for searched in (keys, memad_fast.prepare_keys(keys)):
        assert torch.equal(memad_fast.nearest_keys(query, searched, k)[1][:, 0], places)


@each_backend("nearest_keys")
def test_rows_far_apart(backend: str) -> None:
    """Two keys of one tensor 2^31 elements apart."""
    needs_memory(5)
    storage = torch.zeros(LARGE + 64, dtype=torch.float16, device=DEVICE)
    keys = storage.as_strided((2, 64), (LARGE, 1))
    keys.copy_(rows(2, 64, dtype=torch.float16))
    distances, indices = memad_fast.nearest_keys(keys[1:].expand(40, 64), keys, 2)
    assert indices.tolist() == [[1, 0]] * 40
    assert torch.equal(distances, memad_fast.nearest_keys(keys[1:].expand(40, 64), keys.clone(), 2)[0])


@each_backend("bank_attention", "bank_attention_backward")
def test_many_rows_of_a_bank(backend: str) -> None:
    needs_memory(24)
    batch, partitions, channels, dim = LARGE // (4 * 64 * 64) + 2, 4, 64, 64
    query = torch.empty(batch, partitions, channels, dim, dtype=torch.float16, device=DEVICE).normal_()
    bank = rows(partitions, 30, dim, dtype=torch.float16)
    read = memad_fast.bank_attention(query, bank, threshold=1 / 30)
    for part in (slice(0, 2), slice(batch - 3, batch)):
        assert torch.equal(read[part], memad_fast.bank_attention(query[part].clone(), bank, threshold=1 / 30))
    leaf = query.requires_grad_()
    result = memad_fast.bank_attention(leaf, bank, threshold=1 / 30)
    (grad,) = torch.autograd.grad(result, leaf, read)
    last = query.detach()[-2:].clone().requires_grad_()
    (expected,) = torch.autograd.grad(memad_fast.bank_attention(last, bank, threshold=1 / 30), last, read[-2:])
    assert torch.equal(grad[-2:], expected)


@each_backend("gumbel_topk")
def test_many_queries_of_a_top_k(backend: str) -> None:
    needs_memory(20)
    count, dim = LARGE // 64 + 1000, 64
    query = torch.empty(count, dim, dtype=torch.float16, device=DEVICE).normal_()
    memory = rows(20, dim, dtype=torch.float16)
    read, indices, scores = memad_fast.gumbel_topk(query, memory, 2, noise=False)
    for part in (slice(0, 500), slice(count - 1500, count)):
        expected = memad_fast.gumbel_topk(query[part].clone(), memory, 2, noise=False)
        for got, want in zip((read[part], indices[part], scores[part]), expected, strict=True):
            assert torch.equal(got, want)


@each_backend("histogram_correction", "histogram_correction_backward")
def test_an_image_of_more_pixels(backend: str) -> None:
    """Small integers, so that mu and the score are known: of one image beyond 2^31 pixels, and of one behind it."""
    needs_memory(32)
    pixels = LARGE + 5
    error = torch.ones(1, pixels, dtype=torch.float16, device=DEVICE)
    error[0, -3:] = 9.0
    error[0, : pixels // 4] = 0.0
    corrected, mu, score = memad_fast.histogram_correction(error, 0.5)
    count = pixels // 2
    expected = (count - pixels // 4) / count
    assert mu.item() == pytest.approx(expected, rel=1e-6)
    assert corrected[0, -3:].tolist() == [torch.tensor(9.0 - mu.item()).half().item()] * 3
    step = torch.tensor(1.0 - mu.item()).half().item()
    assert corrected[0, -4].item() == step
    assert score.item() == pytest.approx((pixels - pixels // 4 - 3) * step + 3 * (9.0 - expected), rel=1e-3)


@each_backend("histogram_correction")
def test_many_images(backend: str) -> None:
    needs_memory(24)
    batch, pixels = LARGE // 2**20 + 1, 2**20
    error = torch.empty(batch, pixels, dtype=torch.float16, device=DEVICE).normal_().abs_()
    whole = memad_fast.histogram_correction(error, 0.5)
    last = memad_fast.histogram_correction(error[-1:].clone(), 0.5)
    for got, want in zip(whole, last, strict=True):
        assert torch.equal(got[-1:], want)


@each_backend("ssim_map", "ssim_map_backward")
def test_many_images_of_ssim(backend: str) -> None:
    needs_memory(32)
    batch = LARGE // 2**20 + 1
    x = torch.empty(batch, 1, 1024, 1024, dtype=torch.float16, device=DEVICE).uniform_()
    y = (x + 0.1).clamp_(0, 1)
    whole = memad_fast.ssim_map(x, y)
    assert torch.equal(whole[-1:], memad_fast.ssim_map(x[-1:].clone(), y[-1:].clone()))
    del whole
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(memad_fast.ssim_loss(leaf, y), leaf)
    assert grad[-1].isfinite().all()
    assert grad[-1].ne(0).any()


@each_backend("fifo_write_")
def test_a_ring_of_more_elements(backend: str) -> None:
    needs_memory(12)
    slots, dim = LARGE // 64 + 1000, 64
    keys = torch.zeros(slots, dim, dtype=torch.float16, device=DEVICE)
    values, cursor = torch.zeros(slots, 1, device=DEVICE), torch.tensor(slots - 700, device=DEVICE)
    new_keys, new_values = rows(900, dim, dtype=torch.float16), rows(900, 1)
    memad_fast.fifo_write_(keys, values, cursor, new_keys, new_values)
    assert torch.equal(keys[-700:], new_keys[:700])
    assert torch.equal(keys[:200], new_keys[700:])
    assert torch.equal(values[-700:], new_values[:700])
    assert not keys[200:-700].any()
    assert cursor.item() == 200
