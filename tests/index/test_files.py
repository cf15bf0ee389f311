"""The folder of an index: what was saved comes back bit for bit, what is damaged is refused by name, one writes."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from remembered import Remembered, assert_same

from memad_fast._sealed import checksum
from memad_fast.index import ExactIndex, FolderInUseError, IndexFileError
from memad_fast.index import stored as stored_module
from memad_fast.index.files import LOCK, MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread")


def grow(index: ExactIndex, expected: Remembered, count: int, own_ids: bool = False) -> None:
    keys, values = torch.randint(-2, 3, (count, 3)).float(), torch.randn(count, 2)
    ids = index._next_id + torch.randperm(count) if own_ids else None
    expected.add(keys, index.add(keys, values, ids), values)


def saved(path: Path, own_ids: bool = True) -> Remembered:
    """An index on disk: two full chunks, and a tail in two parts."""
    index, expected = ExactIndex(3, values_dim=2, chunk_rows=64, path=path), Remembered(3)
    grow(index, expected, 150, own_ids)
    index.save()
    grow(index, expected, 5, own_ids)
    index.save()
    index.close()
    return expected


def parts(path: Path) -> list[Path]:
    return [path / record["file"] for record in json.loads((path / MANIFEST).read_text())["parts"]]


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def rewrite_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest["checksum"] = checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


# --- what is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_what_was_saved_comes_back(
    tmp_path: Path, own_ids: bool, mmap: bool, dtype: torch.dtype, values_dtype: torch.dtype
) -> None:
    index = ExactIndex(5, metric="ip", dtype=dtype, values_dim=3, values_dtype=values_dtype, capacity=300)
    keys, values = torch.randn(400, 5).to(dtype), torch.randint(0, 2, (400, 3)).to(values_dtype)
    index.add(keys, values, torch.randperm(400) + 9 if own_ids else None)
    index.save(tmp_path / "index")
    again = ExactIndex.open(tmp_path / "index", mmap=mmap)
    assert (again.metric, again.capacity, again.dim, len(again)) == ("ip", 300, 5, 300)
    query = torch.randn(9, 5).to(dtype)
    for got, expected in zip(again.search(query, 5), index.search(query, 5), strict=True):
        assert torch.equal(got, expected)  # type: ignore[arg-type]
    assert again.search(query).values.dtype == values_dtype  # type: ignore[union-attr]


def test_parts_are_safetensors_whose_tensors_are_aligned(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    rows = []
    for file in parts(tmp_path):
        tensors = safetensors.torch.load_file(file)
        rows.append(tensors["rows"])
        assert tensors.keys() >= {"rows", "ids", "values"}
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0
    assert torch.equal(torch.cat(rows), expected.keys)


def test_the_manifest_says_what_the_index_is_in_words(tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert (manifest["kind"], manifest["dim"], manifest["dtype"], manifest["rows"]) == ("exact", 3, "float32", 155)
    assert [part["about"]["role"] for part in manifest["parts"]] == ["chunk", "chunk", "tail", "tail"]
    assert manifest["parts"][0]["tensors"]["rows"]["shape"] == [64, 3]


def test_saving_again_writes_new_rows_alone(tmp_path: Path) -> None:
    index, expected = ExactIndex(3, values_dim=2, chunk_rows=64, path=tmp_path), Remembered(3)
    most = 0
    kept: dict[str, int] = {}
    for _ in range(100):
        grow(index, expected, 3)
        index.save()
        files = {file.name: file.stat().st_ino for file in parts(tmp_path)}
        chunks = {name: inode for name, inode in kept.items() if name in files}
        assert all(files[name] == inode for name, inode in chunks.items())
        kept = files
        tails = [
            part for part in json.loads((tmp_path / MANIFEST).read_text())["parts"] if part["about"]["role"] == "tail"
        ]
        most = max(most, len(tails))
        assert names(tmp_path) == {*files, MANIFEST, LOCK}
    assert 2 <= most <= 7  # log2 of a chunk
    before = names(tmp_path)
    index.save()
    assert names(tmp_path) == before
    index.close()
    assert_same(ExactIndex.open(tmp_path), expected)


def test_rows_that_are_gone_leave_the_disk(tmp_path: Path) -> None:
    index, expected = ExactIndex(3, values_dim=2, capacity=200, path=tmp_path), Remembered(3, capacity=200)
    for _ in range(30):
        grow(index, expected, 90)
    assert len(names(tmp_path)) < 12  # those that no manifest named went at once
    index.save()
    assert len(names(tmp_path)) < 12
    index.remove_oldest(200)
    index.save()
    assert names(tmp_path) == {MANIFEST, LOCK}
    index.close()
    again = ExactIndex.open(tmp_path)
    assert len(again) == 0
    assert again.add(torch.zeros(1, 3), torch.zeros(1, 2)).tolist() == [2700]


def test_every_file_is_synced_before_its_name_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ExactIndex(3, values_dim=2, chunk_rows=64, path=tmp_path)
    index.add(torch.randn(70, 3), torch.randn(70, 2))
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(handle: int) -> None:
        steps.append("sync folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "sync file")
        fsync(handle)

    def recording_replace(source: str, target: Path) -> None:
        steps.append("name manifest" if Path(target).name == MANIFEST else "name part")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    index.save()
    part, manifest = (["sync file", f"name {what}", "sync folder"] for what in ("part", "manifest"))
    assert steps == [*part, *manifest]


def test_saving_elsewhere_makes_a_copy_and_replaces_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path / "old")
    index, expected = ExactIndex(3, values_dim=2, chunk_rows=64, path=tmp_path / "own"), Remembered(3)
    grow(index, expected, 100)
    index.save(tmp_path / "old")
    assert_same(ExactIndex.open(tmp_path / "old"), expected)
    assert len(parts(tmp_path / "old")) == 2
    assert names(tmp_path / "old") == {MANIFEST, LOCK, *(file.name for file in parts(tmp_path / "old"))}
    grow(index, expected, 1)
    index.save()
    assert len(ExactIndex.open(tmp_path / "old")) == 100
    assert len(ExactIndex.open(tmp_path / "own")) == 101


def test_an_index_in_ram_takes_its_first_folder_as_its_own(tmp_path: Path) -> None:
    index, expected = ExactIndex(3, values_dim=2, chunk_rows=64), Remembered(3)
    grow(index, expected, 100)
    ram = index.stats().ram_bytes
    index.save(tmp_path / "a" / "b")
    assert index.stats().ram_bytes == ram
    first = parts(tmp_path / "a" / "b")[0]
    grow(index, expected, 100)
    index.save()
    assert parts(tmp_path / "a" / "b")[0] == first
    assert_same(ExactIndex.open(tmp_path / "a" / "b"), expected)


def test_a_folder_with_an_index_is_opened_not_begun(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(IndexFileError, match=r"manifest.json: the folder holds an index already; open it"):
        ExactIndex(3, path=tmp_path)


def test_codes_of_another_version_are_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved(tmp_path)
    real = stored_module._codes_version
    monkeypatch.setattr(stored_module, "_codes_version", lambda: "later")
    index = ExactIndex.open(tmp_path)
    assert_same(index, expected)
    grow(index, expected, 100)
    index.save()
    index.close()
    for version in ("later", real()):
        monkeypatch.setattr(stored_module, "_codes_version", lambda version=version: version)
        assert_same(ExactIndex.open(tmp_path), expected)


# --- what is damaged ----------------------------------------------------------------------------------------------


def test_a_manifest_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    for length in [*range(0, len(content) - 3, 97), len(content) - 3, len(content) - 2]:
        (tmp_path / MANIFEST).write_bytes(content[:length])
        with pytest.raises(IndexFileError, match=r"manifest.json: not valid JSON, truncated or altered"):
            ExactIndex.open(tmp_path)


def test_a_manifest_altered_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    for at in range(0, len(content), 31):
        altered = bytearray(content)
        altered[at] = ord("7") if altered[at] != ord("7") else ord("8")
        (tmp_path / MANIFEST).write_bytes(bytes(altered))
        with pytest.raises(
            IndexFileError, match=r"manifest.json: (not|altered|format version \d+ was written by a later)"
        ):
            ExactIndex.open(tmp_path)


def landmarks(file: Path) -> dict[str, int]:
    """A byte of every kind that a part has."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    inside = {name: start + sum(entry["data_offsets"]) // 2 for name, entry in header.items()}
    return {"length": 3, "header": 8 + 5, "padding": start - 1, "first": start, **inside, "last": len(content) - 1}


