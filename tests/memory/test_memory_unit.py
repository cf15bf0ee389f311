"""MemoryUnit against MemAE's read written out, and its contract."""

from __future__ import annotations

import pytest
import torch
from devices import NothingWaits
from torch.nn import functional

from memad_fast.memory import MemoryUnit


def _read_by_hand(rows: torch.Tensor, items: torch.Tensor, threshold: float) -> torch.Tensor:
    """softmax, keep what is above the threshold, L1-normalise; in float64."""
    weights = (rows.double() @ items.double().T).softmax(dim=1)
    kept = torch.where(weights > threshold, weights, 0.0)
    return functional.normalize(kept, p=1, dim=1) @ items.double()


def test_rows_are_read_as_memae_reads_them() -> None:
    unit = MemoryUnit(items=300, dim=16)
    rows = 3 * torch.randn(20, 16)
    expected = _read_by_hand(rows, unit.weight, 0.0025)
    torch.testing.assert_close(unit(rows).double(), expected, rtol=1e-5, atol=1e-6)


def test_every_pixel_of_a_map_is_a_row() -> None:
    unit = MemoryUnit(items=300, dim=16)
    features = 3 * torch.randn(2, 16, 5, 3)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 16)
    expected = unit(rows).reshape(2, 5, 3, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(unit(features), expected, rtol=1e-6, atol=1e-7)


def test_a_block_is_read_as_one_row_across_all_channels() -> None:
    unit = MemoryUnit(items=30, dim=3 * 4, block=2)
    features = torch.randn(2, 3, 4, 6)
    read = unit(features)
    rows = features[:, :, 2:4, 4:6].flatten(1)
    torch.testing.assert_close(read[:, :, 2:4, 4:6].flatten(1), unit(rows), rtol=1e-6, atol=1e-7)


def test_features_and_items_get_gradients() -> None:
    unit = MemoryUnit(items=30, dim=4)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    unit(features).square().sum().backward()
    assert features.grad is not None
    assert unit.weight.grad is not None
    assert features.grad.abs().sum() > 0
    assert unit.weight.grad.abs().sum() > 0


def test_a_threshold_that_no_weight_passes_gives_dead_rows() -> None:
    unit = MemoryUnit(items=4, dim=2, threshold=0.99)
    rows = 0.01 * torch.randn(6, 2)
    assert torch.count_nonzero(unit(rows)) == 0
    assert float(unit.stats(rows).dead_share.max()) == 1.0


def test_items_start_uniform_within_one_over_root_dim() -> None:
    weight = MemoryUnit(items=500, dim=16).weight.detach()
    assert float(weight.abs().max()) <= 0.25
    assert float(weight.std()) == pytest.approx(0.25 / 3**0.5, rel=0.05)


def test_state_dict_is_that_of_memae() -> None:
    unit, copy = MemoryUnit(items=30, dim=4), MemoryUnit(items=30, dim=4)
    assert {name: tuple(value.shape) for name, value in unit.state_dict().items()} == {"weight": (30, 4)}
    copy.load_state_dict(unit.state_dict())
    rows = torch.randn(6, 4)
    assert torch.equal(copy(rows), unit(rows))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 4, H, W\] or \[N, 4\], got \[2, 5\]"):
        MemoryUnit(items=3, dim=4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="must divide by block 2"):
        MemoryUnit(items=3, dim=4, block=2)(torch.randn(1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"dim: expected a positive multiple of block² = 4, got 6"):
        MemoryUnit(items=3, dim=6, block=2)
    with pytest.raises(ValueError, match="items"):
        MemoryUnit(items=0, dim=6)


@pytest.mark.parametrize("shape", [(2, 12, 4, 6), (5, 48)])
def test_nothing_waits_for_the_device(shape: tuple[int, ...]) -> None:
    unit = MemoryUnit(items=30, dim=48, block=2)
    with NothingWaits():
        unit(torch.randn(shape, requires_grad=True)).sum().backward()
        unit.stats(torch.randn(shape))


def test_a_read_and_its_gradient_compile_as_one_graph() -> None:
    unit = MemoryUnit(items=30, dim=48, block=2)
    features = torch.randn(2, 12, 4, 6)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")  # seconds sooner than C++
    grads = []
    for read in (unit, compiled):
        grads.append(torch.autograd.grad(read(features).square().sum(), unit.weight)[0])
        assert torch.equal(read(features), unit(features))
    torch.testing.assert_close(*grads)


def test_features_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="bank: expected device meta like query, got cpu"):
        MemoryUnit(items=30, dim=48)(torch.ones(2, 48, device="meta"))
