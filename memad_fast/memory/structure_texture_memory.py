"""MemSTC-Net's memory M_s, M_e (section III-C, eq. 6, 7): structure → texture pairs of normal patches in a ring.

Read (eq. 6): the texture stored beside the nearest structure, squared Euclidean distance.
Write (eq. 7): the newest pairs replace the oldest. The paper shifts the whole memory by one batch; the ring holds
the same pairs and moves none of them.

    StructureTextureMemory   tensors of the state dict, on the model's device: made for training, and for CUDA graphs
    StructureTextureIndex    any ``memad_fast.index.Index``: as many pairs as a disk holds, or several machines
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from memad_fast.index import Index, ShardedIndex
from memad_fast.ops import PreparedKeys, fifo_write_, prepare_keys, stcm_lookup


class StructureTextureMemory(nn.Module):
    """A first-in first-out memory of key → value rows, read by the nearest key.

    Args:
        size: k, how many pairs it holds.
        key_dim: D, length of a structure feature.
        value_dim: V, length of a texture feature.

    In training read first and write afterwards: written first, every row would find itself at distance 0. The memory
    changes by ``write`` alone, and only in training mode. Until it is full, reads search the filled part only.

    State dict: ``keys`` ``[size, D]``, ``values`` ``[size, V]``, ``cursor`` (the next slot) and ``filled`` (how many
    slots hold a pair). Loading it gives bit-identical reads, and writing goes on where it stopped.

    Where ``torch.distributed`` is initialised, ``write`` stores the pairs of all ranks, in the order of the ranks: the
    memories of all ranks stay the same, if all wrote the same from the start. So every rank has to call it.

    Cursor and number of pairs stay on the device: nothing waits for a GPU, and a whole step, a read and a write, can be
    captured in a CUDA graph and replayed with other contents of the same inputs.

    In eval mode, where the keys stay what they are, they are packed at the first read and searched so from then on
    (``prepare_keys``: a quarter of the bytes of float32 keys), until they are trained, loaded or moved. In training
    each read packs them anew: next to a batch of queries as large as the writes that costs little, and keeps the codes
    centred on what the ring holds now.

    Source: "Memorizing Structure-Texture Correspondence for Image Anomaly Detection", section III-C.

    Example:
        >>> import torch
        >>> from memad_fast.memory import StructureTextureMemory
        >>> memory = StructureTextureMemory(size=4, key_dim=2, value_dim=1)
        >>> memory.write(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[5.0], [6.0]]))
        >>> read, distances, indices = memory(torch.tensor([[0.9, 1.0]]))
        >>> read.tolist(), indices.tolist()
        ([[6.0]], [1])
    """

    keys: Tensor
    values: Tensor
    cursor: Tensor
    filled: Tensor

    # Whether the memory is known to hold a pair. False if that is not known: then a read looks, and waits for a GPU.
    _holds_pairs = False
    # The keys packed for reads in eval mode.
    _prepared: PreparedKeys | None = None

    def __init__(self, size: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("key_dim", key_dim), ("value_dim", value_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.register_buffer("keys", torch.zeros(size, key_dim))
        self.register_buffer("values", torch.zeros(size, value_dim))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def on(index: Index) -> StructureTextureIndex:
        """The same memory on an index, whose capacity is its size."""
        return StructureTextureIndex(index)

    @property
    def is_empty(self) -> bool:
        """Whether it holds no pair, so that it cannot be read. Waits for a GPU, until a pair was seen once."""
        if not self._holds_pairs:
            self._holds_pairs = int(self.filled) > 0
        return not self._holds_pairs

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the value of each row's nearest key.

        Args:
            query: ``[N, D]``, read in the memory's dtype.

        Returns:
            ``read`` ``[N, V]``, ``distances`` ``[N]`` (squared Euclidean, differentiable in ``query``) and
            ``indices`` ``[N]`` (slots), as in ``memad_fast.stcm_lookup``.

        Raises:
            RuntimeError: nothing has been written yet. (A compiled read does not look: it gives NaN and index −1.)
        """
        if not torch.compiler.is_compiling() and self.is_empty:
            raise RuntimeError("the memory is empty: write(keys, values) in training, or load a state dict, first")
        return stcm_lookup(query.to(self.keys.dtype), self._searchable_keys(), self.values, filled=self.filled)

    def _searchable_keys(self) -> Tensor | PreparedKeys:
        """The keys; packed where they stay what they are and torch would count a change."""
        # A compiled or captured read is run again with other contents: it takes the keys as it finds them then.
        captured = torch.compiler.is_compiling() or (self.keys.is_cuda and torch.cuda.is_current_stream_capturing())
        if self.training or captured or self.keys.is_inference():
            return self.keys
        if self._prepared is None or self._prepared.keys is not self.keys or not self._prepared.is_current:
            self._prepared = prepare_keys(self.keys)
        return self._prepared

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Keys ``[n, D]`` and values ``[n, V]`` of the pairs that it holds, oldest first. Waits for a GPU."""
        size, filled = len(self.keys), int(self.filled)
        first = int(self.cursor) if filled == size else 0
        order = (torch.arange(filled, device=self.keys.device) + first) % size
        return self.keys[order], self.values[order]

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` ``[N, D]`` with ``values`` ``[N, V]``, detached; of more than ``size`` rows, the newest.

        With several ranks, N may differ from rank to rank; telling each other how many waits for a GPU.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
        """
        if not self.training:
            raise RuntimeError("the memory is read-only in eval mode: call train() before write()")
        keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        if _is_distributed():
            keys, values = _of_all_ranks(keys, values)
        fifo_write_(self.keys, self.values, self.cursor, keys, values)
        self.filled.add_(keys.shape[0]).clamp_(max=self.keys.shape[0])
        if keys.shape[0] > 0:
            self._holds_pairs = True

    def train(self, mode: bool = True) -> StructureTextureMemory:
        """As of ``nn.Module``; training mode gives up the packed keys, since replays of a CUDA graph write unseen."""
        if mode:
            self._prepared = None
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        loaded = state_dict.get(prefix + "filled")
        self._holds_pairs = isinstance(loaded, Tensor) and not loaded.is_meta and int(loaded) > 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the packed keys out: they are made again, and follow the copy's own changes."""
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"size={self.keys.shape[0]}, key_dim={self.keys.shape[1]}, value_dim={self.values.shape[1]}"


