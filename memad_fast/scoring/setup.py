"""From names to objects: a model by its name and preset, fitted to the data it will see."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memad_fast.data import AdaptationExamples, Dataset, Images, LabelledImages, open_data, open_labelled, open_plain
from memad_fast.data.idx import is_idx_folder
from memad_fast.models.base import AnomalyModel, Trainable, TrainingSettings
from memad_fast.models.extractors import EdgeExtractor, SemanticConfig, SemanticExtractor
from memad_fast.scoring.run import Run, RunError, TrainedRun, load_extractor


@dataclass(frozen=True)
class ExtractorSetup:
    """All that ``fit_extractor`` needs."""

    model: Trainable
    settings: TrainingSettings
    data: Images | AdaptationExamples
    source: Mapping[str, Any]  # what the run records of the data
    preset: str


@dataclass(frozen=True)
class Setup:
    """All that ``fit`` needs."""

    model: AnomalyModel
    settings: TrainingSettings
    data: Dataset
    preset: str


def set_up(
    model: str,
    data: str | os.PathLike[str],
    *,
    normal_class: int | None = None,
    preset: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    resize: str | None = None,
    options: Mapping[str, Any] | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    seed: int = 0,
) -> Setup:
    """Open the data and build an untrained model for it.

    Args:
        model: a name in ``memad_fast.models.MODELS``.
        data, normal_class: see ``memad_fast.data.open_data``.
        preset: a name in the model's ``presets()``; default: "digits" for digits and idx files, where the model has
            it, else the first.
        size: side of the images in pixels; default: the parts', else the preset's.
        channels: 1 or 3; default: the parts', else as the training images are.
        resize: "bilinear" or "bicubic", how images are brought to that size; default: the preset's.
        options: values of the model's config that replace the preset's.
        parts: run folders of networks that were trained beforehand, by the names that the model has for them
            (``PARTS``). Their weights are used as they are, and the stages that would train them are left out.
        seed: of the model's first weights.

    Raises:
        ValueError: an unknown model, preset, option or part, or values that do not fit together; the message says
            which. RunError: a part's run cannot be used.

    Example:
        >>> from memad_fast.scoring import set_up
        >>> setup = set_up("pmb", "digits", normal_class=0, options={"memory": "none"})
        >>> setup.preset, setup.model.config.memory, setup.data.channels
        ('digits', 'none', 1)
    """
    from memad_fast.models import MODELS

    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    preset, config, settings = _preset(MODELS[model], preset, data)
    changes = dict(options or {})
    _check_names(changes, config)
    given = _load_parts(MODELS[model], parts or {})
    for part in given.values():
        size = part.config.image_size if size is None else size
        channels = part.config.channels if channels is None else channels
    dataset = open_data(
        data,
        image_size=config.image_size if size is None else size,
        channels=channels,
        normal_class=normal_class,
        resize=MODELS[model].presets()[preset].resize if resize is None else resize,
    )
    config = dataclasses.replace(config, **changes, image_size=dataset.image_size, channels=dataset.channels)
    torch.manual_seed(seed)
    return Setup(MODELS[model](config, **given), settings, dataset, preset)


def set_up_edges(
    data: str | os.PathLike[str],
    *,
    normal_class: int | None = None,
    preset: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ExtractorSetup:
    """Open the data and build an untrained edge extractor for its normal images. The arguments are ``set_up``'s."""
    preset, config, settings = _preset(EdgeExtractor, preset, data)
    changes = dict(options or {})
    _check_names(changes, config)
    dataset = open_data(
        data, image_size=config.image_size if size is None else size, channels=channels, normal_class=normal_class
    )
    config = dataclasses.replace(config, **changes, image_size=dataset.image_size, channels=dataset.channels)
    torch.manual_seed(seed)
    source = {"name": dataset.name, **dataset.source}
    return ExtractorSetup(EdgeExtractor(config), settings, dataset.train, source, preset)


