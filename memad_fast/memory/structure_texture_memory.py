"""MemSTC-Net's memory M_s, M_e (section III-C, eq. 6, 7): structure → texture pairs of normal patches in a ring.

Read (eq. 6): the texture stored beside the nearest structure, squared Euclidean distance.
Write (eq. 7): the newest pairs replace the oldest. The paper shifts the whole memory by one batch; the ring holds
the same pairs and moves none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

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
        if distributed.is_available() and distributed.is_initialized():
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
