"""The memory queues of the published SQUID and SimSID code: for each patch position a ring of its last features.

Read: w = softmax over the slots of query · slot; the largest k weights, divided by their sum ("Gumbel shrinkage", which
has no Gumbel noise there); read = w · slots.
Write: the newest features replace the oldest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memad_fast._arguments import check_noise_options
from memad_fast.ops import fifo_write_, gumbel_topk


class MemoryQueue(nn.Module):
    """One first-in first-out memory for each patch position; a patch is read from, and written to, its own.

    Args:
        positions: P, how many patch positions.
        dim: D, length of a patch feature.
        slots: how many features a position remembers.
        k: how many slots a read takes. The published code keeps the weights strictly above its shrink threshold's k-th,
            so that its 5 are 4 here.
        temperature, combine: see ``memad_fast.gumbel_topk``.
        noise: whether reads in training mode have Gumbel noise.

    Where features are written while they are learned, read first and write afterwards: written first, every patch would
    find itself. The very first read then finds nothing: in training mode it gives zeros. The memory changes by
    ``write`` and ``clear`` alone, and only in training mode.

    State dict: ``memory`` ``[slots, P, D]``, where a slot that was never written holds NaN and is never chosen, and
    ``cursor`` (the next slot; the published code forgets it). All positions are written together, so that one ring of
    rows ``[P·D]`` serves them.

    Cost: a call of ``gumbel_topk`` for each position. Nothing waits for a GPU, but for the first read in eval mode.

    Source: T. Xiang et al., "SQUID: Deep Feature In-Painting for Unsupervised Anomaly Detection", CVPR 2023, section
    3.2 and 3.3, as published in code.

    Example:
        >>> import torch
        >>> from memad_fast.memory import MemoryQueue
        >>> queue = MemoryQueue(positions=2, dim=1, slots=3, k=1)
        >>> queue.write(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))  # two images of two patches
        >>> queue.eval()(torch.tensor([[[1.0], [-1.0]]])).tolist()
        [[[3.0], [2.0]]]
    """

    memory: Tensor
    cursor: Tensor

    # Whether a slot is known to be written. False if that is not known: then a read in eval mode looks.
    _holds_features = False

    def __init__(
        self,
        positions: int,
        dim: int,
        *,
        slots: int = 200,
        k: int = 4,
        temperature: float = 1.0,
        noise: bool = False,
        combine: str = "straight_through",
    ) -> None:
        super().__init__()
        for name, value in (("positions", positions), ("dim", dim), ("slots", slots)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= k <= slots:
            raise ValueError(f"k: expected 1 to {slots} (slots), got {k}")
        check_noise_options(temperature, combine)
        self.k = k
        self.temperature = temperature
        self.noise = noise
        self.combine = combine
        self.register_buffer("memory", torch.full((slots, positions, dim), torch.nan))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor) -> Tensor:
        """Read ``query`` ``[B, P, D]``, each patch from its own position's slots; same shape, the memory's dtype.

        Raises:
            RuntimeError: nothing has been written yet, in eval mode.
            ValueError: the shape does not fit.
        """
        self._check("query", query)
        if not self.training and not self._holds_features and not torch.compiler.is_compiling():
            self._holds_features = bool(self.memory[0].isfinite().all())
            if not self._holds_features:
                raise RuntimeError("the memory is empty: write(features) in training, or load a state dict, first")
        query = query.to(self.memory.dtype)
        reads = [
            gumbel_topk(
                query[:, position],
                self.memory[:, position],
                self.k,
                temperature=self.temperature,
                noise=self.noise and self.training,
                combine=self.combine,
            )[0]
            for position in range(self.memory.shape[1])
        ]
        return torch.stack(reads, dim=1)

    @torch.no_grad()
    def write(self, features: Tensor) -> None:
        """Store ``features`` ``[B, P, D]`` of B images, detached; of more images than slots, the newest.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
            ValueError: the shape does not fit.
        """
        self._check_training("write")
        self._check("features", features)
        rows = features.detach().to(self.memory.dtype).flatten(1)
        # A pair of key and value with an empty value: the ring is all that is wanted of it.
        fifo_write_(self.memory.flatten(1), rows.new_empty(len(self.memory), 0), self.cursor, rows, rows[:, :0])

    def clear(self) -> None:
        """Hold nothing again.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
        """
        self._check_training("clear")
        self.memory.fill_(torch.nan)
        self.cursor.zero_()
        self._holds_features = False

    def _check_training(self, name: str) -> None:
        if not self.training:
            raise RuntimeError(f"the memory is read-only in eval mode: call train() before {name}()")

    def _check(self, name: str, features: Tensor) -> None:
        if features.dim() != 3 or features.shape[1:] != self.memory.shape[1:]:
            _, positions, dim = self.memory.shape
            raise ValueError(f"{name}: expected [B, {positions}, {dim}], got {list(features.shape)}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._holds_features = False  # not known

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        slots, positions, dim = self.memory.shape
        return (
            f"positions={positions}, dim={dim}, slots={slots}, k={self.k}, temperature={self.temperature:g}, "
            f"noise={self.noise}, combine={self.combine!r}"
        )