@pytest.mark.parametrize("number", range(4))  # chunks and parts of the tail
def test_a_part_cut_anywhere_is_refused_by_name(tmp_path: Path, number: int) -> None:
    saved(tmp_path)
    file = parts(tmp_path)[number]
    content = file.read_bytes()
    for length in (0, *landmarks(file).values()):
        file.write_bytes(content[:length])
        with pytest.raises(IndexFileError, match=rf"{file.name}: expected \d+ bytes, got {length}: torn or truncated"):
            ExactIndex.open(tmp_path)
    file.write_bytes(content + b"\0")
    with pytest.raises(IndexFileError, match=rf"{file.name}: expected \d+ bytes"):
        ExactIndex.open(tmp_path)
    file.unlink()
    with pytest.raises(IndexFileError, match=rf"{file.name}: no such file, though manifest.json names it"):
        ExactIndex.open(tmp_path)


@pytest.mark.parametrize("number", range(4))
def test_a_part_altered_anywhere_is_never_searched(tmp_path: Path, number: int) -> None:
    saved(tmp_path)
    file = parts(tmp_path)[number]
    content = file.read_bytes()
    uses: list[Callable[[ExactIndex], object]] = [
        lambda index: index.search(torch.zeros(1, 3)),
        lambda index: index.rows([0]),
        lambda index: list(index.pieces()),
        lambda index: index.verify(),
        lambda index: index.save(tmp_path.with_name("copy")),
        lambda index: index.add(torch.zeros(1, 3), torch.zeros(1, 2), [10**6]),
    ]
    for at in landmarks(file).values():
        altered = bytearray(content)
        altered[at] ^= 1
        file.write_bytes(bytes(altered))
        for options in ({"mmap": False}, {"verify": "now"}):
            assert_refused(file, lambda options=options: ExactIndex.open(tmp_path, **options))
        if number > 1:  # the tail is read at once
            assert_refused(file, lambda: ExactIndex.open(tmp_path))
            continue
        for use in uses:
            index = ExactIndex.open(tmp_path)
            for _ in range(2):  # nor the second time
                assert_refused(file, lambda use=use, index=index: use(index))
            index.close()


