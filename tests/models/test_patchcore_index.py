"""PatchCore on an index: the scores of the tensor bit for bit, patches that are never all held, and that stay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from memad_fast.index import ExactIndex, Index
from memad_fast.models import PatchCore, PatchCoreConfig, Scores

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = PatchCoreConfig(
    image_size=16, channels=1, backbone="pixels", patch=4, neighbourhood=1, coreset=1.0, smoothing=0.0
)
PATCHES = 49  # of an image


def config(**changes: Any) -> PatchCoreConfig:
    return PatchCoreConfig(**{**vars(PIXELS), **changes})


def assert_equal(scores: Scores, expected: Scores) -> None:
    assert torch.equal(scores.image_score, expected.image_score)
    assert torch.equal(scores.anomaly_map, expected.anomaly_map)
    assert torch.equal(scores.parts["distance"], expected.parts["distance"])


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"coreset": 20},
        {"coreset": 0.5, "smoothing": 1.0},
        {"reweighted": True, "neighbours": 5},
        {"reweighted": True, "neighbours": 500, "coreset": 30},
        {"backbone": "auto-encoder", "widths": (4, 8, 8), "neighbourhood": 3},
    ],
)
def test_scores_are_those_of_the_tensor_bit_for_bit(changes: dict[str, Any], where: str, tmp_path: Path) -> None:
    """Images of few brightnesses: many patches are equally far, and the first of them counts."""
    tensor = PatchCore(config(**changes))
    images, seen = torch.randint(0, 4, (6, 1, 16, 16)) / 3, torch.randint(0, 4, (5, 1, 16, 16)) / 3
    tensor.fill(seen)
    index = ExactIndex(tensor.patch_dim, chunk_rows=64, path=tmp_path / "bank" if where == "disk" else None)
    model = PatchCore(config(**changes), index=index)
    model.load_state_dict(model.state_dict() | {k: v for k, v in tensor.state_dict().items() if k != "bank"})
    model.fill(seen)
    assert len(index) == len(tensor.bank)
    assert torch.equal(torch.cat([piece.keys for piece in index.pieces()]), tensor.bank)
    assert_equal(model.score(images), tensor.score(images))
    assert_equal(model.score(seen[:1]), tensor.score(seen[:1]))


def test_a_filled_index_is_the_bank(tmp_path: Path) -> None:
    model = PatchCore(PIXELS, index=ExactIndex(16))
    model.fill(torch.rand(3, 1, 16, 16))
    assert model.index is not None
    model.index.save(tmp_path)
    other, images = PatchCore(PIXELS, index=ExactIndex.open(tmp_path)), torch.rand(2, 1, 16, 16)
    assert_equal(other.score(images), model.score(images))
    with pytest.raises(RuntimeError, match=r"given with 147 patches, which fill would drop; remember\(images\) adds"):
        other.fill(images)
    for stage in other.stages():  # nothing to fit
        assert stage.begin is not None
        assert stage.observe is not None
        assert stage.finish is not None
        stage.begin()
        stage.observe(images)
        stage.finish()
    assert_equal(other.score(images), model.score(images))


def test_patches_of_half_the_width_are_compared_as_they_are_kept() -> None:
    index = ExactIndex(16, dtype=torch.float16)
    model, images = PatchCore(PIXELS, index=index), torch.rand(2, 1, 16, 16)
    model.fill(torch.rand(3, 1, 16, 16))
    (kept,) = [piece.keys.double() for piece in index.pieces()]
    rows = model.features(images).permute(0, 2, 3, 1).flatten(1, 2).half().double()
    expected = torch.cdist(rows, kept.expand(2, -1, -1)).amin(dim=2).amax(dim=1)
    torch.testing.assert_close(model.score(images).image_score.double(), expected, rtol=1e-5, atol=1e-6)


def test_all_patches_are_streamed_and_a_coreset_is_chosen_first() -> None:
    for coreset, batches in ((1.0, [2 * PATCHES] * 3), (10, [10])):
        model = PatchCore(config(coreset=coreset), index=ExactIndex(16))
        added: list[int] = []
        original = ExactIndex.add

        def add(self: ExactIndex, keys: Tensor, added: list[int] = added, original: Any = original) -> Tensor:
            added.append(len(keys))
            return original(self, keys)

        (stage,) = model.stages()
        assert stage.begin is not None
        assert stage.observe is not None
        assert stage.finish is not None
        with mock.patch.object(ExactIndex, "add", add):
            stage.begin()
            for _ in range(3):
                stage.observe(torch.rand(2, 1, 16, 16))
                held = sum(value.numel() for value in model.state_dict().values())
                assert (held < 16) == (coreset == 1.0), "patches were held though they are in the index"
            stage.finish()
        assert added == batches


def test_what_is_filled_again_replaces_what_was_there() -> None:
    model, images = PatchCore(PIXELS, index=ExactIndex(16)), torch.rand(2, 1, 16, 16)
    model.fill(torch.rand(3, 1, 16, 16))
    model.fill(images)
    assert model.index is not None
    assert len(model.index) == 2 * PATCHES
    assert float(model.score(images).image_score.max()) == 0.0


def test_a_line_remembers_new_parts_and_forgets_the_oldest(tmp_path: Path) -> None:
    index = ExactIndex(16, capacity=3 * PATCHES, path=tmp_path)
    model, images = PatchCore(PIXELS, index=index), torch.rand(5, 1, 16, 16)
    for image in images:
        model.remember(image[None])
    distances = model.score(images).image_score
    assert (distances[:2] > 0).all()
    assert (distances[2:] == 0).all()
    index.save()
    index.close()
    opened = PatchCore(PIXELS, index=ExactIndex.open(tmp_path))
    assert_equal(opened.score(images), model.score(images))
    assert model.training
    with pytest.raises(RuntimeError, match="remember: the bank is a tensor"):
        PatchCore(PIXELS).remember(images)


def test_scoring_changes_nothing_and_takes_images_one_by_one() -> None:
    model, images = PatchCore(PIXELS, index=ExactIndex(16)), torch.rand(4, 1, 16, 16)
    model.fill(torch.rand(3, 1, 16, 16))
    index = model.index
    assert isinstance(index, ExactIndex)
    before, rows = model.state_dict(), [piece.keys.clone() for piece in index.pieces()]
    together = model.score(images)
    for at in range(4):
        assert torch.equal(model.score(images[at : at + 1]).anomaly_map[0], together.anomaly_map[at])
    assert model.score(images[:0]).image_score.shape == (0,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(piece.keys, row) for piece, row in zip(index.pieces(), rows, strict=True))


def test_an_empty_index_is_named() -> None:
    with pytest.raises(RuntimeError, match="the bank is empty"):
        PatchCore(PIXELS, index=ExactIndex(16)).score(torch.rand(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda: ExactIndex(15), "index: expected dim 16, got 15"),
        (lambda: ExactIndex(16, metric="cosine"), "index: expected metric 'l2', got 'cosine'"),
        (lambda: ExactIndex(16, values_dim=2), "index: expected values_dim None, got 2"),
    ],
)
def test_an_index_that_does_not_fit_is_named(index: Callable[[], Index], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchCore(PIXELS, index=index())


def test_what_is_no_index_or_no_memory_is_named() -> None:
    with pytest.raises(TypeError, match=r"index: expected a memad_fast\.index\.Index, got Tensor"):
        PatchCore(PIXELS, index=torch.zeros(3, 16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index: patchcore has no memory 'edges'"):
        PatchCore(PIXELS).use_indexes({"edges": ExactIndex(16)})
    with mock.patch.object(ExactIndex, "rows", new_callable=mock.PropertyMock, side_effect=AttributeError):
        PatchCore(PIXELS, index=ExactIndex(16))
        with pytest.raises(ValueError, match="index: reweighted scores read patches back"):
            PatchCore(config(reweighted=True), index=ExactIndex(16))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_on_an_index_is_neither_copied_nor_pickled(copied: Callable[[PatchCore], object]) -> None:
    with pytest.raises(TypeError, match="ExactIndex: an index is neither copied nor pickled; save it"):
        copied(PatchCore(PIXELS, index=ExactIndex(16)))


def test_a_state_of_another_bank_is_named() -> None:
    tensor, model, images = PatchCore(PIXELS), PatchCore(PIXELS, index=ExactIndex(16)), torch.rand(2, 1, 16, 16)
    tensor.fill(images)
    model.fill(images)
    with pytest.raises(ValueError, match="index: the state is that of a model on an index; give it"):
        PatchCore(PIXELS).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="index: the state holds its bank as a tensor of 98 patches"):
        PatchCore(PIXELS, index=ExactIndex(16)).load_state_dict(tensor.state_dict())
    with pytest.raises(ValueError, match="index: 0 patches were ever added to it, 98 to that of the state"):
        PatchCore(PIXELS, index=ExactIndex(16)).load_state_dict(model.state_dict())
    moved = ExactIndex(16)
    moved.add(tensor.bank)
    assert_equal(PatchCore(PIXELS, index=moved).score(images), model.score(images))
