"""SALAD's perturbations: how large and how many the tiles are, what they leave alone, and that a batch is not mixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from devices import NothingWaits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memad_fast.models import perturbations
from memad_fast.models.perturbations import (
    PERTURBATIONS,
    Tiles,
    in_painting,
    local_pixel_shuffling,
    non_linear_intensity,
    perturb,
)

KINDS = list(PERTURBATIONS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These images are too small to share."""


def _drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """The tiles that are drawn from now on."""
    drawn, original = [], perturbations._draw_tiles
    monkeypatch.setattr(
        perturbations, "_draw_tiles", lambda *arguments: drawn.append(original(*arguments)) or drawn[-1]
    )
    return drawn


def _areas(tiles: Tiles) -> Tensor:
    return tiles.height * tiles.width


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (40, 100)])
def test_tiles_are_as_many_and_as_large_as_published(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, whole = _drawn(monkeypatch), shape[0] * shape[1]
    in_painting(torch.rand(40, 1, *shape))
    local_pixel_shuffling(torch.rand(40, 1, *shape))
    painted, shuffled = drawn
    assert painted.top.shape == (40, 5)
    assert shuffled.top.shape == (40, 300)
    assert whole / 64 <= int(_areas(painted).min()) <= int(_areas(painted).max()) <= whole / 25
    assert int(_areas(painted).max()) > 0.8 * whole / 25
    assert int(_areas(shuffled).min()) == 1
    assert 0.8 * whole / 100 < int(_areas(shuffled).max()) <= whole / 100


@pytest.mark.parametrize("shape", [(64, 64), (40, 100)])
def test_tiles_lie_anywhere_within_the_image(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _drawn(monkeypatch)
    local_pixel_shuffling(torch.rand(100, 1, *shape))
    (tiles,) = drawn
    for start, length, whole in ((tiles.top, tiles.height, shape[0]), (tiles.left, tiles.width, shape[1])):
        assert int(start.min()) == 0
        assert int((start + length).max()) == whole
        single = start[length == 1]
        assert len(single.unique()) == whole
        assert abs(float(single.float().mean()) - (whole - 1) / 2) < whole / 20


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), channels=st.sampled_from([1, 3]), seed=st.integers(0, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_images_stay_images(kind: str, rows: int, columns: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.rand(3, channels, rows, columns)
    before = images.clone()
    perturbed = PERTURBATIONS[kind](images)
    assert torch.equal(images, before)
    assert (perturbed.shape, perturbed.dtype) == (images.shape, images.dtype)
    assert 0 <= float(perturbed.min()) <= float(perturbed.max()) <= 1


def test_in_painting_changes_its_tiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, images = _drawn(monkeypatch), torch.full((8, 3, 64, 64), 2.0)
    painted = in_painting(images)
    expected = np.zeros((8, 64, 64), bool)
    for image in range(8):
        for tile in range(5):
            top, left, height, width = (int(side[image, tile]) for side in drawn[0])
            expected[image, top : top + height, left : left + width] = True
    assert np.array_equal((painted != 2).any(dim=1).numpy(), expected)
    noise = painted[(painted != 2)].reshape(-1)
    assert float(noise.min()) < 0.01
    assert float(noise.max()) > 0.99
    assert abs(float(noise.mean()) - 0.5) < 0.02
    assert not torch.equal(painted[:, 0], painted[:, 1])


def test_shuffling_moves_each_pixel_within_the_last_tile_that_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _drawn(monkeypatch)
    places = torch.arange(64 * 64, dtype=torch.float32).reshape(1, 1, 64, 64).expand(4, 1, 64, 64)
    shuffled = local_pixel_shuffling(places)
    owner = np.full((4, 64, 64), -1)
    for image in range(4):
        for tile in range(300):
            top, left, height, width = (int(side[image, tile]) for side in drawn[0])
            owner[image, top : top + height, left : left + width] = tile
    for image in range(4):
        came_from = shuffled[image].long().flatten().numpy()
        assert np.array_equal(np.sort(came_from), np.arange(64 * 64))
        assert np.array_equal(owner[image].ravel()[came_from], owner[image].ravel())
        untouched = owner[image].ravel() == -1
        assert np.array_equal(came_from[untouched], np.arange(64 * 64)[untouched])
        moved = (came_from != np.arange(64 * 64))[~untouched]
        assert moved.mean() > 0.8


def test_shuffling_draws_every_order_of_a_tile_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of 1 × 3 pixels, and its six orders."""
    one = torch.ones(6000, 1, dtype=torch.int64)
    monkeypatch.setattr(perturbations, "_draw_tiles", lambda *_: Tiles(one, one, one, 3 * one))
    images = torch.zeros(6000, 1, 10, 30)
    images[:, 0, 1, 1:4] = torch.tensor([1.0, 2.0, 3.0])
    shuffled = local_pixel_shuffling(images)
    _, counts = (shuffled[:, 0, 1, 1:4] @ torch.tensor([100.0, 10.0, 1.0])).unique(return_counts=True)
    assert len(counts) == 6
    assert float((counts - 1000).abs().max()) < 5 * math.sqrt(1000)


def test_channels_are_shuffled_together_and_images_apart() -> None:
    images = torch.arange(1024.0).reshape(1, 1, 32, 32).expand(2, 3, 32, 32)
    shuffled = local_pixel_shuffling(images)
    assert torch.equal(shuffled[:, 0], shuffled[:, 1])
    assert torch.equal(shuffled[:, 0], shuffled[:, 2])
    assert not torch.equal(shuffled[0], shuffled[1])


def _bezier_by_hand(points: np.ndarray, at: float) -> np.ndarray:
    """De Casteljau's construction."""
    while len(points) > 1:
        points = points[:-1] * (1 - at) + points[1:] * at
    return points[0]


@pytest.mark.parametrize("control_points", [1, 2, 3])
def test_intensities_follow_the_bezier_curve_of_the_drawn_points(
    control_points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = torch.rand(2, control_points, 2, dtype=torch.float32).sort(dim=1).values
    monkeypatch.setattr(perturbations.torch, "rand", lambda *_, **__: free)
    for image in range(2):
        points = np.concatenate([np.zeros((1, 2)), free[image].double().numpy(), np.ones((1, 2))])
        curve = np.stack([_bezier_by_hand(points, at) for at in np.linspace(0, 1, 57)])
        grey = torch.from_numpy(curve[:, 0]).float().expand(2, 1, 1, 57)
        answered = non_linear_intensity(grey, control_points=control_points)[image].flatten()
        np.testing.assert_allclose(answered.numpy(), curve[:, 1], atol=2e-3)


@pytest.mark.parametrize("control_points", [1, 2, 3, 5])
def test_intensities_keep_their_order_and_their_ends(control_points: int) -> None:
    ramp = torch.linspace(0, 1, 400).reshape(1, 1, 20, 20).expand(50, 3, 20, 20)
    changed = non_linear_intensity(ramp, control_points=control_points)
    values = changed.flatten(2)
    assert bool((values.diff(dim=2) >= 0).all())
    assert not values[:, :, 0].any()
    torch.testing.assert_close(values[:, :, -1], torch.ones(50, 3))
    assert torch.equal(values[:, 0], values[:, 2])
    assert not torch.allclose(values[0], values[1], atol=1e-2)


def test_each_image_gets_one_kind_drawn_with_equal_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {kind: number for number, kind in enumerate(KINDS, start=1)}
    seen: dict[str, int] = dict.fromkeys(KINDS, 0)

    def mark(kind: str) -> object:
        def perturbation(images: Tensor, **options: object) -> Tensor:
            seen[kind] += len(images)
            assert options == ({"control_points": 3} if kind == "intensity" else {})
            return images + 10 * marks[kind]

        return perturbation

    monkeypatch.setattr(perturbations, "PERTURBATIONS", {kind: mark(kind) for kind in KINDS})
    images = torch.arange(3000.0).div(6000)[:, None, None, None].expand(3000, 1, 2, 2)
    perturbed = perturb(images, control_points=3)
    kinds = perturbed.div(10, rounding_mode="floor")
    torch.testing.assert_close(perturbed - 10 * kinds, images, atol=1e-5, rtol=0)
    assert sum(seen.values()) == 3000
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in seen.values())


def test_the_seed_fixes_what_is_drawn() -> None:
    images = torch.rand(9, 1, 32, 32)
    torch.manual_seed(1)
    first = perturb(images)
    torch.manual_seed(1)
    assert torch.equal(first, perturb(images))
    assert not torch.equal(first, perturb(images))


@pytest.mark.parametrize("kind", [*KINDS, "perturb"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    images = torch.rand(6, 1, 32, 32)
    with NothingWaits():
        (perturb if kind == "perturb" else PERTURBATIONS[kind])(images)


def test_no_images_are_no_problem() -> None:
    assert perturb(torch.rand(0, 1, 32, 32)).shape == (0, 1, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    images = torch.rand(9, 1, 32, 32).to(dtype)
    assert perturb(images).dtype == dtype