def assert_refused(file: Path, use: Callable[[], object]) -> None:
    with pytest.raises(IndexFileError, match=rf"{file.name}: its CRC-32 is .*: torn or altered"):
        use()


def test_sizes_alone_are_looked_at_where_that_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    file = parts(tmp_path)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    index = ExactIndex.open(tmp_path, verify="sizes")
    index.search(torch.zeros(1, 3))
    with pytest.raises(IndexFileError, match=file.name):
        index.verify()
    with pytest.raises(ValueError, match=r"verify: expected one of first_use, now, sizes, got 'never'"):
        ExactIndex.open(tmp_path, verify="never")


def test_parts_that_changed_places_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    first, second, *_ = parts(tmp_path)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(IndexFileError, match="torn or altered"):
        ExactIndex.open(tmp_path).search(torch.zeros(1, 3))


def test_later_versions_other_formats_and_other_kinds_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for changes, message in (
        ({"format_version": 2}, r"format version 2 was written by a later memad_fast; .* upgrade memad_fast"),
        ({"format_version": "1"}, r"altered, format_version is '1'"),
        ({"format": "other"}, r"not the manifest of a memad_fast index"),
        (
            {"format": "memad_fast index", "format_version": 1, "kind": "IVF"},
            r"expected an index of kind 'exact', got 'IVF'",
        ),
    ):
        rewrite_manifest(tmp_path, **changes)
        with pytest.raises(IndexFileError, match=message):
            ExactIndex.open(tmp_path)


