"""The folders of a ShardedIndex: whatever is killed or fails, and when, all shards open in one state."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import die, die_at
from ranks import run_ranks, start_ranks
from torch import Tensor, distributed

from memad_fast.index import ExactIndex, FolderInUseError, IndexFileError, ShardedIndex

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the ranks"),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo"),
]

DIM = 3
NEVER, MIXED = "no index was saved there", "expected shards of the same save on all ranks, rank 0 has"
State = tuple[int, int]  # the ids of the oldest row, and of the next; ids count on, so that they say what is there


def content_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the values that belong to an id."""
    keys = torch.stack([(ids * factor % 5 - 2).float() for factor in (1, 7, 13)], dim=1)
    return keys, torch.stack((ids, -ids), dim=1).float()


def begin(path: Path) -> ShardedIndex:
    """The index in the folder, or a new one."""
    try:
        return ShardedIndex.open(path, verify="now")
    except IndexFileError as error:
        if NEVER not in str(error):
            raise
        return ShardedIndex(DIM, values_dim=2, chunk_rows=64, path=path)


def state_of(index: ShardedIndex) -> State:
    return index._oldest, index._next


def add(index: ShardedIndex, counts: list[int]) -> None:
    """Rows on each rank."""
    rank = index._ranks.rank
    first = index._next + sum(counts[:rank])
    ids = index.add(*content_of(torch.arange(first, first + counts[rank])))
    assert ids.tolist() == list(range(first, first + counts[rank]))


def assert_whole(index: ShardedIndex, state: State) -> None:
    """It is in this state, and answers what one index does that holds the same."""
    assert state_of(index) == state
    if state[0] == state[1]:
        return
    one = ExactIndex(DIM, values_dim=2)
    ids = torch.arange(*state)
    one.add(*content_of(ids), ids)
    query = torch.randint(-2, 3, (2, DIM)).float()
    for k in (3, len(ids) + 1):
        for got, expected in zip(index.search(query, k), one.search(query, k), strict=True):
            assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1))


def assert_tidy(index: ShardedIndex) -> None:
    """After a save nothing is left of what was cut off."""
    folder = index.shard._folder
    assert folder is not None
    names = {file.name for file in folder.path.iterdir()}
    assert names == {"manifest.json", "writer.lock", *(record.file for record in folder.records())}


# --- killed ---------------------------------------------------------------------------------------------------------


def live(path: Path, seed: int, possible: set[State], say: Callable[[str, State], None], ready: Callable) -> None:
    """Open, then add, remove and save without end; say what will be there before each save, and again after it."""
    index = begin(path)
    assert state_of(index) in possible, (state_of(index), possible)
    assert_whole(index, state_of(index))
    say("saved", state_of(index))
    ready(index._ranks)
    choices = random.Random(seed)
    while True:
        for _ in range(choices.randint(1, 2)):
            add(index, [choices.choice([0, 1, 40, 100]) for _ in range(index._ranks.size)])
        if choices.random() < 0.4:
            index.remove_oldest(choices.randint(0, len(index)))
        say("saving", state_of(index))
        index.save()
        say("saved", state_of(index))


