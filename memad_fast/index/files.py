"""The folder of an index: parts that never change once written, and a manifest that says which of them count.

    FOLDER/manifest.json               what the index is, and every part: tensors, size, CRC-32; SHA-256 of itself
    FOLDER/part-<random>.safetensors   tensors of some rows
    FOLDER/prepared.json               the manifest to come, in a folder that changes together with others (``sharded``)
    FOLDER/writer.lock                 host and process that write, for as long as they live

A change of the folder writes new parts, then replaces the manifest: that one rename is the change. Each file is written
under a temporary name, synced and renamed, so that a crash at any byte leaves the state of the last manifest, and files
that no manifest names, which the next writer deletes. Parts that the new manifest leaves out are deleted after it.

What is checked when: opening reads the manifest (SHA-256) and every part's size. The content of a part is compared with
its CRC-32 before its first use, as 64 MiB are read in some 40 ms, and all of a large index in more than the second that
opening may take. CRC-32 finds what disks, copies and crashes do to a file; nothing here guards against someone who
alters a part and the manifest to match.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import math
import mmap
import os
import socket
import uuid
import weakref
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memad_fast import __version__
from memad_fast._atomic import TEMPORARY_SUFFIX, replacing, sync_folder, write_json
from memad_fast._sealed import checksum, parse

FORMAT = "memad_fast index"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREPARED = "prepared.json"
LOCK = "writer.lock"
_BLOCK = 1 << 24  # bytes that are written or checked at once
_STANDS = "the folder keeps the state that was saved last"
_ALIGNMENT = 64  # of the first tensor of a part, as of torch's own memory

# The names of the safetensors format.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class IndexFileError(ValueError):
    """An index folder that cannot be used. The message names the file and what is wrong with it."""


class FolderInUseError(RuntimeError):
    """Another index, here or in another process, writes to the folder. The message names it."""


@dataclass(frozen=True)
class PartRecord:
    """One part, as the manifest names it."""

    file: str
    bytes: int
    crc32: int  # of the whole file
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape, begin and end in the file
    about: dict[str, Any]  # what the index says of it


class Part:
    """An open part: its tensors, on the file's pages.

    It stays readable when the file is deleted, as another process that writes to the folder may.
    """

    def __init__(self, folder: Path, record: PartRecord, *, checked: bool = False) -> None:
        self.record = record
        self.path = folder / record.file
        try:
            size = self.path.stat().st_size
            if size != record.bytes:
                raise IndexFileError(f"{self.path}: expected {record.bytes} bytes, got {size}: torn or truncated")
            # Private pages: nothing is ever written back.
            self._bytes = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        except FileNotFoundError:
            raise IndexFileError(f"{self.path}: no such file, though {MANIFEST} names it") from None
        except (OSError, RuntimeError) as error:
            raise IndexFileError(f"{self.path}: cannot be read: {error}") from error
        self.checked = False
        if checked:
            self._accept()

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the part, on the file's pages; do not write to it. None if the part has no such."""
        if name not in self.record.tensors:
            return None
        entry = self.record.tensors[name]
        content = self._bytes[entry["begin"] : entry["end"]]
        return content.view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def check(self) -> None:
        """Compare the content with the manifest's CRC-32, once.

        Raises:
            IndexFileError: it differs.
        """
        if self.checked:
            return
        crc = 0
        for block in self._bytes.split(_BLOCK):
            crc = zlib.crc32(block.numpy(), crc)
        self.let_go()
        if crc != self.record.crc32:
            raise IndexFileError(
                f"{self.path}: its CRC-32 is {crc:08x}, {MANIFEST} says {self.record.crc32:08x}: torn or altered"
            )
        self._accept()

    def let_go(self, keep: Collection[str] = ()) -> None:
        """Give pages back to the system, which reads them again where they are needed; not those of some tensors."""
        for name in self.record.tensors.keys() - set(keep):
            self._advise(name, mmap.MADV_DONTNEED)

    def _accept(self) -> None:
        self.checked = True
        if "rows" in self.record.tensors:  # read one here, one there from now on: without what lies beside
            self._advise("rows", mmap.MADV_RANDOM)

    def _advise(self, name: str, advice: int) -> None:
        """Madvise for the whole pages of a tensor. Only advice: what the system makes of it changes no result."""
        tensor = self.tensor(name)
        assert tensor is not None
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            _libc.madvise(begin, end - begin, advice)


