"""What the ranks of a ``torch.distributed`` group tell each other: whether a step went well, and rows, bit for bit.

A step that may fail on one rank alone runs under ``caught``, and ``Ranks.agree`` comes after it: the error is then
raised on all ranks, and none waits for one that has given up.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from memad_fast.index.files import FolderInUseError, IndexFileError

_KINDS = (FolderInUseError, IndexFileError, OSError, TypeError, ValueError)  # errors that mean the same on all ranks
_FACTS = 3  # that go with an agreement, at most


class Caught:
    """How a step of this rank went."""

    error: Exception | None = None


@contextlib.contextmanager
def caught() -> Iterator[Caught]:
    """Keeps an error of the block for ``Ranks.agree``."""
    outcome = Caught()
    try:
        yield outcome
    except Exception as error:
        outcome.error = error


class Ranks:
    """This process among those of a group; alone where ``torch.distributed`` is not initialised.

    Tensors travel through memory of the device that the group's backend takes: CUDA's for NCCL, else the CPU's.

    Raises:
        RuntimeError: the environment says that there are several processes, and the group is not initialised.
        ValueError: this process is not in the group.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        self.lost = False  # whether a message failed: what the others know is not known here
        self._group = group
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
            if self.rank < 0:
                raise ValueError("group: this process is not in it")
            if distributed.get_backend(group) == "nccl":
                self.device = torch.device("cuda", torch.cuda.current_device())
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            processes = os.environ["WORLD_SIZE"]
            raise RuntimeError(
                f"WORLD_SIZE says {processes} processes: call torch.distributed.init_process_group in each first"
            )

    def agree(self, step: str, error: Exception | None = None, *facts: int) -> list[list[int]]:
        """What each rank says to a step, in the order of ranks; facts are int64.

        Raises:
            Exception: the first rank's that has an ``error``, on all ranks.
            RuntimeError: the ranks are at different steps.
        """
        if any(not -(2**63) <= fact < 2**63 for fact in facts):
            error, facts = ValueError(f"{step}: expected numbers below 2**63, got {facts}"), (0,) * len(facts)
        if self.size == 1:
            if error is not None:
                raise error
            return [list(facts)]
        said = [zlib.crc32(step.encode()), error is not None, *facts]
        mine = torch.tensor(said + [0] * (2 + _FACTS - len(said)), device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self._talking():
            distributed.all_gather(every, mine, group=self._group)
        steps, failed, *columns = torch.stack(every).T.tolist()
        if len(set(steps)) > 1:
            names = ", ".join(f"rank {rank} in {name}" for rank, name in enumerate(self.tell(step)))
            raise RuntimeError(f"all ranks must call the same methods in the same order; got {names}")
        if any(failed):
            _raise_first(self.tell(None if error is None else _portable(error)), error)
        return [list(row) for row in zip(*columns[: len(facts)], strict=True)]

    def tell(self, what: Any) -> list[Any]:
        """Something small of every rank, in the order of ranks."""
        if self.size == 1:
            return [what]
        every: list[Any] = [None] * self.size
        with self._talking():
            distributed.all_gather_object(every, what, group=self._group)
        return every

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows ``[n, D]`` of all ranks, of which each has its ``counts``, one rank after the other, on each."""
        if self.size == 1:
            return rows
        bits = _bits(rows, self.device)
        parts = [bits if rank == self.rank else bits.new_empty(n, bits.shape[1]) for rank, n in enumerate(counts)]
        with self._talking():
            under_way = [
                distributed.broadcast(part, group=self._group, group_src=rank, async_op=True)
                for rank, part in enumerate(parts)
                if len(part)
            ]
            for one in under_way:
                one.wait()
        return torch.cat(parts).view(rows.dtype).to(rows.device)

    def exchange(self, counts: Sequence[int], *columns: Tensor) -> list[Tensor]:
        """Give each rank its ``counts`` of the rows ``[sum(counts), ...]``; what this one gets ``[ranks, n, ...]``."""
        if self.size == 1:
            return [column[None] for column in columns]
        each = [_bits(column.flatten(1), self.device) for column in columns]
        bits, count = torch.cat(each, dim=1), counts[self.rank]
        got = bits.new_empty(self.size * count, bits.shape[1])
        with self._talking():
            distributed.all_to_all_single(got, bits, [count] * self.size, list(counts), group=self._group)
        return [
            _bits(part, column.device).view(column.dtype).view(self.size, count, *column.shape[1:])
            for part, column in zip(got.split([part.shape[1] for part in each], dim=1), columns, strict=True)
        ]

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        if self.lost:
            raise RuntimeError("the ranks have lost each other before; start them again, and open what was saved")
        try:
            yield
        except BaseException:
            self.lost = True
            raise


def check_same(name: str, values: Sequence[int]) -> None:
    """An argument is the same on all ranks."""
    if len(set(values)) > 1:
        got = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        raise ValueError(f"{name}: expected the same on all ranks, got {got}")


def _bits(rows: Tensor, device: torch.device) -> Tensor:
    """Rows as bytes, which every backend carries, whatever the dtype."""
    # A clone: contiguous() leaves any stride to a dimension of size 1, and view() takes none but 1.
    return rows.detach().to(device).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _portable(error: Exception) -> tuple[type[Exception], tuple[Any, ...]]:
    """What another rank can raise, and its arguments, the text last but for a file's name."""
    if isinstance(error, OSError):
        return OSError, (error.errno, error.strerror or str(error), error.filename)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), None)
    return (kind, (str(error),)) if kind else (RuntimeError, (f"{type(error).__name__}: {error}",))


def _raise_first(every: Sequence[tuple[type[Exception], tuple[Any, ...]] | None], mine: Exception | None) -> NoReturn:
    """The first error, with the ranks that have it."""
    kind, arguments = next(error for error in every if error is not None)
    ranks = [str(rank) for rank, error in enumerate(every) if error == (kind, arguments)]
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
    if kind is OSError:
        number, text, file = arguments
        raise OSError(number, f"{who}: {text}", file) from mine
    raise kind(f"{who}: {arguments[0]}") from mine