class Lives:
    """One folder through many lives, each of which goes on where the one before was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.possible: set[State] = {(0, 0)}
        self.count = 0
        self.finished = self.taken_back = 0  # saves that were cut off

    def live(self, ready: Callable, kill: Callable[[list[int]], None] = lambda children: None, size: int = 2) -> None:
        pipes = [os.pipe() for _ in range(size)]

        def run(rank: int) -> None:
            def say(word: str, state: State) -> None:
                os.write(pipes[rank][1], f"{word} {state[0]} {state[1]}\n".encode())

            with pytest.raises(RuntimeError, match=r"gloo.*(closed|reset)"):  # another rank was killed
                live(self.folder / "index", self.count, self.possible, say, ready)
            os._exit(3)

        children = start_ranks(size, self.folder, run)
        for _, write in pipes:
            os.close(write)
        kill(children)
        codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        told = "\n".join(file.read_text() for file in sorted(self.folder.glob("group-*/said-*")))
        assert -signal.SIGKILL in codes, (codes, told)
        assert codes <= {-signal.SIGKILL, 3}, (codes, told)
        self.count += 1
        self.hear([os.fdopen(read).read() for read, _ in pipes])

    def hear(self, texts: list[str]) -> None:
        said = [(word, (int(a), int(b))) for text in texts for word, a, b in map(str.split, text.splitlines())]
        if not said:  # killed before it was opened
            return
        opened = said[0][1]
        if len(self.possible) == 2:
            self.finished += opened == max(self.possible)
            self.taken_back += opened == min(self.possible)
        saved = max(state for word, state in said if word == "saved")
        self.possible = {saved, max(state for _, state in said)}


@pytest.mark.parametrize("all_at_once", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_step(tmp_path: Path, after: bool, all_at_once: bool) -> None:
    """One rank, which the others see or not, before and after it syncs, renames, deletes, for the n-th time."""
    lives = Lives(tmp_path)
    for step, numbers in (("fsync", 12), ("replace", 6), ("unlink", 4)):
        for number in range(numbers):

            def ready(ranks: Any, step: str = step, number: int = number) -> None:
                pids = ranks.tell(os.getpid())

                def end() -> None:
                    for pid in pids if all_at_once else []:
                        if pid != os.getpid():
                            os.kill(pid, signal.SIGKILL)
                    die()

                if ranks.rank == number % 2:
                    die_at(step, number, after, end)

            lives.live(ready)
    assert lives.finished > 0
    assert lives.taken_back > 0


def test_killed_at_random_times(tmp_path: Path) -> None:
    import time

    lives, choices = Lives(tmp_path), random.Random(0)
    for _ in range(12):

        def kill(children: list[int]) -> None:
            time.sleep(choices.uniform(0.05, 0.3))
            for child in children:
                os.kill(child, signal.SIGKILL)

        lives.live(lambda ranks: None, kill)


@pytest.mark.parametrize("message", range(3))
def test_a_rank_that_loses_the_others_does_not_take_back_what_they_may_have_agreed_on(
    tmp_path: Path, message: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message arrives everywhere but on rank 0, which gives up; the other goes on until it notices."""

    def run(rank: int) -> None:
        index = begin(tmp_path / "index")
        add(index, [3, 4])
        index.save()
        add(index, [70, 2])
        real, calls = distributed.all_gather, []

        def all_gather(*arguments: Any, **options: Any) -> None:
            real(*arguments, **options)
            calls.append(rank)
            if rank == 0 and len(calls) == message + 1:
                raise RuntimeError("gloo: connection closed")

        monkeypatch.setattr(distributed, "all_gather", all_gather)
        with pytest.raises(RuntimeError, match=r"gloo.*(closed|reset)"):
            index.save()
        with pytest.raises(RuntimeError, match=r"the ranks have lost each other before; start them again"):
            index.stats()
        os._exit(0)

    run_ranks(2, tmp_path, run)

    def open_again(rank: int) -> None:
        assert_whole(ShardedIndex.open(tmp_path / "index", verify="now"), (0, 79) if message == 2 else (0, 7))

    run_ranks(2, tmp_path, open_again)


# --- every state that a crash can leave -----------------------------------------------------------------------------


def snapshots(tmp_path: Path, rank: int) -> tuple[list[Path], list[State]]:
    """Copies of this rank's shard after three saves, and what was there: the last two both follow the first."""
    copies, states = [], []
    index = ShardedIndex(DIM, values_dim=2, chunk_rows=64, path=tmp_path / "made")
    for counts in ([70, 10], [1, 80]):
        add(index, counts)
        index.save()
        copies.append(shutil.copytree(index.shard.path, tmp_path / f"save-{len(copies)}-{rank}"))
        states.append(state_of(index))
    index.close()
    distributed.barrier()
    shutil.rmtree(tmp_path / f"made/{index.shard.path.name}")
    shutil.copytree(copies[0], tmp_path / f"made/{index.shard.path.name}")
    index = ShardedIndex.open(tmp_path / "made")
    add(index, [5, 5])
    index.save()
    copies.append(shutil.copytree(index.shard.path, tmp_path / f"save-{len(copies)}-{rank}"))
    index.close()
    return copies, [*states, state_of(index)]


