"""Which sets are found, what their READMEs say, and which images a reduced protocol takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import image_statistics
from benchmarks.accuracy.sets import DIGITS, ImageSet, find_sets, reduced
from memad_fast.data import open_data
from memad_fast.scoring.evaluate import auroc


def test_the_digits_and_every_folder_in_mvtec_layout_are_found(parts: Path) -> None:
    (parts.parent / "notes").mkdir()
    assert find_sets(parts.parent) == [DIGITS, ImageSet("parts", str(parts))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nothing.", {}),
        (
            "Image AUROC of global image statistics (one-class): 0.768. Image AUROC of raw 12x12-patch PCA + nearest"
            " neighbour at 128 px: 0.973, its pixel AUROC: 0.897.",
            {"image statistics": (0.768, None), "patch neighbours": (0.973, 0.897)},
        ),
        (
            "global image statistics (one-class): 0.69. Image AUROC of raw 12x12-patch PCA + nearest neighbour at 128"
            " px: 0.565. Per type",
            {"image statistics": (0.69, None), "patch neighbours": (0.565, None)},
        ),
    ],
)
def test_what_a_readme_says_of_simple_methods_is_read(parts: Path, text: str, expected: dict[str, object]) -> None:
    (parts / "README.md").write_text(text)
    assert ImageSet("parts", str(parts)).references() == expected


def test_a_reduced_set_has_the_same_test_images_whichever_class_is_normal() -> None:
    found = [reduced(open_data("digits", image_size=8, normal_class=digit), 50, 100) for digit in (3, 8)]
    for digit, data in zip((3, 8), found, strict=True):
        assert len(data.train) == 50
        assert len(data.test) == 100
        assert int((data.test.labels == 0).sum()) == 10
        whole = open_data("digits", image_size=8, normal_class=digit)
        place = whole.test.names.index(data.test.names[17])
        assert data.test[17].defect == whole.test[place].defect
        assert data.test[17].image.equal(whole.test[place].image)
    assert found[0].test.names == found[1].test.names
    assert found[0].train.names == reduced(open_data("digits", image_size=8, normal_class=3), 50, 100).train.names


def test_image_statistics_see_the_whole_and_no_part(parts: Path) -> None:
    data = open_data(parts, image_size=16)
    scores, labels, kinds = image_statistics.scores(data), data.test.labels.numpy(), np.array(data.test.defects)
    bright = (kinds == "good") | (kinds == "bright")
    assert auroc(labels[bright], scores[bright]) == 1.0
    image = data.test[0].image[None]
    shuffled = image.flatten(2)[..., np.random.default_rng(0).permutation(256)].reshape(image.shape)
    before, after = image_statistics.statistics(image), image_statistics.statistics(shuffled)
    assert before.shape == (1, 11)
    assert before[:, :9].sub(after[:, :9]).abs().max() < 1e-6, "moments and quantiles know no places"
