"""The checkpoint of an unfinished training: one safetensors file, without pickle, whole or refused.

tensors   model.NAME, optimizer.OBJECTIVE.INDEX.NAME
metadata  "state": JSON of how far the training is, of what was trained, and of its indexes; "sha256" over all of it

Indexes are saved before the checkpoint that names them. So after a crash an index may hold rows that the checkpoint
does not know of, which the model tells by the ids in its state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from memad_fast._atomic import write_bytes
from memad_fast.index import Index
from memad_fast.models.base import Trainable
from memad_fast.scoring.indexes import in_new_folders, open_indexes, save_indexes
from memad_fast.scoring.run import RunError, pack_tensors, read_config

RESUME_FILE = "resume.safetensors"


@dataclass
class Progress:
    """How far a training is; always between two steps."""

    stage: int = 0  # the current one
    step: int = 0  # steps done of the current stage
    seconds: float = 0.0  # spent training, over all sittings
    batches: int = 0  # done of the current epoch
    sums: dict[str, float] = field(default_factory=dict)  # of the current epoch's losses
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # of every stage that is over: what came of it

    def begin(self, stage: int) -> None:
        """Go on to another stage."""
        self.stage, self.step, self.batches, self.sums = stage, 0, 0, {}


@dataclass
class Checkpoint:
    """What a training goes on from: how far it is, and the state of the current stage's optimisers."""

    progress: Progress = field(default_factory=Progress)
    optimizers: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)

    def restore(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser of objective ``name`` its moments back, if there are any."""
        if name in self.optimizers:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.optimizers[name], "param_groups": groups})

    def forget(self) -> None:
        """The optimisers of the stage are done with."""
        self.optimizers.clear()


def save_checkpoint(
    path: Path,
    model: Trainable,
    optimizers: Mapping[str, torch.optim.Optimizer],
    progress: Progress,
    identity: Mapping[str, Any],
) -> None:
    """Replace the checkpoint. ``identity`` is what must be the same for the training to go on."""
    indexes = save_indexes(path.parent, model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for objective, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{objective}.{index}.{name}": value for name, value in values.items()}
    state = json.dumps({"progress": asdict(progress), "identity": identity, "indexes": indexes})
    write_bytes(path, pack_tensors(tensors, {"state": state, "sha256": digest(tensors, state)}))


def load_checkpoint(path: Path, model: Trainable, identity: Mapping[str, Any]) -> Checkpoint:
    """Read the checkpoint into ``model``, and give what else a training goes on from.

    Indexes on which a run in the same folder rests stay as they are: the training goes on in copies.

    Raises:
        RunError: the file is torn or altered, or belongs to a training with another ``identity``.
    """
    cure = "remove it, or fit with resume=False, to train from the start"
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{path}: truncated or altered: {error}; {cure}") from error
    if metadata.get("sha256") != digest(tensors, metadata.get("state", "")):
        raise RunError(f"{path}: altered, its SHA-256 does not match; {cure}")
    state = json.loads(metadata["state"])
    _check_identity(path, state["identity"], json.loads(json.dumps(identity)), cure)
    try:
        indexes = open_indexes(path.parent, state.get("indexes", {}))
        model.use_indexes(_apart_from_the_run(path.parent, indexes))
        model.load_state_dict(_with_prefix(tensors, "model."))
    except ValueError as error:
        raise RunError(f"{path}: names an index that cannot be used: {error}; {cure}") from error
    optimizers: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, value in _with_prefix(tensors, "optimizer.").items():
        objective, index, key = name.split(".", 2)
        optimizers.setdefault(objective, {}).setdefault(int(index), {})[key] = value
    return Checkpoint(Progress(**state["progress"]), optimizers)


def _apart_from_the_run(folder: Path, indexes: dict[str, Index]) -> dict[str, Index]:
    """Copies of the indexes, if a run in the folder names them: what it rests on stays as it is."""
    try:
        named = read_config(folder).get("indexes", {})
    except RunError:
        return indexes
    theirs = {said["folder"] for said in named.values()}
    shared = any(index.path is not None and index.path.name in theirs for index in indexes.values())
    return in_new_folders(folder, indexes) if shared else indexes


def _check_identity(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any], cure: str) -> None:
    for key in [*asked, *(stored.keys() - asked.keys())]:  # the model first: the rest follows from it
        if stored.get(key) != asked.get(key):
            raise RunError(
                f"{path}: belongs to another training, its {key} was {stored.get(key)} and is now {asked.get(key)};"
                f" {cure}"
            )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def digest(tensors: Mapping[str, Tensor], state: str = "") -> str:
    """SHA-256 of tensors with their names, and of a text."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
