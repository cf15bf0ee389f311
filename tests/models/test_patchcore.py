"""PatchCore: the bank holds normal patches, the score is the distance to it, and a planted defect stands out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memad_fast.models import PatchCore, PatchCoreConfig, build

PIXELS = PatchCoreConfig(
    image_size=16, channels=1, backbone="pixels", patch=4, neighbourhood=1, coreset=1.0, smoothing=0.0
)


def stripes(count: int, size: int = 16) -> Tensor:
    """Columns of alternating brightness, a little noisy."""
    pattern = torch.arange(size).div(2, rounding_mode="floor").remainder(2).float()
    return (0.25 + 0.5 * pattern + 0.02 * torch.rand(count, 1, size, size)).clamp(0, 1)


def test_a_seen_patch_has_distance_zero_and_a_planted_defect_the_largest() -> None:
    model, images = PatchCore(PIXELS), stripes(4)
    model.fill(images)
    assert float(model.score(images).image_score.max()) == 0.0
    broken = images.clone()
    broken[1, :, 5:9, 6:10] = 1.0
    scores = model.score(broken)
    assert scores.image_score.argmax() == 1
    place = scores.anomaly_map[1, 0].flatten().argmax()
    assert (4 <= place // 16 <= 9) & (5 <= place % 16 <= 10)


def test_the_score_is_the_largest_euclidean_distance_to_the_bank() -> None:
    model, images = PatchCore(PIXELS), torch.rand(3, 1, 16, 16)
    model.fill(torch.rand(5, 1, 16, 16))
    rows = model.features(images).permute(0, 2, 3, 1).flatten(1, 2).double()
    expected = torch.cdist(rows, model.bank.double().expand(3, -1, -1)).amin(dim=2).amax(dim=1)
    torch.testing.assert_close(model.score(images).image_score.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_reweighted_score_follows_equation_7() -> None:
    config = PatchCoreConfig(
        image_size=8,
        channels=1,
        backbone="pixels",
        patch=4,
        neighbourhood=1,
        coreset=1.0,
        reweighted=True,
        neighbours=3,
    )
    model, image = PatchCore(config), torch.rand(1, 1, 8, 8)
    model.fill(torch.rand(4, 1, 8, 8))
    rows, bank = model.features(image).permute(0, 2, 3, 1).flatten(0, 2).double(), model.bank.double()
    distances, nearest = torch.cdist(rows, bank).min(dim=1)
    worst = distances.argmax()
    around = torch.cdist(bank[nearest[worst]][None], bank)[0].topk(3, largest=False).indices
    weight = 1 - distances[worst].exp() / (rows[worst] - bank[around]).norm(dim=1).exp().sum()
    scores = model.score(image)
    torch.testing.assert_close(scores.image_score[0].double(), weight * distances[worst], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.parts["distance"][0].double(), distances[worst], rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_the_batch() -> None:
    model, images = PatchCore(PatchCore.presets()["digits"].config), torch.rand(3, 1, 32, 32)
    model.fill(torch.rand(4, 1, 32, 32))
    together = model.score(images)
    alone = torch.cat([model.score(image[None]).image_score for image in images])
    torch.testing.assert_close(together.image_score, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("coreset", "kept"), [(0.5, 98), (7, 7), (10_000, 196), (1.0, 196)])
def test_the_bank_keeps_a_share_or_a_number_of_patches(coreset: float, kept: int) -> None:
    config = PatchCoreConfig(image_size=16, channels=1, backbone="pixels", patch=4, coreset=coreset)
    model = PatchCore(config)
    model.fill(torch.rand(4, 1, 16, 16))
    assert len(model.bank) == kept


def test_a_loaded_bank_gives_the_same_scores() -> None:
    model, images = PatchCore(PIXELS), torch.rand(2, 1, 16, 16)
    model.fill(torch.rand(3, 1, 16, 16))
    other = build("patchcore", vars(PIXELS))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.score(images).image_score, model.score(images).image_score)


def test_any_module_that_gives_maps_can_be_the_backbone() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
            self.second = nn.Conv2d(4, 6, 3, 2, 1)

        def forward(self, images: Tensor) -> list[Tensor]:
            fine = self.norm(self.first(images))
            return [fine, self.second(fine)]

    config = PatchCoreConfig(image_size=16, channels=3, backbone="custom", levels=(0, 1))
    with pytest.raises(ValueError, match=r"backbone: expected a module with config\.backbone 'custom'"):
        PatchCore(config)
    model = PatchCore(config, backbone=Backbone())
    before = model.backbone.norm.running_mean.clone()
    model.train()
    model.fill(torch.rand(4, 3, 16, 16))
    assert model.bank.shape == (26, 10)
    assert torch.equal(model.backbone.norm.running_mean, before), "the backbone learnt from what it looked at"
    assert [stage.name for stage in model.stages()] == ["bank"]


def test_an_empty_bank_is_named() -> None:
    with pytest.raises(RuntimeError, match="the bank is empty"):
        PatchCore(PIXELS).score(torch.rand(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"coreset": 0.0}, "coreset"),
        ({"coreset": True}, "coreset"),
        ({"neighbourhood": 2}, "neighbourhood"),
        ({"patch": 17}, "patch"),
        ({"channels": 2}, "channels"),
        ({"backbone": "resnet"}, "backbone"),
        ({"levels": (2, 1)}, "levels"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"backbone": "auto-encoder", "image_size": 18}, "image_size"),
        ({"backbone": "auto-encoder", "levels": (3,)}, "levels"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PatchCoreConfig(**{**vars(PIXELS), **change})