# --- what cannot be written -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more, as a full disk does: in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 1500, 3000])
def test_a_disk_that_fills_leaves_the_last_state_and_the_index_whole(tmp_path: Path, size: int) -> None:
    """Whether a chunk, a part of the tail or the manifest does not fit."""
    index, expected = ExactIndex(3, values_dim=2, chunk_rows=64, path=tmp_path), Remembered(3)
    grow(index, expected, 150)
    index.save()
    before, files = Remembered(3), names(tmp_path)
    before.add(expected.keys, expected.ids, expected.values)
    with (
        files_of_at_most(size),
        pytest.raises(OSError, match="the folder keeps the state that was saved last") as raised,
    ):
        index.add(torch.zeros(200, 3), torch.zeros(200, 2))  # fills chunks
    assert raised.value.errno == errno.EFBIG
    assert str(tmp_path) in str(raised.value)
    assert_same(index, expected)  # all or none
    assert names(tmp_path) == files
    grow(index, expected, 3)
    with files_of_at_most(size), pytest.raises(OSError, match="the folder keeps the state that was saved last"):
        index.save()
    assert_same(index, expected)
    assert_same(ExactIndex.open(tmp_path), before)
    index.save()
    index.close()
    assert_same(ExactIndex.open(tmp_path), expected)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ExactIndex(3, values_dim=2, path=tmp_path)
    index.add(torch.zeros(1, 3), torch.zeros(1, 2))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"No space left on device: part-\w+.safetensors could not be written; .*"
    ) as raised:
        index.save()
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("own_ids", [False, True])
def test_an_add_that_fails_between_two_chunks_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_ids: bool
) -> None:
    index = ExactIndex(3, values_dim=2, chunk_rows=64, capacity=150, path=tmp_path)
    expected = Remembered(3, capacity=150)
    grow(index, expected, 150, own_ids)
    index.save()
    files, fsync, calls = names(tmp_path), os.fsync, 0
    following = index._next_id

    def full_later(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first chunk: file, folder; the second: file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full_later)
    ids = torch.arange(following, following + 149) if own_ids else None
    calls = 1
    with pytest.raises(OSError, match="No space left"):
        index.add(torch.ones(149, 3), torch.ones(149, 2), ids)
    monkeypatch.setattr(os, "fsync", fsync)
    assert names(tmp_path) == files
    assert_same(index, expected)
    keys, values = torch.randint(-2, 3, (149, 3)).float(), torch.randn(149, 2)
    expected.add(keys, index.add(keys, values, ids), values)
    assert int(expected.ids[-1]) == following + 148
    assert_same(index, expected)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the superuser's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written_can_be_searched() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        path = Path(folder) / "read_only"
        expected = saved(path)
        (path / LOCK).unlink()
        path.parent.chmod(0o755)
        path.chmod(0o555)
        with as_nobody():
            for mmap in (True, False):
                index = ExactIndex.open(path, mmap=mmap)
                assert_same(index, expected)
                for change in (
                    lambda index=index: index.add(torch.zeros(1, 3), torch.zeros(1, 2)),
                    lambda index=index: index.remove_oldest(1),
                    lambda index=index: index.save(),
                ):
                    with pytest.raises(PermissionError, match="the folder can be opened and searched, not changed"):
                        change()
                assert_same(index, expected)
        path.chmod(0o755)