class StructureTextureIndex(nn.Module):
    """A ``StructureTextureMemory`` whose pairs are in an index: larger than a GPU, than RAM, than one machine.

    Args:
        index: metric "l2", with values; structures are its keys, textures its values. Its capacity is the number of
            pairs that are held, the newest; without a capacity every pair is. What it holds already can be read.

    Read and write are those of ``StructureTextureMemory``, in training first the one and then the other, and with an
    ``ExactIndex`` of float32 bit for bit, but for:

    - ``indices`` are ids of the index: how many pairs were written before, where the index counts by itself. The slot
      of the other form is this number modulo its size.
    - Of keys at the same distance the oldest is read, not the one in the lowest slot.
    - Queries and pairs go to the index's device and dtype, and what is read comes back. ``to`` moves nothing.
    - A read waits for the index. It is not for ``torch.compile`` or CUDA graphs.

    State dict: ``next_id`` alone; pairs are in the index, which ``index.save()`` keeps. A state loads where the index
    has had at least as many pairs; reads are bit-identical if it has had no more.

    Where ``torch.distributed`` is initialised, every rank's index gets the pairs of all ranks, in the order of the
    ranks. To a ``ShardedIndex`` each rank gives its own, which has the same pairs, once; its reads are collective too.

    An index is neither copied nor pickled, so this module is not either.

    Raises:
        TypeError, ValueError: the index is not what is said above.

    Example:
        >>> import torch
        >>> from memad_fast.index import ExactIndex
        >>> from memad_fast.memory import StructureTextureMemory
        >>> memory = StructureTextureMemory.on(ExactIndex(2, values_dim=1, capacity=4))
        >>> memory.write(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[5.0], [6.0]]))
        >>> read, distances, indices = memory(torch.tensor([[0.9, 1.0]]))
        >>> read.tolist(), indices.tolist()
        ([[6.0]], [1])
    """

    def __init__(self, index: Index) -> None:
        super().__init__()
        if not isinstance(index, Index):
            raise TypeError(f"index: expected a memad_fast.index.Index, got {type(index).__name__}")
        if index.metric != "l2":
            raise ValueError(f"index: expected metric 'l2', got {index.metric!r}")
        if index.values_dim is None:
            raise ValueError("index: expected one with values, got values_dim None")
        self.index = index

    @property
    def is_empty(self) -> bool:
        """Whether it holds no pair, so that it cannot be read."""
        return len(self.index) == 0

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the value of each row's nearest key.

        Args:
            query: ``[N, D]``, read in the index's dtype.

        Returns:
            ``read`` ``[N, V]``, ``distances`` ``[N]`` (squared Euclidean, differentiable in ``query``) and
            ``indices`` ``[N]`` (ids). Where nothing is found (a non-finite query), index is −1 and distance and read
            are NaN.

        Raises:
            RuntimeError: nothing has been written yet; or ``query`` requires gradients, and the index cannot give the
                keys back (``rows``). What ``Index.search`` raises.
        """
        if self.is_empty:
            raise RuntimeError("the memory is empty: write(keys, values) in training, or open a saved index, first")
        rows = query.to(self.index.device, self.index.dtype)
        found = self.index.search(rows.detach(), 1)
        assert found.values is not None
        ids = found.ids[:, 0]
        read = found.values[:, 0].masked_fill((ids < 0)[:, None], torch.nan)
        distances = found.distances[:, 0]
        if torch.is_grad_enabled() and rows.requires_grad:
            distances = _Distance.apply(rows, self._keys_of(ids, rows), distances)
        return read.to(query.device), distances.to(query.device), ids.to(query.device)

    def _keys_of(self, ids: Tensor, rows: Tensor) -> Tensor:
        """The keys with these ids; those of ``rows`` themselves where there is none."""
        if not hasattr(self.index, "rows"):
            raise RuntimeError(
                f"query: the gradient takes the keys, which {type(self.index).__name__} does not give back (rows);"
                " read without gradients"
            )
        keys, found = rows.detach().clone(), ids >= 0
        keys[found] = self.index.rows(ids[found]).keys
        return keys

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` ``[N, D]`` with ``values`` ``[N, V]``, detached, as the newest.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only. What ``Index.add`` raises.
        """
        if not self.training:
            raise RuntimeError("the memory is read-only in eval mode: call train() before write()")
        if _is_distributed() and not isinstance(self.index, ShardedIndex):
            keys, values = _of_all_ranks(keys, values)
        self._add(keys, values)

    @torch.no_grad()
    def copy_from(self, memory: StructureTextureMemory) -> None:
        """Write the pairs of ``memory``, oldest first, in any mode; with several ranks, whose memories are the same,
        a ``ShardedIndex`` gets them from the first.
        """
        keys, values = memory.pairs()
        if isinstance(self.index, ShardedIndex) and _is_distributed() and distributed.get_rank() > 0:
            keys, values = keys[:0], values[:0]
        self._add(keys, values)

    def _add(self, keys: Tensor, values: Tensor) -> None:
        device = self.index.device
        self.index.add(keys.to(device, self.index.dtype), values.to(device, self.index.values_dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "next_id"] = torch.tensor(self.index.next_id)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        next_id = state_dict.pop(prefix + "next_id", None)
        if next_id is None:
            missing.append(prefix + "next_id")
        elif self.index.next_id < int(next_id):
            errors.append(
                f"index: {self.index.next_id} pairs were ever added to it, {int(next_id)} to that of the state: an"
                " older copy, or another index"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """The index, for ``print(module)``."""
        return f"index={self.index!r}"


class _Distance(torch.autograd.Function):
    """‖query − key‖² as a search computed it, and its gradient in the query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, distances: Tensor) -> Tensor:
        ctx.save_for_backward(query, keys)
        return distances.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        query, keys = ctx.saved_tensors
        found = query.isfinite().all(dim=1, keepdim=True)
        return torch.where(found, 2 * gradient[:, None].to(query.dtype) * (query - keys), 0.0), None, None


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _of_all_ranks(*matrices: Tensor) -> list[Tensor]:
    """The rows of all ranks for each of ``matrices``, which have equally many rows here, not so elsewhere."""
    ranks = range(distributed.get_world_size())
    count = torch.tensor(matrices[0].shape[0], device=matrices[0].device)
    counts = [torch.empty_like(count) for _ in ranks]
    distributed.all_gather(counts, count)
    lengths = torch.stack(counts).tolist()
    gathered = []
    for matrix in matrices:
        padded = functional.pad(matrix, (0, 0, 0, max(lengths) - matrix.shape[0])).contiguous()
        parts = [torch.empty_like(padded) for _ in ranks]
        distributed.all_gather(parts, padded)
        gathered.append(torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]))
    return gathered