def lay_out(path: Path, copies: list[Path], current: int | None, prepared: int | None) -> None:
    """A shard's folder in the state of one save, with another prepared."""
    path.mkdir(parents=True, exist_ok=True)
    for number, name in ((current, "manifest.json"), (prepared, "prepared.json")):
        if number is not None:
            for file in copies[number].glob("part-*"):
                shutil.copy(file, path)
            shutil.copy(copies[number] / "manifest.json", path / name)


CASES: list[tuple[tuple, tuple, int | str]] = [  # of each rank: the save in place, the one prepared; what is opened
    ((0, None), (0, None), 0),
    ((0, 1), (0, None), 0),
    ((0, None), (0, 1), 0),
    ((0, 1), (0, 1), 1),
    ((0, 1), (1, None), 1),
    ((1, None), (0, 1), 1),
    ((1, None), (1, None), 1),
    ((0, 1), (0, 2), 0),
    ((0, 2), (0, 2), 2),
    ((None, 0), (None, None), NEVER),
    ((None, 0), (None, 0), 0),
    ((None, 0), (0, None), 0),
    ((None, None), (0, None), MIXED),
    ((0, None), (1, None), MIXED),
    ((0, 1), (2, None), MIXED),
]


def test_every_state_that_a_crash_can_leave(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        copies, states = snapshots(tmp_path, rank)
        for number, case in enumerate(CASES):
            path, opens = tmp_path / f"case-{number}", case[2]
            lay_out(path / f"shard-{rank:03d}-of-002", copies, *case[rank])
            if isinstance(opens, str):
                with pytest.raises(IndexFileError, match=opens):
                    ShardedIndex.open(path)
                if opens == MIXED:
                    continue
            index = begin(path)
            state = (0, 0) if isinstance(opens, str) else states[opens]
            assert_whole(index, state)
            add(index, [70, 1])
            index.remove_oldest(3)
            index.save()
            assert_tidy(index)
            assert_whole(ShardedIndex.open(path, verify="now"), (state[0] + 3, state[1] + 71))

    run_ranks(2, tmp_path, run)


def test_another_index_is_saved_over_every_state_that_a_crash_can_leave(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        copies, states = snapshots(tmp_path, rank)
        for number, case in enumerate(CASES):
            path, opens = tmp_path / f"case-{number}", case[2]
            lay_out(path / f"shard-{rank:03d}-of-002", copies, *case[rank])
            index = ShardedIndex(DIM, values_dim=2, chunk_rows=64, path=tmp_path / f"own-{number}" if rank else None)
            add(index, [2, 1])
            if opens == MIXED:
                with pytest.raises(IndexFileError, match=MIXED):
                    index.save(path)
                continue
            with full_disk("replace", 2) if rank == 0 else contextlib.nullcontext(), pytest.raises(OSError):
                index.save(path)
            if isinstance(opens, int):
                assert_whole(ShardedIndex.open(path, verify="now"), states[opens])
            index.save(path)
            assert_whole(ShardedIndex.open(path, verify="now"), (0, 3))

    run_ranks(2, tmp_path, run)


def test_what_others_finished_since_it_was_opened_is_not_taken_back(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        copies, states = snapshots(tmp_path, rank)
        path = tmp_path / "index"
        shard = path / f"shard-{rank:03d}-of-002"
        lay_out(shard, copies, 0, 1 if rank == 0 else None)
        late = ShardedIndex.open(path)
        assert_whole(late, states[0])
        if rank == 1:
            lay_out(shard, copies, 1, None)
        distributed.barrier()
        for change in (lambda: add(late, [1, 1]), lambda: late.save(), lambda: late.remove_oldest(1)):
            with pytest.raises(IndexFileError, match=r"rank 1: .*the folder was changed since it was read; open it"):
                change()
        assert_whole(late, states[0])
        late.close()
        assert_whole(ShardedIndex.open(path), states[1])

    run_ranks(2, tmp_path, run)


# --- what fails on one rank -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(step: str, number: int) -> Any:
    """The call of a step of ``os`` that ``number`` others go before finds the disk full; yields how many there were."""
    real, calls = getattr(os, step), []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(step)
        if len(calls) == number + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    setattr(os, step, call)
    try:
        yield calls
    finally:
        setattr(os, step, real)


@pytest.mark.parametrize(("step", "times"), [("fsync", 14), ("replace", 8), ("unlink", 4)])
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, step: str, times: int) -> None:
    def run(rank: int) -> None:
        path = tmp_path / "index"
        index = begin(path)
        add(index, [10, 10])
        index.save()
        outcomes = set()
        for number in range(times):
            saved, rows = state_of(index), [70, 3] if number % 2 else [1, 90]
            failing = full_disk(step, number) if rank == 1 else contextlib.nullcontext([])
            with failing as calls:
                try:
                    add(index, rows)
                    index.remove_oldest(20)
                    index.save()
                    error = None
                except OSError as caught:
                    error = caught
            assert (error is not None) == index._ranks.tell(len(calls) > number)[1]
            opened = state_of(ShardedIndex.open(path, verify="now"))
            assert_whole(index, state_of(index))
            if error is not None:
                assert error.errno == errno.ENOSPC
                assert str(error).startswith("[Errno 28] rank 1: No space left on device"), error
                cut_off = state_of(index) == saved or "could not be written; the folder keeps" in str(error)
                assert opened == (saved if cut_off else state_of(index)), error
                outcomes.add(cut_off)
            index.save()
            assert_whole(ShardedIndex.open(path, verify="now"), state_of(index))
        assert outcomes == ({False} if step == "unlink" else {False, True})

    run_ranks(2, tmp_path, run)


def test_another_writer_of_one_shard_is_an_error_on_all(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        index = begin(tmp_path / "index")
        add(index, [5, 5])
        index.save()
        second = ShardedIndex.open(tmp_path / "index")
        if rank == 0:
            index.close()
        for change in (lambda: add(second, [1, 1]), lambda: second.save(), lambda: index.save(tmp_path / "index")):
            with pytest.raises((FolderInUseError, IndexFileError), match=r"rank [01]: .*(writes to it|was closed)"):
                change()
        if rank == 1:
            index.close()
        distributed.barrier()
        add(second, [1, 1])
        second.save()
        assert_whole(ShardedIndex.open(tmp_path / "index"), (0, 12))

    run_ranks(2, tmp_path, run)


def test_a_torn_part_of_one_rank_is_named_on_all(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        path = tmp_path / "index"
        index = begin(path)
        add(index, [70, 70])
        index.save()
        index.close()
        distributed.barrier()
        if rank == 1:
            part = max(index.shard.path.glob("part-*"), key=lambda file: file.stat().st_size)  # the chunk's
            content = bytearray(part.read_bytes())
            content[-100] ^= 1
            part.write_bytes(content)
        distributed.barrier()
        with pytest.raises(IndexFileError, match=r"rank 1: .*part-.* torn or altered"):
            ShardedIndex.open(path, verify="now")
        late = ShardedIndex.open(path)
        for use in (lambda: late.search(torch.zeros(1, DIM)), late.verify):
            with pytest.raises(IndexFileError, match=r"rank 1: .*part-.* torn or altered"):
                use()
        with pytest.raises(ValueError, match=r"ranks 0, 1: verify: "):
            ShardedIndex.open(path, verify="never")

    run_ranks(2, tmp_path, run)


# --- other numbers of ranks, other kinds ----------------------------------------------------------------------------


def test_as_many_ranks_open_it_as_have_saved_it(tmp_path: Path) -> None:
    def save(rank: int) -> None:
        index = begin(tmp_path / "index")
        add(index, [70, 10])
        index.save()
        ExactIndex(DIM).save(tmp_path / "ordinary" / index.shard.path.name)
        distributed.barrier()
        with pytest.raises(IndexFileError, match=r"rank 0: .*manifest.json: no shard; ExactIndex.open opens it"):
            ShardedIndex.open(tmp_path / "ordinary")
        other = tmp_path / "swapped" / f"shard-{rank:03d}-of-002"
        shutil.copytree(tmp_path / "index" / f"shard-{1 - rank:03d}-of-002", other)
        distributed.barrier()
        with pytest.raises(IndexFileError, match=r"rank 0: .*expected shard 0 of 2, got shard 1 of 2"):
            ShardedIndex.open(tmp_path / "swapped")
        with pytest.raises(ValueError, match=r"ranks 0, 1: path: the index has no folder yet"):
            ShardedIndex(DIM).save()

    run_ranks(2, tmp_path, save)

    def open_with_three(rank: int) -> None:
        with pytest.raises(
            IndexFileError, match=r"no index was saved there by 3 ranks, but by 2: open it with as many"
        ):
            ShardedIndex.open(tmp_path / "index")

    run_ranks(3, tmp_path, open_with_three)
    with pytest.raises(IndexFileError, match=r"no index was saved there by 1 ranks, but by 2"):
        ShardedIndex.open(tmp_path / "index")


def test_a_shard_alone_can_be_read_and_copied_not_changed(tmp_path: Path) -> None:
    index = ShardedIndex(DIM, values_dim=2, path=tmp_path)
    add(index, [10])
    index.save()
    index.close()
    shard = ExactIndex.open(tmp_path / "shard-000-of-001")
    assert shard.search(content_of(torch.tensor([3]))[0]).ids.tolist() == [[3]]
    for change in (lambda: shard.remove_oldest(1), shard.save):
        with pytest.raises(IndexFileError, match="it is a shard, which ShardedIndex changes together with the others"):
            change()
    shard.save(tmp_path / "copy")
    assert len(ExactIndex.open(tmp_path / "copy")) == 10
    assert_whole(ShardedIndex.open(tmp_path), (0, 10))


def test_opening_goes_on_when_writers_save_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rank: int) -> None:
        index = begin(tmp_path)
        add(index, [70, 20])
        index.save()
        real, calls = ShardedIndex._from, []

        def late(*arguments: Any) -> ShardedIndex:
            calls.append(rank)
            if len(calls) == 1:
                index.remove_oldest(80)
                index.save()
            return real(*arguments)

        monkeypatch.setattr(ShardedIndex, "_from", late)
        assert_whole(ShardedIndex.open(tmp_path), (80, 90))
        assert len(calls) == 2

    run_ranks(2, tmp_path, run)


def test_readers_beside_writers_always_find_one_state_of_all(tmp_path: Path) -> None:
    def write(rank: int) -> None:
        index = begin(tmp_path / "index")
        while True:
            add(index, [40, 60])
            index.remove_oldest(max(0, len(index) - 300))
            index.save()

    writers = start_ranks(2, tmp_path, write)

    def read(rank: int) -> None:
        states: set[State] = set()
        opened = 0
        while opened < 10 or len(states) < 4:  # as often as it takes to see the writers go on
            with contextlib.suppress(IndexFileError) if opened == 0 else contextlib.nullcontext():
                index = ShardedIndex.open(tmp_path / "index")
                assert_whole(index, state_of(index))
                states.add(state_of(index))
                opened += 1

    try:
        run_ranks(2, tmp_path, read)
        assert os.waitpid(writers[0], os.WNOHANG) == (0, 0), "the writers ended"
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
