"""Error maps and what is asserted of their correction, for the tests of histogram_correction on every device."""

from __future__ import annotations

import torch
from carried import on
from torch import Tensor

import memad_fast
from memad_fast.ops.histogram_correction import reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def errors(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).abs().to(dtype)


def assert_matches_reference(error: Tensor, fraction: float, device: str = "cpu") -> None:
    corrected, mu, score = on(device, memad_fast.histogram_correction)(error, fraction)
    expected = reference(error.double(), fraction)
    tolerance = TOLERANCE[error.dtype]
    assert corrected.dtype == error.dtype
    assert corrected.shape == error.shape
    torch.testing.assert_close(mu.double(), expected[1], rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(corrected.double(), expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        score.double(), corrected.double().flatten(1).sum(1), rtol=1e-6, atol=1e-30, equal_nan=True
    )


def tied_images(pixels: int) -> Tensor:
    """Images of few values, as error maps often are: the values that many pixels share end the search."""
    chance = torch.rand(pixels)
    return torch.stack(
        [
            torch.zeros(pixels),
            torch.full((pixels,), 0.1),
            torch.where(chance < 0.7, 0.0, chance),
            torch.where(chance < 0.5, 0.0, chance),
            torch.where(chance < 0.45, chance, 1.0),
            torch.where(chance < 0.5, -0.0, 0.0),
            torch.where(chance < 0.5, -2.5, 2.5),
            (chance * 8).floor(),
            (chance * 20).floor(),
            torch.randn(pixels).mul(60).round() / 255,
            chance * 1e-42,
            torch.where(chance < 0.6, torch.inf, chance),
            torch.where(chance < 0.6, -torch.inf, chance),
            torch.where(chance < 0.4, torch.inf, -torch.inf),
        ]
    )


def assert_gradient_matches_reference(error: Tensor, fraction: float, device: str = "cpu") -> None:
    grads = [torch.randn(error.shape), torch.randn(len(error)), torch.randn(len(error))]
    results = []
    for x, call in ((error.clone(), on(device, memad_fast.histogram_correction)), (error.double(), reference)):
        x.requires_grad_()
        outputs = call(x, fraction)
        total = sum((out.double() * g.double()).sum() for out, g in zip(outputs, grads, strict=True))
        results.append(torch.autograd.grad(total, x)[0].double())
    tolerance = 3 * TOLERANCE[error.dtype]
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
