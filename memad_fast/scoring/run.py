"""The run folder: a trained detector with all that scoring needs, or a trained extractor; and nothing that executes.

    RUN/model.safetensors   weights and buffers
    RUN/config.json         model and architecture, preprocessing, threshold and where it came from (a detector's),
                            training settings, versions, SHA-256 of model.safetensors, checksum of itself
    RUN/index-<random>      a memory that is an index (indexes.py), if config.json names it
    RUN/log/metrics.csv     the training log

Whatever is torn, altered, missing or from a later version is refused by name: a threshold that is silently another
one, or weights that are silently half trained, would be worse than no answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from memad_fast import __version__
from memad_fast._atomic import write_bytes, write_json
from memad_fast._sealed import checksum, parse
from memad_fast.models.base import AnomalyModel, Trainable
from memad_fast.scoring.indexes import delete_all_but, open_indexes, save_indexes

FORMAT = "memad_fast run"
FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_SECTIONS = ("model", "preprocessing", "files")


class RunError(ValueError):
    """A run folder that cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class TrainedRun:
    """What every run folder holds: a trained network, and how it came about."""

    folder: Path
    model: Trainable  # in eval mode, on the device that was asked for
    config: dict[str, Any]  # config.json, whole

    @property
    def model_name(self) -> str:
        """The model's name, of a detector its word on the command line."""
        return str(self.config["model"]["name"])

    @property
    def image_size(self) -> int:
        """Height and width that images are resized to."""
        return int(self.config["preprocessing"]["image_size"])

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.config["preprocessing"]["channels"])

    @property
    def resize(self) -> str:
        """How images are brought to the model's size: "bilinear" or "bicubic"."""
        return str(self.config["preprocessing"].get("resize", "bilinear")).split()[0]

    @property
    def warnings(self) -> list[str]:
        """What whoever uses the run should know, as that the threshold rests on few images."""
        return list(self.config.get("warnings", []))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


@dataclass(frozen=True)
class Run(TrainedRun):
    """A trained detector, ready to score: an image is an anomaly if its score is greater than ``threshold``."""

    model: AnomalyModel

    @property
    def threshold(self) -> float:
        """The largest score that still counts as normal."""
        return float(self.config["threshold"]["value"])

    @property
    def map_level(self) -> float:
        """What the anomaly maps of good parts reach: heat maps are coloured against it.

        The threshold's quantile of the largest value in each held-out normal image's map.

        Raises:
            RunError: the run does not say.
        """
        level = self.config["threshold"].get("map_level")
        if level is None:
            raise RunError(
                f"{self.folder / CONFIG_FILE}: says no map_level, which colours heat maps; fit the run again"
            )
        return float(level)


