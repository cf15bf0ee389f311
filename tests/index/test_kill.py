"""An index whose process is killed, at any moment and at every step: nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from dying import STEPS, die_at
from remembered import Remembered, assert_same

from memad_fast.index import ExactIndex, FaissIndex, IndexFileError, faiss_index, open_index

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill"),
]

DIM = 3


def content_of(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the values that belong to an id."""
    keys = torch.stack([(ids * factor % 5 - 2).float() for factor in (1, 7, 13)], dim=1)
    return keys, torch.stack((ids, -ids), dim=1).float()


def new_exact(path: Path) -> ExactIndex:
    return ExactIndex(DIM, values_dim=2, chunk_rows=64, path=path)


def new_faiss(path: Path) -> FaissIndex:
    """One that looks at all rows."""
    options = {"settings": {"nprobe": 4}, "rerank": 10**6, "training_rows": 20}
    return FaissIndex(DIM, "IVF4,Flat", values_dim=2, chunk_rows=64, path=path, **options)


New = Callable[[Path], ExactIndex | FaissIndex]


@pytest.fixture(params=[new_exact, new_faiss], ids=["exact", "faiss"])
def new(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> New:
    """What makes an index: every test, of each kind."""
    if request.param is new_faiss:
        pytest.importorskip("faiss", reason="FaissIndex needs faiss-cpu or faiss-gpu")
        monkeypatch.setattr(faiss_index, "_PART_BYTES", 8000)  # several at a save
    return request.param


def begin(path: Path, new: New) -> ExactIndex | FaissIndex:
    """The index in the folder, or a new one."""
    return open_index(path) if (path / "manifest.json").exists() else new(path)  # type: ignore[return-value]


def live(path: Path, seed: int, say: Callable[[str, int, int], None], new: New) -> None:
    """Add, remove and save without end; say what will be there before each save, and again after it."""
    choices = random.Random(seed)
    index = begin(path, new)
    oldest, following = (0, 0) if len(index) == 0 else (int(next(index.pieces()).ids[0]), index._next_id)
    while True:
        for _ in range(choices.randint(1, 3)):
            ids = torch.arange(following, following + choices.choice([1, 5, 40, 150]))
            listed = ids if choices.random() < 0.5 else None
            index.add(*content_of(ids), listed)
            following += len(ids)
        if choices.random() < 0.4:
            count = choices.randint(0, len(index) - 1)
            index.remove_oldest(count)
            oldest += count
        say("saving", oldest, following)
        index.save()
        say("saved", oldest, following)


def life_and_death(
    path: Path, seed: int, kill: Callable[[int], None], prepare: Callable[[], None], new: New
) -> list[str]:
    """Run ``live`` in a child until ``kill(child)`` has ended it; what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            prepare()
            live(path, seed, lambda *words: os.write(write, (" ".join(map(str, words)) + "\n").encode()) and None, new)
        finally:
            os._exit(1)
    os.close(write)
    kill(child)
    with os.fdopen(read) as pipe:
        said = pipe.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, said
    return said


def assert_nothing_is_lost(path: Path, said: list[str], before: tuple[int, int]) -> tuple[int, int]:
    """The folder holds what was acknowledged last, or what was being saved then: bit for bit, and searches it."""
    states = [before]
    saved = before
    for line in said:
        word, oldest, following = line.split()
        states.append((int(oldest), int(following)))
        if word == "saved":
            saved = states[-1]
    possible = {saved, states[-1]}
    try:
        index = open_index(path)
        index.verify()  # type: ignore[attr-defined]
    except IndexFileError:
        assert (0, 0) in possible, "the index is gone"
        assert not (path / "manifest.json").exists()
        return 0, 0
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *(piece.ids for piece in index.pieces())])
    state = (int(ids[0]), int(ids[-1]) + 1)
    assert state in possible, (state, possible)
    expected = Remembered(DIM)
    every = torch.arange(*state)
    expected.add(*(lambda keys, values: (keys, every, values))(*content_of(every)))
    assert_same(index, expected)
    return state


def test_killed_at_random_times(tmp_path: Path, new: New) -> None:
    """One folder through many lives; each goes on where the one before was killed."""
    choices = random.Random(0)
    state, saves = (0, 0), 0
    for life in range(30):

        def kill(child: int) -> None:
            time.sleep(choices.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)

        said = life_and_death(tmp_path / "index", life, kill, lambda: None, new)
        saves += sum(line.startswith("saved") for line in said)
        state = assert_nothing_is_lost(tmp_path / "index", said, state)
    assert saves > 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_every_step(tmp_path: Path, step: str, after: bool, new: New) -> None:
    """Before and after the first, second, ... time that a file is written to, synced, renamed, deleted."""

    def wait(child: int) -> None:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    state = (0, 0)
    for number in range(14):
        said = life_and_death(tmp_path / "index", number, wait, partial(die_at, step, number, after), new)
        state = assert_nothing_is_lost(tmp_path / "index", said, state)
    assert state[1] > 0 or step == "open"


def test_the_folder_is_tidy_after_all_deaths(tmp_path: Path, new: New) -> None:
    """What the killed left is deleted by the next writer."""

    def kill(child: int) -> None:
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)

    state = (0, 0)
    for life in range(5):
        state = assert_nothing_is_lost(
            tmp_path / "index", life_and_death(tmp_path / "index", life, kill, lambda: None, new), state
        )
    index = begin(tmp_path / "index", new)
    index.add(*content_of(torch.arange(state[1], state[1] + 1)))
    index.save()
    assert index._folder is not None
    names = {file.name for file in (tmp_path / "index").iterdir()}
    assert names == {"manifest.json", "writer.lock", *(record.file for record in index._folder.records())}


def test_a_reader_beside_a_writer_always_finds_a_whole_state(tmp_path: Path, new: New) -> None:
    """Parts that it is about to open may be deleted under its hands."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            index = new(tmp_path)
            for first in range(0, 10**9, 100):
                index.add(*content_of(torch.arange(first, first + 100)))
                index.remove_oldest(max(0, len(index) - 500))
                index.save()
                if first == 0:
                    os.write(write, b"!")
        finally:
            os._exit(1)
    os.read(read, 1)
    states: set[int] = set()
    opened = 0
    try:
        while opened < 40 or len(states) < 6:  # as often as it takes on a busy machine to see the writer go on
            assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "the writer ended"
            opened += 1
            index = open_index(tmp_path)
            ids = torch.cat([piece.ids for piece in index.pieces()])
            expected = Remembered(DIM)
            expected.add(content_of(ids)[0], torch.arange(int(ids[0]), int(ids[-1]) + 1), content_of(ids)[1])
            assert_same(index, expected)
            states.add(int(ids[-1]))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