class Folder:
    """An index folder, as one index sees it: the state that it read or wrote last, and the lock if it writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))
        self.manifest: dict[str, Any] | None = None
        self._lock: int | None = None
        self._closed: str | None = None  # why this index cannot change the folder

    @property
    def exists(self) -> bool:
        """Whether there is an index."""
        return (self.path / MANIFEST).exists()

    def read(self) -> dict[str, Any]:
        """Read and check the manifest.

        Raises:
            IndexFileError: missing, torn, altered, or of a later version.
        """
        self.manifest = _read_manifest(self.path / MANIFEST)
        return self.manifest

    def records(self) -> list[PartRecord]:
        """The parts of the manifest."""
        return [] if self.manifest is None else [PartRecord(**record) for record in self.manifest["parts"]]

    # --- writing ---------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Become the folder's writer, until ``close`` or the end of the process; delete what a crash left.

        Raises:
            FolderInUseError: there is another writer.
            IndexFileError: the folder holds another state than was read or written last.
            OSError: the folder cannot be written.
        """
        if self._lock is not None:
            return
        if self._closed is not None:
            raise IndexFileError(f"{self.path}: {self._closed}")
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            sync_folder(self.path.parent)
        handle = _take_lock(self.path)
        try:
            on_disk = _read_manifest(self.path / MANIFEST) if self.exists else None
            prepared = self.prepared
            if self.manifest != on_disk and (self.manifest is None or self.manifest != prepared):
                what = "holds an index already" if self.manifest is None else "was changed since it was read"
                raise IndexFileError(f"{self.path / MANIFEST}: the folder {what}; open it")
            if prepared is None:
                self._delete_all_but(self.records())
        except BaseException:
            os.close(handle)
            raise
        self._lock = handle
        _held.add(self)
        self._give_back = weakref.finalize(self, _give_lock_back, handle, os.getpid())  # also when forgotten

    def close(self, why: str = "the index was closed; open it again to change it") -> None:
        """Let others write, for good; ``why`` is what this index's further changes are refused with."""
        self._closed = why
        if self._lock is not None:
            self._lock = None
            self._give_back()

    def write_part(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> PartRecord:
        """Write a part, which counts from the next ``commit`` that names it.

        Raises:
            OSError: it could not be written, as on a full disk; the folder is as it was.
        """
        assert self._lock is not None, "only the writer writes"
        # From the widest elements to the narrowest, so that each tensor is aligned to its own.
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        header, start = _header(ordered)
        entries, at = {}, start
        for name, tensor in ordered:
            dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
            entries[name] = {"dtype": dtype, "shape": shape, "begin": at, "end": at + tensor.nbytes}
            at += tensor.nbytes
        name = f"part-{uuid.uuid4().hex[:16]}.safetensors"
        crc = zlib.crc32(header)
        with self._says(f"{name} could not be written; {_STANDS}"), replacing(self.path / name) as file:
            file.write(header)
            for _, tensor in ordered:
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                for block in content.split(_BLOCK):
                    crc = zlib.crc32(block.numpy(), crc)
                    file.write(block.numpy())
        return PartRecord(name, at, crc, entries, dict(about))

    def commit(self, content: Mapping[str, Any], records: Sequence[PartRecord]) -> None:
        """Replace the manifest: from here on the folder holds ``content`` and these parts, whatever happens.

        Raises:
            OSError: it could not be written; the folder is as it was.
        """
        self.manifest = self._write_manifest(MANIFEST, content, records)
        self._delete_all_but(records)

    # A change of several folders, all or none: each prepares; when all have, that is chosen, and settled.

    @property
    def prepared(self) -> dict[str, Any] | None:
        """What is prepared here, on disk.

        Raises:
            IndexFileError: it is torn, altered, or of a later version.
        """
        try:
            return _read_manifest(self.path / PREPARED)
        except IndexFileError:
            if (self.path / PREPARED).exists():
                raise
            return None

    def prepare(self, content: Mapping[str, Any], records: Sequence[PartRecord]) -> dict[str, Any]:
        """Write the manifest that a ``commit`` would, and leave the folder as it was: both states last from here on.

        Raises:
            OSError: it could not be written; the folder is as it was.
        """
        return self._write_manifest(PREPARED, content, records)

    def choose(self, manifest: dict[str, Any] | None) -> None:
        """Say which state counts: that of the folder, or what is prepared."""
        self.manifest = manifest

    def settle(self) -> None:
        """Make what was chosen the only state: what is prepared becomes the manifest, or is deleted.

        Raises:
            OSError: it could not be; both states are still there, and ``settle`` may be called again.
        """
        assert self._lock is not None, "only the writer writes"
        if (prepared := self.prepared) is None:
            return
        with self._says(f"{PREPARED} could not be put in place or deleted; the next change does it"):
            if prepared == self.manifest:
                os.replace(self.path / PREPARED, self.path / MANIFEST)
                sync_folder(self.path)
                self._delete_all_but(self.records())
            else:  # its parts go with the next state: the index may need some for that
                (self.path / PREPARED).unlink()

    def discard(self, record: PartRecord) -> None:
        """Delete a part, unless the manifest still names it, or it cannot be: then the next ``commit`` will."""
        if all(record.file != kept.file for kept in self.records()):
            with contextlib.suppress(OSError):
                (self.path / record.file).unlink()

    def disk_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.path.iterdir()) if self.path.is_dir() else 0

    def _write_manifest(self, name: str, content: Mapping[str, Any], records: Sequence[PartRecord]) -> dict[str, Any]:
        assert self._lock is not None, "only the writer writes"
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "written_by": f"memad_fast {__version__}",
            **content,
            "parts": [dataclasses.asdict(record) for record in records],
        }
        manifest["checksum"] = checksum(manifest)
        with self._says(f"{name} could not be written; {_STANDS}"):
            write_json(self.path / name, manifest)
        return manifest

    def _delete_all_but(self, records: Sequence[PartRecord]) -> None:
        kept = {record.file for record in records}
        for file in self.path.iterdir():
            torn = file.name.startswith(".") and file.name.endswith(TEMPORARY_SUFFIX)
            if torn or (file.name.startswith("part-") and file.name not in kept):
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _says(self, what: str) -> Iterator[None]:
        """Adds to an error of the system what could not be done, and what stands."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {what}", str(self.path)) from error


# --- the manifest --------------------------------------------------------------------------------------------------


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise IndexFileError(f"{path}: no such file; an index folder is what save writes") from None
    except OSError as error:
        raise IndexFileError(f"{path}: cannot be read: {error.strerror}") from error
    what = "the manifest of a memad_fast index"
    return parse(text, path, what=what, format=FORMAT, version=FORMAT_VERSION, error=IndexFileError)


def _header(tensors: Sequence[tuple[str, Tensor]]) -> tuple[bytes, int]:
    """The head of a safetensors file, padded so that the tensors begin at a multiple of ``_ALIGNMENT``; its length.

    Written here and not by the library, which would hold the whole part in memory a second time and aligns to 8 bytes.
    """
    entries, at = {}, 0
    for name, tensor in tensors:
        offsets = [at, at + math.prod(tensor.shape) * tensor.element_size()]
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


# --- the lock ------------------------------------------------------------------------------------------------------


def _take_lock(folder: Path) -> int:
    """A handle that holds the folder's lock until it is closed. The file stays: only its lock says anything."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: the folder can be opened and searched, not changed", str(folder)
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError:
        owner = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "an index that is just being opened"
        os.close(handle)
        raise FolderInUseError(f"{folder}: {owner} writes to it; wait until it is closed, or save elsewhere") from None
    except OSError as error:
        os.close(handle)
        raise OSError(error.errno, f"{error.strerror}: the folder cannot be locked", str(folder / LOCK)) from error
    return handle


def _give_lock_back(handle: int, owner: int) -> None:
    if os.getpid() == owner:  # for all processes that inherited the handle; a child must not
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


_held: weakref.WeakSet[Folder] = weakref.WeakSet()


def _leave_locks_to_the_parent() -> None:
    """In the child of a fork, which is no writer: the lock ends with the parent, whatever becomes of the child."""
    for folder in list(_held):
        folder.close()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def give_back_freed_memory() -> None:
    """Have the C library return what it keeps of freed memory, where it can (glibc).

    The few bytes that every part keeps lie among freed buffers of megabytes, so that these are not used again by
    larger ones: a long build would grow by all that ever passed through it.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
