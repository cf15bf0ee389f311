"""The noise: Philox4x32-10 as published, logarithms within 1 ulp, and one value per (seed, row, column)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memad_fast import _noise

# Random123's known-answer vectors for philox4x32-10 (kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def ulps(got: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Largest error of float32 values in units of the spacing of float32 at ``scale``."""
    spacing = 2.0 ** (torch.floor(torch.log2(scale.abs())) - 23)
    return ((got.double() - exact).abs() / spacing).max().item()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    got = _noise.philox4x32(tuple(map(torch.tensor, counter)), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(word.item() for word in got) == words


def test_logarithm_is_within_one_ulp_of_float64() -> None:
    everywhere = torch.exp2(torch.rand(200_000) * 60 - 30)
    near_one = 1.0 + (torch.arange(-50_000, 50_000) * 2.0**-23)
    for x in (everywhere, near_one[near_one != 1.0]):
        exact = x.double().log()
        assert ulps(_noise.log(x), exact, exact) < 1.0
    assert _noise.log(torch.ones(1)).item() == 0.0


def test_every_possible_noise_value_is_close_to_float64_and_finite() -> None:
    odd = torch.arange(2**23, dtype=torch.int64) * 2 + 1
    noise = _noise.gumbel_from_words(odd << 8)
    exact = -(-(odd.double() * 2.0**-24).log()).log()
    assert ulps(noise, exact, exact.abs().clamp(min=1.0)) < 2.0
    assert noise.min().item() == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert noise.max().item() == pytest.approx(24 * math.log(2), rel=1e-6)
    assert bool((noise.diff() >= 0).all())


def test_noise_has_the_gumbel_distribution() -> None:
    noise = _noise.gumbel_noise(torch.tensor(7), 1000, 1000).double()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=6e-3)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=2e-2)
    ranked = noise.flatten().sort().values
    cumulative = torch.exp(-torch.exp(-ranked))
    expected = (torch.arange(ranked.numel()) + 0.5) / ranked.numel()
    assert (cumulative - expected).abs().max().item() < 2.5e-3  # Kolmogorov-Smirnov


def test_noise_depends_on_seed_row_and_column_only() -> None:
    seed = torch.tensor(-3)
    large = _noise.gumbel_noise(seed, 9, 333)
    assert torch.equal(large[:4, :70], _noise.gumbel_noise(seed, 4, 70))
    assert large.unique().numel() > 0.99 * large.numel()
    for other in (-2, -3 + 2**32, -3 - 2**33):
        assert (_noise.gumbel_noise(torch.tensor(other), 9, 333) == large).float().mean() < 0.01
