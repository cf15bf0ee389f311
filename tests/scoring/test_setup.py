from __future__ import annotations

import pytest

from memad_fast.models import PMB
from memad_fast.scoring import parse_options, set_up


def test_the_preset_named_like_the_data_is_the_default() -> None:
    assert set_up("pmb", "digits", normal_class=3).preset == "digits"
    first = next(iter(PMB.presets()))
    assert set_up("pmb", "digits", normal_class=3, preset=first, size=64).preset == first


def test_size_channels_and_options_replace_the_presets() -> None:
    setup = set_up("pmb", "digits", normal_class=3, size=16, channels=3, options={"memory": "none", "skip": True})
    assert setup.model.config.image_size == setup.data.image_size == 16
    assert setup.model.config.channels == setup.data.channels == 3
    assert setup.model.config.memory == "none"


def test_images_are_resized_as_the_preset_or_the_caller_says() -> None:
    published = {"preset": "paper", "size": 12, "normal_class": 3}
    assert set_up("salad", "digits", **published).data.train.resize == "bicubic"
    assert set_up("salad", "digits", **published, resize="bilinear").data.train.resize == "bilinear"
    cubic, linear = (set_up("pmb", "digits", normal_class=3, resize=resize).data for resize in ("bicubic", None))
    assert (cubic.test.resize, linear.test.resize) == ("bicubic", "bilinear")
    assert not cubic.train[0].image.equal(linear.train[0].image)


def test_the_seed_sets_the_first_weights() -> None:
    one, same, other = (next(set_up("pmb", "digits", normal_class=3, seed=s).model.parameters()) for s in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nothing"}, "model: expected one of pmb"),
        ({"preset": "nothing"}, "preset: model pmb has"),
        ({"options": {"nothing": 1}}, "options: the model's config has"),
        ({"options": {"image_size": 1}}, "options: image_size has its own argument, size"),
        ({"size": 33}, "image_size"),
        ({"normal_class": 11}, "normal_class"),
        ({"data": "no/such/folder"}, "no such folder"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"model": "pmb", "data": "digits", "normal_class": 0, **changes}
    with pytest.raises(ValueError, match=message):
        set_up(**arguments)  # type: ignore[arg-type]


def test_options_are_read_by_the_types_of_the_config() -> None:
    texts = [
        "widths=4,8",
        "items=(3,)",
        "skip=False",
        "threshold=none",
        "error_fraction=1",
        "memory=none",
        "shrink=none",
    ]
    assert parse_options(texts, PMB.Config) == {
        "widths": (4, 8),
        "items": (3,),
        "skip": False,
        "threshold": None,
        "error_fraction": 1.0,
        "memory": "none",
        "shrink": "none",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory", "expected NAME=VALUE"),
        ("nothing=1", "the model's config has .*memory.*not 'nothing'"),
        ("skip=maybe", "skip: expected bool, got 'maybe'"),
        ("widths=4,x", "widths: expected int, got 'x'"),
        ("threshold=low", "threshold: expected float or none, got 'low'"),
    ],
)
def test_an_option_of_another_type_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options([text], PMB.Config)
