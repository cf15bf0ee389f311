"""Keys packed once for many searches: what ``nearest_keys`` otherwise computes from the keys at every call.

The packed form holds the centred keys as int8 codes, and per key the scale of its codes and the numbers that bound the
error of a score. It has two layouts: one for every instruction set of CPUs (csrc/cpu/nearest_keys.h draws it), one for
every GPU, whichever backend serves it (kernels/prepare_keys.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memad_fast._arguments import METRICS, check_choice
from memad_fast._backend import serves_reference
from memad_fast._checks import check_float, check_like, check_rank, check_size, check_tensor
from memad_fast._library import call, define, write


def packed_bytes(rows: int, width: int, *, on_gpu: bool) -> int:
    """The size of the packed form of keys ``[rows, width]``."""
    if on_gpu:  # Layout of kernels/prepare_keys.py: codes and five numbers a key, then the centre
        padded, columns = _round_up(rows, 128), _round_up(max(width, 1), 64)
        return padded * (columns + 20) + 4 * columns
    # PackedLayout of csrc/cpu/nearest_keys.h: header, centre, six numbers and the codes of each key, room to read
    return 64 + 4 * _round_up(width, 16) + _round_up(rows, 64) * (24 + _round_up(width, 4)) + 4096


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class PreparedKeys:
    """Keys with their packed form; takes the place of ``keys`` in ``nearest_keys`` and ``stcm_lookup``.

    Made by ``prepare_keys``. ``keys`` are the original rows, by reference: the exact stage reads them. Write to them
    through ``overwrite_`` only, which keeps both forms in step; a search after they were changed in place in another
    way is an error (but for inference tensors and under ``torch.compile``, where torch counts no changes).

    To save it, save ``keys`` and prepare again: packing costs one pass. Both parts are plain tensors, so it may also be
    rebuilt as ``PreparedKeys(keys, packed, metric)``, on the kind of device that it was packed on (a ValueError if the
    two lie on different devices).

    Attributes:
        keys: ``[M, D]`` the original rows.
        packed: the opaque packed form (uint8), or None where the reference serves the keys.
        metric: "l2", "cosine" or "ip": the only metric that searches of these keys can use.
    """

    def __init__(self, keys: Tensor, packed: Tensor | None, metric: str) -> None:
        if packed is not None and packed.device != keys.device:
            raise ValueError(f"packed: expected device {keys.device} like keys, got {packed.device}")
        self.keys = keys
        self.packed = packed
        self.metric = metric
        self._version = _version_of(keys)

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form, beside the keys themselves."""
        return 0 if self.packed is None else self.packed.numel()

    @property
    def is_current(self) -> bool:
        """False once the rows were changed in place other than by ``overwrite_``: the packed form is out of step.

        True also where torch counts no changes (see above).
        """
        version = None if self._version is None else _version_of(self.keys)
        return version is None or version == self._version

    def __repr__(self) -> str:
        rows, width = self.keys.shape
        return f"PreparedKeys({rows} x {width}, {self.keys.dtype}, metric={self.metric!r}, nbytes={self.nbytes})"

    def overwrite_(self, rows: int | Tensor, new_keys: Tensor) -> PreparedKeys:
        """Replace rows in place, in the original and in the packed form. Not recorded by autograd.

        Args:
            rows: the first of consecutive rows, or an int64 tensor ``[n]`` of rows. Of a row named twice the last
                stays.
            new_keys: ``[n, D]``, dtype and device of the keys.

        Returns:
            self.

        The centre stays that of ``prepare_keys``: results remain exact whatever is written; if the new rows lie far
        from the old ones, the screen leaves more to the exact stage, and preparing again restores its speed.

        Nothing waits for a GPU: where ``rows`` is a tensor on one, a row outside [0, M) is found there, by the
        device-side assertion of torch's own indexing.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape or device, or consecutive rows that do not fit.
            IndexError: a row of a CPU tensor ``rows`` outside [0, M); nothing is written then.

        Example:
            >>> import torch, memad_fast
            >>> prepared = memad_fast.prepare_keys(torch.zeros(4, 2))
            >>> _ = prepared.overwrite_(1, torch.ones(2, 2))
            >>> memad_fast.nearest_keys(torch.ones(1, 2), prepared)
            (tensor([[0.]]), tensor([[1]]))
        """
        check_float("new_keys", new_keys)
        check_rank("new_keys", new_keys, 2, "[n, D]")
        check_like("new_keys", new_keys, "the prepared keys", self.keys)
        check_size("new_keys", new_keys, 1, self.keys.shape[1], "like the prepared keys")
        count = new_keys.shape[0]
        if isinstance(rows, int):
            if rows < 0 or rows + count > len(self):
                raise ValueError(f"rows: expected {count} rows within 0 to {len(self)}, got {rows} to {rows + count}")
            rows = torch.arange(rows, rows + count, device=self.keys.device)
        else:
            _check_rows(rows, self.keys, count)
            rows, new_keys = _last_of_each(rows, new_keys)
        self.keys.detach().index_copy_(0, rows, new_keys.detach())
        if self.packed is not None:
            write(torch.ops.memad_fast.prepare_keys_rows_.default, self.packed, self.keys, rows, self.metric)
        self._version = _version_of(self.keys)
        return self


