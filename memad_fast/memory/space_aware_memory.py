"""The SimSID report's SpaceAwareMemory (algorithm 4.4): one remembered feature for each position of a patch grid.

Write: a patch replaces what its own position holds, if cosine(new, stored) < threshold: what is already known is kept.
Read: scores = query · memory (+ Gumbel noise in training); the sum of the k best rows, or what else ``combine`` says.

The report starts from zeros, whose cosine is undefined. Here the rows start as small noise and a flag says which are
written: the first patch of a position is always stored, and a position that was never written never wins a read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_noise_options
from memad_fast.ops import gumbel_topk

_NOISE = 1e-3  # of the initial rows: small beside any feature, yet not zero
_EPS = 1e-8  # added to the norms of the cosine, so that an all-zero feature has similarity 0


class SpaceAwareMemory(nn.Module):
    """A memory with one row per patch position, written in place and read by Gumbel top-k.

    Args:
        blocks: how many patch positions.
        dim: D, length of a patch feature.
        threshold: a written position takes a new feature only if their cosine similarity is below this.
        k: how many rows a read combines.
        temperature: τ of the softmax over the scores, as in ``memad_fast.gumbel_topk``.
        noise: whether reads in training mode have Gumbel noise.
        combine: "sum" (the report) or another of ``memad_fast.gumbel_topk``.

    The memory changes by ``write``, ``grow`` and ``clear`` alone, and only in training mode; in eval mode reads have no
    noise. State dict: ``memory`` ``[blocks, D]`` and ``written`` ``[blocks]``; that of a memory that has grown can be
    loaded.

    Source: the SimSID report, section 4.4, algorithm 4.4.

    Example:
        >>> import torch
        >>> from memad_fast.memory import SpaceAwareMemory
        >>> memory = SpaceAwareMemory(blocks=4, dim=2, k=1)
        >>> memory.write(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 1]))
        >>> read, indices, scores = memory.eval()(torch.tensor([[0.0, 2.0]]))
        >>> read.tolist(), indices.tolist()
        ([[0.0, 1.0]], [[1]])
    """

    memory: Tensor
    written: Tensor

    # Whether k positions are known to be written. False if that is not known: then a read looks, and waits for a GPU.
    _is_readable = False

    def __init__(
        self,
        blocks: int,
        dim: int,
        *,
        threshold: float = 0.9,
        k: int = 5,
        temperature: float = 1.0,
        noise: bool = True,
        combine: str = "sum",
    ) -> None:
        super().__init__()
        if blocks < 1 or dim < 1:
            raise ValueError(f"blocks, dim: expected at least 1, got {blocks}, {dim}")
        if not 1 <= k <= blocks:
            raise ValueError(f"k: expected 1 to {blocks} (blocks), got {k}")
        check_noise_options(temperature, combine)
        self.threshold = threshold
        self.k = k
        self.temperature = temperature
        self.noise = noise
        self.combine = combine
        self.register_buffer("memory", _NOISE * torch.randn(blocks, dim))
        self.register_buffer("written", torch.zeros(blocks, dtype=torch.bool))

    def forward(self, query: Tensor, *, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Read the ``k`` best rows among the written positions, their sum unless ``combine`` says otherwise.

        Args:
            query: ``[N, D]``, read in the memory's dtype.
            seed: of the noise in training mode; ``None`` draws one from torch's generator.

        Returns:
            ``read`` ``[N, D]``, ``indices`` ``[N, k]`` (positions) and ``scores`` ``[N, k]``.

        Raises:
            RuntimeError: fewer than ``k`` positions have been written. (A compiled read does not look: slots that find
                no row have index −1 and score NaN.)
        """
        if not self._is_readable and not torch.compiler.is_compiling():
            written = int(self.written.sum())
            if written < self.k:
                raise RuntimeError(f"only {written} positions are written, k = {self.k} are read: write() more")
            self._is_readable = True
        # A row with a NaN is never chosen.
        memory = torch.where(self.written.unsqueeze(1), self.memory, torch.nan)
        return gumbel_topk(
            query.to(memory.dtype),
            memory,
            self.k,
            temperature=self.temperature,
            seed=seed,
            noise=self.noise and self.training,
            combine=self.combine,
        )

    @torch.no_grad()
    def write(self, features: Tensor, positions: Tensor) -> None:
        """Offer ``features`` ``[N, D]`` to their ``positions`` ``[N]``, in order, detached.

        On a GPU this waits for the device once, to check what it is given.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
            ValueError: shapes do not fit, a feature is not finite, or a position lies outside the memory.
        """
        self._check_training("write")
        blocks, dim = self.memory.shape
        if features.dim() != 2 or features.shape[1] != dim or positions.shape != features.shape[:1]:
            raise ValueError(
                f"features, positions: expected [N, {dim}] and [N], "
                f"got {list(features.shape)} and {list(positions.shape)}"
            )
        if positions.numel() == 0:
            return
        order, turn = _turns(positions)
        finite = features.isfinite().all()
        # The only time that this waits for a GPU (but for the lengths of turns, if positions are repeated).
        finite, low, high, last = torch.stack([finite, positions.min(), positions.max(), turn[-1]]).tolist()
        if not finite:
            raise ValueError("features: expected finite values, got NaN or infinity")
        if low < 0 or high >= blocks:
            raise ValueError(f"positions: expected 0 to {blocks - 1}, got {low} to {high}")
        features = features.to(self.memory.dtype)
        lengths = turn.bincount().tolist() if last > 0 else [len(order)]
        for rows in order.split(lengths):
            self._write_distinct(features[rows], positions[rows])

    def _write_distinct(self, features: Tensor, positions: Tensor) -> None:
        stored = self.memory[positions]
        similarity = functional.cosine_similarity(features, stored, dim=1, eps=_EPS)
        new = (similarity < self.threshold) | ~self.written[positions]
        self.memory.index_copy_(0, positions, torch.where(new[:, None], features, stored))
        self.written.index_fill_(0, positions, True)

    @torch.no_grad()
    def grow(self, blocks: int) -> None:
        """Have ``blocks`` positions: the new ones follow the old, which stay as they are, and are not written.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
            ValueError: there are more positions than ``blocks``.
        """
        self._check_training("grow")
        more = blocks - self.memory.shape[0]
        if more < 0:
            raise ValueError(f"blocks: expected at least {self.memory.shape[0]}, the positions there are, got {blocks}")
        noise = _NOISE * torch.randn(more, self.memory.shape[1], dtype=self.memory.dtype, device=self.memory.device)
        self.memory = torch.cat((self.memory, noise))
        self.written = torch.cat((self.written, self.written.new_zeros(more)))

    def clear(self) -> None:
        """Hold nothing again, as many positions as there are.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
        """
        self._check_training("clear")
        self.written.zero_()
        self.memory.copy_(_NOISE * torch.randn_like(self.memory))
        self._is_readable = False

    def _check_training(self, name: str) -> None:
        if not self.training:
            raise RuntimeError(f"the memory is read-only in eval mode: call train() before {name}()")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        stored = state_dict.get(prefix + "memory")
        if stored is not None and stored.dim() == 2 and stored.shape[0] > self.memory.shape[0]:
            self.memory = self.memory.new_empty(stored.shape[0], self.memory.shape[1])  # it had grown
            self.written = self.written.new_zeros(stored.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        loaded = state_dict.get(prefix + "written")
        self._is_readable = isinstance(loaded, Tensor) and not loaded.is_meta and int(loaded.sum()) >= self.k

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        return (
            f"blocks={self.memory.shape[0]}, dim={self.memory.shape[1]}, threshold={self.threshold:g}, k={self.k}, "
            f"temperature={self.temperature:g}, noise={self.noise}, combine={self.combine!r}"
        )


def _turns(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in the order of their turns, and the turn of each: the first row of every position has turn 0, the second 1.

    Within a turn the positions are distinct, so a turn is one vectorised write; turn after turn, each position sees its
    rows in their order.
    """
    ordered, order = positions.contiguous().sort(stable=True)
    turn = torch.arange(len(ordered), device=ordered.device) - torch.searchsorted(ordered, ordered)
    turn, by_turn = turn.sort(stable=True)
    return order[by_turn], turn