def set_up_semantic(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    labels: str | None = None,
    preset: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ExtractorSetup:
    """Open a labelled set and images to adapt to, and build an untrained semantic extractor for them.

    Args:
        source, labels: see ``memad_fast.data.open_labelled``; the option ``values`` says what is in the label maps.
        target: see ``memad_fast.data.open_plain``; without it there is no adaptation (``adversarial`` is 0).
        preset: a name in ``SemanticExtractor.presets()``; default: the first.
        size, channels, options, seed: as in ``set_up``.

    Raises:
        DataError: no labels for an image of the source, no images, no such folder. ImageError: a file cannot be used.
        ValueError: an unknown preset or option, or values that do not fit together; the message says which.
    """
    preset, config, settings = _preset(SemanticExtractor, preset, source)
    changes = {**(options or {}), **({"adversarial": 0.0} if target is None else {})}
    _check_names(changes, config)
    config = dataclasses.replace(config, **changes, image_size=config.image_size if size is None else size)
    labelled = open_labelled(
        source, image_size=config.image_size, channels=channels, values=config.values, labels=labels
    )
    config = dataclasses.replace(config, channels=labelled.channels)
    plain = None
    if target is not None and config.adversarial:
        plain = open_plain(target, image_size=config.image_size, channels=config.channels)
    torch.manual_seed(seed)
    extractor = SemanticExtractor(config)
    extractor.start_from(labelled.class_shares())
    examples = AdaptationExamples(labelled, plain, crop=config.crop, flips=config.flips)
    told = {"source": os.fspath(source), "target": None if plain is None else os.fspath(str(target))}
    return ExtractorSetup(extractor, settings, examples, told, preset)


def open_labels(run: TrainedRun, data: str | os.PathLike[str], labels: str | None = None) -> LabelledImages:
    """Open a labelled set to evaluate a semantic extractor on, in its size, channels and values.

    Raises:
        RunError: a run of another kind. What ``open_labelled`` raises.
    """
    config = run.model.config
    if not isinstance(config, SemanticConfig):
        raise RunError(f"{run.folder}: a run of {run.model_name}, expected one of {SemanticExtractor.name}")
    return open_labelled(
        data, image_size=config.image_size, channels=config.channels, values=config.values, labels=labels
    )


def _preset(
    kind: type[Trainable], preset: str | None, data: str | os.PathLike[str]
) -> tuple[str, Any, TrainingSettings]:
    """Name, config and training settings of a preset; without a name, the one that the data suggests."""
    presets = kind.presets()
    if preset is None:
        small_images = os.fspath(data) == "digits" or is_idx_folder(Path(data))
        preset = "digits" if small_images and "digits" in presets else next(iter(presets))
    if preset not in presets:
        raise ValueError(f"preset: model {kind.name} has {', '.join(presets)}, not {preset!r}")
    return preset, presets[preset].config, presets[preset].training


def _load_parts(model: type[AnomalyModel], parts: Mapping[str, str | os.PathLike[str]]) -> dict[str, Trainable]:
    given = {}
    for name, folder in parts.items():
        if name not in model.PARTS:
            known = f"has {', '.join(model.PARTS)}" if model.PARTS else "takes none"
            raise ValueError(f"parts: model {model.name} {known}, not {name!r}")
        part = load_extractor(folder, "cpu").model
        if not isinstance(part, model.PARTS[name]):
            raise RunError(
                f"{folder}: a run of {part.name}, expected one of {model.PARTS[name].name} for part {name!r}"
            )
        given[name] = part
    return given


def _check_names(options: Mapping[str, Any], config: Any) -> None:
    known = [field.name for field in dataclasses.fields(config) if field.name not in ("image_size", "channels")]
    for name in options:
        if name in ("image_size", "channels"):
            raise ValueError(f"options: {name} has its own argument, {'size' if name == 'image_size' else name}")
        if name not in known:
            raise ValueError(f"options: the model's config has {', '.join(known)}, not {name!r}")


def open_test_data(run: Run, data: str | os.PathLike[str], normal_class: int | None = None) -> Dataset:
    """Open data to evaluate a run on, in the run's image size and channels, resized as for its training.

    Without ``normal_class``, digits and idx files take the class that the run was fitted on.
    """
    if normal_class is None and (os.fspath(data) == "digits" or is_idx_folder(Path(data))):
        normal_class = run.config["data"].get("normal_class")
    return open_data(
        data, image_size=run.image_size, channels=run.channels, normal_class=normal_class, resize=run.resize
    )


def parse_parts(texts: list[str]) -> dict[str, Path]:
    """Parts as typed on the command line, "name=run folder".

    Raises:
        ValueError: no "=", or a name twice.

    Example:
        >>> parse_parts(["edges=runs/fe"])
        {'edges': PosixPath('runs/fe')}
    """
    parts: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ValueError(f"--part: expected NAME=RUN, got {text!r}")
        if name in parts:
            raise ValueError(f"--part: {name} is given twice")
        parts[name] = Path(folder)
    return parts


def parse_options(texts: list[str], config_type: type) -> dict[str, Any]:
    """Options as typed on the command line, "name=value", to values of the config's types.

    Raises:
        ValueError: no "=", an unknown name, or a value of another type; the message says what was expected.

    Example:
        >>> from memad_fast.models import PMB
        >>> parse_options(["memory=none", "items=20,20", "skip=false"], PMB.Config)
        {'memory': 'none', 'items': (20, 20), 'skip': False}
    """
    hints = typing.get_type_hints(config_type)
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        if name not in hints:
            raise ValueError(f"--set: the model's config has {', '.join(hints)}, not {name!r}")
        options[name] = _parse(name, value, hints[name])
    return options


def _parse(name: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the annotated type: bool, int, float, str, a tuple of one of them, or None."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if types.NoneType in choices and text.lower() in ("none", "null") and str not in choices:
        return None
    for choice in choices:
        if typing.get_origin(choice) is tuple:
            items = [item for item in text.strip("()[] ").split(",") if item.strip()]
            return tuple(_parse(name, item.strip(), typing.get_args(choice)[0]) for item in items)
        if choice is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if choice in (int, float):
            try:
                return choice(text)
            except ValueError:
                continue
        if choice is str:
            return text
    expected = " or ".join("none" if choice is types.NoneType else choice.__name__ for choice in choices)
    raise ValueError(f"--set {name}: expected {expected}, got {text!r}")
