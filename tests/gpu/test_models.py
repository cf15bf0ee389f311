"""PMB on the GPU: the scores and the training step of the CPU, by the ops that serve the device."""

from __future__ import annotations

import copy

import pytest
import torch
from where import DEVICE, HAS_GPU, has_kernels

from memad_fast.models import PMB

OPS = ("bank_attention", "bank_attention_backward", "histogram_correction", "ssim_loss", "ssim_loss_backward")

pytestmark = pytest.mark.skipif(
    HAS_GPU and not all(has_kernels("cuda", op) or has_kernels("triton", op) for op in OPS),
    reason="not every op of the model has a kernel here",
)


@pytest.fixture
def models() -> tuple[PMB, PMB]:
    """The same network on the CPU and on the GPU. Convolutions in float32, not TF32."""
    torch.backends.cudnn.allow_tf32 = False
    model = PMB(PMB.presets()["digits"].config)
    return model, copy.deepcopy(model).to(DEVICE)


def test_scores_are_the_cpus(models: tuple[PMB, PMB]) -> None:
    images = torch.rand(5, 1, 32, 32)
    expected, got = models[0].score(images), models[1].score(images.to(DEVICE))
    assert got.anomaly_map.device.type == DEVICE
    torch.testing.assert_close(got.image_score.cpu(), expected.image_score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.anomaly_map.cpu(), expected.anomaly_map, rtol=1e-3, atol=1e-4)


def test_a_training_step_is_the_cpus(models: tuple[PMB, PMB]) -> None:
    images = torch.rand(8, 1, 32, 32)
    for model, batch in zip(models, (images, images.to(DEVICE)), strict=True):
        model.train()
        with torch.no_grad():
            model(batch)  # batch norms see it
        model.loss(batch)["total"].backward()
    for (name, expected), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert expected.grad is not None
        assert got.grad is not None
        difference = (got.grad.cpu() - expected.grad).norm()
        assert difference <= 2e-2 * expected.grad.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains(models: tuple[PMB, PMB], dtype: torch.dtype) -> None:
    model = models[1].train()
    images = torch.rand(8, 1, 32, 32, device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype):
        loss = model.loss(images)["total"]
    loss.backward()
    assert loss.isfinite()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