def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ExactIndex(3, path=tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        ExactIndex(3, path=tmp_path / "file" / "index")


# --- one writer -------------------------------------------------------------------------------------------------

ANOTHER_WRITER = """
import sys, torch
from memad_fast.index import ExactIndex
index = ExactIndex.open(sys.argv[1])
index.add(torch.zeros(1, 3), torch.zeros(1, 2))
print("adding", flush=True)
sys.stdin.read()
"""


def test_the_second_writer_is_refused_with_the_owner_named_until_that_one_dies(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    mine = ExactIndex.open(tmp_path)
    command = [sys.executable, "-c", ANOTHER_WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "adding\n"
        owner = rf"process {other.pid} on {socket.gethostname()} writes to it"
        for change in (
            lambda: mine.add(torch.zeros(1, 3), torch.zeros(1, 2)),
            lambda: mine.remove_oldest(1),
            lambda: mine.merge([]),
            lambda: mine.save(),
            lambda: ExactIndex(3).save(tmp_path),
            lambda: ExactIndex(3, path=tmp_path),
        ):
            with pytest.raises(FolderInUseError, match=owner):
                change()
        assert_same(mine, expected)
        other.kill()
        other.wait()
    grow(mine, expected, 1)
    mine.save()
    assert_same(ExactIndex.open(tmp_path), expected)


def test_the_lock_ends_with_close_with_the_index_and_with_the_parent_of_a_fork(tmp_path: Path) -> None:
    saved(tmp_path)
    first = ExactIndex.open(tmp_path)
    first.remove_oldest(1)
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
        ExactIndex.open(tmp_path).remove_oldest(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # as a worker that outlives the writer
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        first.close()
        second = ExactIndex.open(tmp_path)
        second.remove_oldest(1)
        del second
        gc.collect()
        third = ExactIndex.open(tmp_path)
        third.remove_oldest(1)
        third.save()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)
    with pytest.raises(IndexFileError, match="the index was closed; open it again to change it"):
        first.remove_oldest(1)


def test_a_child_of_a_fork_is_no_writer(tmp_path: Path) -> None:
    index = ExactIndex(3, values_dim=2, path=tmp_path)
    child = os.fork()
    if child == 0:
        try:
            index.add(torch.zeros(1, 3), torch.zeros(1, 2))
        except IndexFileError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_who_opened_before_another_saved_is_told_to_open_again(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    late, early = ExactIndex.open(tmp_path), ExactIndex.open(tmp_path)
    early.remove_oldest(70)
    early.save()
    early.close()
    with pytest.raises(IndexFileError, match=r"the folder was changed since it was read; open it"):
        late.remove_oldest(1)
    assert_same(late, expected)  # parts that were deleted meanwhile are still there for it


def test_opening_goes_on_when_a_writer_replaces_the_manifest_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tmp_path)
    writer = ExactIndex.open(tmp_path)
    real = ExactIndex._from

    def late(*arguments: Any, **options: Any) -> ExactIndex:
        if len(writer) == 155:
            writer.remove_oldest(100)
            writer.save()
        return real(*arguments, **options)

    monkeypatch.setattr(ExactIndex, "_from", late)
    expected.remove_oldest(100)
    assert_same(ExactIndex.open(tmp_path), expected)


def test_a_writer_deletes_what_a_crash_left_a_reader_does_not(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    left = {"part-0123456789abcdef.safetensors", ".manifest.json.abc.tmp", ".part-00.safetensors.xyz.tmp"}
    for name in (*left, "notes.txt"):
        (tmp_path / name).write_bytes(b"torn")
    index = ExactIndex.open(tmp_path)
    assert_same(index, expected)
    assert names(tmp_path) >= left
    index.save()
    assert not names(tmp_path) & left
    assert "notes.txt" in names(tmp_path)