def save_run(
    folder: str | os.PathLike[str],
    model: Trainable,
    *,
    threshold: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any],
    training: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    warnings: list[str] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``, each whole or not at all; the folder is made if need be.

    Args:
        folder: the run folder. A run in it is replaced. The weights are written first, so that a crash between the
            two files leaves a folder that ``load_run`` refuses, never one with another model's threshold. An index
            that has its folder there is saved; of another the run gets a copy.
        model: what was trained; its ``config`` must be a dataclass of JSON values.
        threshold: a detector's, ``{"value": float, "map_level": float, ...}`` and how it came about; see ``Run``.
        preprocessing: as ``memad_fast.data.preprocessing`` gives it.
        training: seed, settings, duration: whatever tells how the weights came about.
        data: what the data set was.
        warnings: sentences that whoever uses the run should read.

    Raises:
        RunError: the model's state holds something other than tensors, or a value has no JSON form (NaN, a path).
            What ``Index.save`` raises.
    """
    folder = Path(folder)
    weights = pack_tensors(model.state_dict(), {"model": model.name})
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": _description(model),
        "preprocessing": dict(preprocessing),
        **({} if threshold is None else {"threshold": dict(threshold)}),
        "training": dict(training),
        "data": dict(data or {}),
        "warnings": list(warnings or []),
        "versions": versions(),
        "files": {MODEL_FILE: {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}},
    }
    try:
        checksum(config)
    except (TypeError, ValueError) as error:
        raise RunError(f"{folder / CONFIG_FILE}: a value has no JSON form: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    indexes = save_indexes(folder, model)
    if indexes:
        config["indexes"] = indexes
    config["checksum"] = checksum(config)
    write_bytes(folder / MODEL_FILE, weights)
    write_json(folder / CONFIG_FILE, config)
    delete_all_but(folder, indexes)


def load_run(folder: str | os.PathLike[str], device: str | torch.device = "auto") -> Run:
    """Open the run folder of a detector; every file is checked before it is used.

    Args:
        folder: what ``save_run`` or ``fit`` wrote.
        device: "auto" (a CUDA device where there is one, else the CPU), "cpu", "cuda", "cuda:1".

    Raises:
        RunError: a file is missing, truncated, altered, of a later format version, of an unknown model, of an
            extractor, or does not belong to the other file. The message names the file.
    """
    config = read_config(folder)
    path = Path(folder) / CONFIG_FILE
    model = _load_model(Path(folder), config)
    if not isinstance(model, AnomalyModel):
        raise RunError(f"{path}: a run of {model.name}, which scores nothing: fit a detector with it as a part")
    if "threshold" not in config:
        raise RunError(f"{path}: lacks its section 'threshold'")
    return Run(Path(folder), model.to(resolve_device(device)), config)


def load_extractor(folder: str | os.PathLike[str], device: str | torch.device = "auto") -> TrainedRun:
    """Open the run folder of an extractor, as ``load_run`` opens a detector's.

    Raises:
        RunError: as ``load_run``, or the run is a detector's.
    """
    config = read_config(folder)
    model = _load_model(Path(folder), config)
    if isinstance(model, AnomalyModel):
        raise RunError(f"{Path(folder) / CONFIG_FILE}: a run of the detector {model.name}, expected an extractor's")
    return TrainedRun(Path(folder), model.to(resolve_device(device)), config)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check ``config.json`` alone, without loading the model.

    Raises:
        RunError: missing, not a run's config, of a later version, or altered.
    """
    path = Path(folder) / CONFIG_FILE
    config = parse(
        _read(path), path, what="the config of a memad_fast run", format=FORMAT, version=FORMAT_VERSION, error=RunError
    )
    for section in _SECTIONS:
        if section not in config:
            raise RunError(f"{path}: lacks its section {section!r}")
    return config


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU.

    Raises:
        RunError: the device is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device: {device!s} is not available here: {str(error).splitlines()[0]}") from error
    return resolved


def versions() -> dict[str, str]:
    """What wrote the run."""
    return {"memad_fast": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def pack_tensors(state: Mapping[str, Any], metadata: dict[str, str]) -> bytes:
    """A state dict as safetensors bytes.

    Raises:
        RunError: an entry is not a tensor.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise RunError(f"{name}: a model's state may hold tensors only, got {type(value).__name__}")
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    return safetensors.torch.save(tensors, metadata)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        where = "no such file" if path.parent.is_dir() else f"no such run folder as {path.parent}"
        raise RunError(f"{path}: {where}; a run is what memad-fast fit writes") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error


def _description(model: Trainable) -> dict[str, Any]:
    """What ``models.build`` takes."""
    description = {"name": model.name, "config": dataclasses.asdict(model.config)}
    if isinstance(model, AnomalyModel) and model.given_parts:
        description["parts"] = {name: _description(part) for name, part in model.given_parts.items()}
    return description


def _load_model(folder: Path, config: Mapping[str, Any]) -> Trainable:
    """The network with its weights, in eval mode, on the CPU."""
    model_file = folder / MODEL_FILE
    weights = _read(model_file)
    expected = config["files"][MODEL_FILE]
    if len(weights) != expected["bytes"]:
        raise RunError(
            f"{model_file}: expected {expected['bytes']} bytes, got {len(weights)}: the file is truncated, or another"
            " model's"
        )
    if hashlib.sha256(weights).hexdigest() != expected["sha256"]:
        raise RunError(f"{model_file}: its SHA-256 is not the one in {CONFIG_FILE}: altered, or another model's")
    model = _build(folder, config)
    try:
        model.use_indexes(open_indexes(folder, config.get("indexes", {})))
    except ValueError as error:
        raise RunError(f"{folder / CONFIG_FILE}: names an index that cannot be used: {error}") from error
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise RunError(f"{model_file}: does not hold the weights of model {model.name!r}: {error}") from error
    return model.eval()


def _build(folder: Path, config: Mapping[str, Any]) -> Trainable:
    from memad_fast import models

    name, known = config["model"]["name"], [*models.MODELS, *models.EXTRACTORS]
    if name not in known:
        raise RunError(f"{folder / CONFIG_FILE}: model {name!r} is unknown; known are {', '.join(known)}")
    try:
        return models.build(**config["model"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{folder / CONFIG_FILE}: model {name!r} cannot be built from its config: {error}") from error
