"""The indexes of a run and of an unfinished training: folders in the run folder, which what rests on them names.

    RUN/index-<random>   one index; config.json names those of the run, resume.safetensors those of the training

A training makes a new folder, and a run takes it over by naming it: to replace a run is still one rename, that of
config.json. A folder that nothing names is what a crash left; the next run that is written deletes it.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memad_fast.index import Index, ShardedIndex, make_index, open_index
from memad_fast.models.base import Trainable

_FOLDER = re.compile(r"index-[0-9a-f]{16}")

IndexChoice = str | Callable[[int, Path], Index]
"""A kind ("exact", or a factory string of FAISS), or what makes an empty index from D and the folder it writes to."""

Named = Mapping[str, Mapping[str, Any]]  # what save_indexes gave, read back


def start_indexes(run: Path, model: Trainable, choice: IndexChoice | None) -> None:
    """Give the model the indexes that a training begins with: new ones, or copies of those that it has.

    Raises:
        ValueError: the model has no use for ``choice``, or has an index that no training can go on with.
    """
    if choice is not None:
        model.use_indexes({name: _new_index(run, dim, choice) for name, dim in model.fitted_indexes.items()})
        return
    for name, index in model.indexes.items():
        if _is_in(run, index):
            raise ValueError(f"index: that of the model is part of the run in {run}; fit a new model, or elsewhere")
        folder = _new_folder(run)
        index.save(folder)
        if index.path != folder:  # of one that is in RAM alone it is now the folder
            model.use_indexes({name: open_index(folder)})


def check_indexes(run: Path, model: Trainable, choice: IndexChoice | None) -> None:
    """Raises ValueError where a training could not keep the model's indexes, or not make those that were asked for."""
    if choice is not None and not model.fitted_indexes:
        raise ValueError(f"index: {model.name} has no memory that a training could fill an index for")
    for name, index in model.indexes.items():
        if choice is not None:
            if not _is_in(run, index):  # else of a training before
                raise ValueError("index: expected none, since the model has one already")
        elif name not in model.fitted_indexes:
            raise ValueError(
                f"index: the memory {name!r} of {model.name} changes with every step, and an index cannot go back to a"
                " checkpoint; train without, then use_indexes"
            )
        elif len(index) == 0:
            raise ValueError("index: that of the model is empty; let the training make it: fit(..., index='exact')")


def save_indexes(run: Path, model: Trainable) -> dict[str, dict[str, Any]]:
    """Save the model's indexes in the run folder; what names them in config.json or in a checkpoint.

    One that has its folder there is brought up to date, of others a copy is made.

    Raises:
        ValueError: an index that is spread over processes, which no one of them can open again. What ``Index.save``
            raises.
    """
    named = {}
    for name, index in model.indexes.items():
        if isinstance(index, ShardedIndex):
            raise ValueError(f"index: expected one of a single process to keep in {run}, got {index!r}; save it itself")
        if _is_in(run, index):
            assert index.path is not None
            folder = index.path
            index.save()
        else:
            folder = _new_folder(run)
            index.save(folder)
        named[name] = {"folder": folder.name, "rows": len(index)}
    return named


def open_indexes(run: Path, named: Named) -> dict[str, Index]:
    """Open what ``save_indexes`` named.

    Raises:
        IndexFileError: one is missing, torn or altered. It is named.
    """
    return {name: open_index(run / str(said["folder"])) for name, said in named.items()}


def in_new_folders(run: Path, indexes: Mapping[str, Index]) -> dict[str, Index]:
    """Copies of saved indexes, in folders of their own."""
    copies = {}
    for name, index in indexes.items():
        folder = _new_folder(run)
        index.save(folder)
        copies[name] = open_index(folder)
    return copies


@contextmanager
def closing_indexes(run: Path, model: Trainable) -> Iterator[None]:
    """Let others write to the model's indexes in the run folder, however the block ends."""
    try:
        yield
    finally:
        for index in model.indexes.values():
            if _is_in(run, index):
                index.close()


def delete_all_but(run: Path, named: Named) -> None:
    """Delete the folders of indexes that are not named. Who has one open can read on."""
    kept = {str(said["folder"]) for said in named.values()}
    for folder in run.iterdir():
        if _FOLDER.fullmatch(folder.name) and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _new_index(run: Path, dim: int, choice: IndexChoice) -> Index:
    folder = _new_folder(run)
    if isinstance(choice, str):
        return make_index(choice, dim, path=folder)
    index = choice(dim, folder)
    if not isinstance(index, Index) or len(index) or index.path != folder:
        raise ValueError(f"index: expected a function that makes an empty index with path={folder}, got {index!r}")
    return index


def _new_folder(run: Path) -> Path:
    return Path(os.path.realpath(run)) / f"index-{uuid.uuid4().hex[:16]}"


def _is_in(run: Path, index: Index) -> bool:
    return index.path is not None and index.path.parent == Path(os.path.realpath(run))