def _version_of(keys: Tensor) -> int | None:
    """How often the tensor was changed in place; None where torch does not count."""
    return None if torch.compiler.is_compiling() or keys.is_inference() else keys._version


def _check_rows(rows: object, keys: Tensor, count: int) -> None:
    """``rows`` names ``count`` rows of ``keys``, as far as that is known without waiting for a GPU."""
    check_tensor("rows", rows)
    assert isinstance(rows, Tensor)
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected torch.int64, got {rows.dtype}")
    check_rank("rows", rows, 1, "[n]")
    check_size("rows", rows, 0, count, "like new_keys")
    if rows.device != keys.device:
        raise ValueError(f"rows: expected device {keys.device} like the prepared keys, got {rows.device}")
    if rows.is_cpu and count and not torch.compiler.is_compiling():
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= keys.shape[0]:
            raise IndexError(f"rows: expected 0 to {keys.shape[0] - 1}, got {low} to {high}")


def _last_of_each(rows: Tensor, new_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows in ascending order, each with the last of the new keys it was given.

    A row named twice stays there twice, with the same new key: how many there are is known on the device alone.
    """
    ordered, order = rows.sort(stable=True)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    return ordered, new_keys.index_select(0, order.index_select(0, last))


def prepare_keys(keys: Tensor, *, metric: str = "l2") -> PreparedKeys:
    """Pack keys once for many searches.

    Args:
        keys: ``[M, D]``, M ≥ 1. float32, float16, bfloat16, or float64 (which the reference serves unpacked).
        metric: the metric of the searches: "l2", "cosine" or "ip".

    Returns:
        ``PreparedKeys``, to pass instead of ``keys``. Results are the same bits as with the keys themselves.

    Gradients: none through packing; a search of prepared keys gives its gradients to ``prepared.keys``.

    Cost: one pass over the keys; about M·(D + 24) bytes (on a GPU M·(D + 20)), a quarter of float32 keys.

    Raises:
        TypeError: ``keys`` is not a floating tensor.
        ValueError: ``keys`` is not [M, D] or empty; ``metric`` is unknown.

    Example:
        >>> import torch, memad_fast
        >>> prepared = memad_fast.prepare_keys(torch.eye(3))
        >>> distances, indices = memad_fast.nearest_keys(torch.tensor([[0.0, 0.0, 2.0]]), prepared)
        >>> distances, indices
        (tensor([[1.]]), tensor([[2]]))
    """
    check_float("keys", keys)
    check_rank("keys", keys, 2, "[M, D]")
    if keys.shape[0] == 0:
        raise ValueError(f"keys: expected at least 1 row, got shape {tuple(keys.shape)}")
    check_choice("metric", metric, METRICS)
    if serves_reference("prepare_keys", keys):
        return PreparedKeys(keys, None, metric)
    return PreparedKeys(keys, call(torch.ops.memad_fast.prepare_keys, keys.detach(), metric), metric)


def split_keys(keys: Any, metric: str) -> tuple[Tensor, Tensor | None]:
    """The original rows and the packed form of what a caller passed as ``keys``, checked."""
    if isinstance(keys, PreparedKeys):
        if keys.metric != metric:
            raise ValueError(f"metric: the keys were prepared for {keys.metric!r}, got {metric!r}")
        if keys.packed is not None and not keys.is_current:
            raise ValueError(
                "keys: the rows were changed in place after prepare_keys, so the packed form is out of step; "
                "change them through PreparedKeys.overwrite_, or prepare again"
            )
        return keys.keys, keys.packed
    check_float("keys", keys)
    check_rank("keys", keys, 2, "[M, D]")
    return keys, None


def _fake_prepare(keys: Tensor, metric: str) -> Tensor:
    return keys.new_empty(packed_bytes(*keys.shape, on_gpu=keys.is_cuda), dtype=torch.uint8)


define("prepare_keys(Tensor keys, str metric) -> Tensor", fake=_fake_prepare)
define(
    "prepare_keys_with_room(Tensor keys, int capacity, str metric) -> Tensor",
    fake=lambda keys, capacity, metric: keys.new_empty(
        packed_bytes(capacity, keys.shape[1], on_gpu=keys.is_cuda), dtype=torch.uint8
    ),
)
define(
    "prepare_keys_rows_(Tensor(a!) packed, Tensor keys, Tensor rows, str metric) -> ()",
    fake=lambda packed, keys, rows, metric: None,
)
