"""MemSTC-Net's memory M_s, M_e (section III-C, eq. 6, 7): structure → texture pairs of normal patches in a ring.

Read (eq. 6): the texture stored beside the nearest structure, squared Euclidean distance.
Write (eq. 7): the newest pairs replace the oldest. The paper shifts the whole memory by one batch; the ring holds
the same pairs and moves none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memad_fast.ops import fifo_write_, stcm_lookup


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

    def __init__(self, size: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("key_dim", key_dim), ("value_dim", value_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.register_buffer("keys", torch.zeros(size, key_dim))
        self.register_buffer("values", torch.zeros(size, value_dim))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the value of each row's nearest key.

        Args:
            query: ``[N, D]``, read in the memory's dtype.

        Returns:
            ``read`` ``[N, V]``, ``distances`` ``[N]`` (squared Euclidean, differentiable in ``query``) and
            ``indices`` ``[N]`` (slots), as in ``memad_fast.stcm_lookup``.

        Raises:
            RuntimeError: nothing has been written yet.
        """
        filled = int(self.filled)
        if filled == 0:
            raise RuntimeError("the memory is empty: write(keys, values) in training, or load a state dict, first")
        return stcm_lookup(query.to(self.keys.dtype), self.keys, self.values, filled=filled)

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` ``[N, D]`` with ``values`` ``[N, V]``, detached; of more than ``size`` rows, the newest.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
        """
        if not self.training:
            raise RuntimeError("the memory is read-only in eval mode: call train() before write()")
        fifo_write_(self.keys, self.values, self.cursor, keys.to(self.keys.dtype), values.to(self.values.dtype))
        self.filled.add_(keys.shape[0]).clamp_(max=self.keys.shape[0])

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"size={self.keys.shape[0]}, key_dim={self.keys.shape[1]}, value_dim={self.values.shape[1]}"
