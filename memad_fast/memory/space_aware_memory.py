"""The SimSID report's SpaceAwareMemory (algorithm 4.4): one remembered feature for each position of a patch grid.

Write: a patch replaces what its own position holds, if cosine(new, stored) < threshold: what is already known is kept.
Read: scores = query · memory (+ Gumbel noise in training); the sum of the k best rows.

The report starts from zeros, whose cosine is undefined. Here the rows start as small noise and a flag says which are
written: the first patch of a position is always stored, and a position that was never written never wins a read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast.ops import gumbel_topk

_NOISE = 1e-3  # of the initial rows: small beside any feature, yet not zero
_EPS = 1e-8  # added to the norms of the cosine, so that an all-zero feature has similarity 0


class SpaceAwareMemory(nn.Module):
    """A memory with one row per patch position, written in place and read by Gumbel top-k.

    Args:
        blocks: how many patch positions.
        dim: D, length of a patch feature.
        threshold: a written position takes a new feature only if their cosine similarity is below this.
        k: how many rows a read sums.
        temperature: τ of the softmax over the scores, as in ``memad_fast.gumbel_topk``.

    The memory changes by ``write`` alone, and only in training mode; in eval mode reads have no noise. State dict:
    ``memory`` ``[blocks, D]`` and ``written`` ``[blocks]``.

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

    def __init__(self, blocks: int, dim: int, *, threshold: float = 0.9, k: int = 5, temperature: float = 1.0) -> None:
        super().__init__()
        if blocks < 1 or dim < 1:
            raise ValueError(f"blocks, dim: expected at least 1, got {blocks}, {dim}")
        if not 1 <= k <= blocks:
            raise ValueError(f"k: expected 1 to {blocks} (blocks), got {k}")
        self.threshold = threshold
        self.k = k
        self.temperature = temperature
        self.register_buffer("memory", _NOISE * torch.randn(blocks, dim))
        self.register_buffer("written", torch.zeros(blocks, dtype=torch.bool))

    def forward(self, query: Tensor, *, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Read the sum of the ``k`` best rows among the written positions.

        Args:
            query: ``[N, D]``, read in the memory's dtype.
            seed: of the noise in training mode; ``None`` draws one from torch's generator.

        Returns:
            ``read`` ``[N, D]``, ``indices`` ``[N, k]`` (positions) and ``scores`` ``[N, k]``.

        Raises:
            RuntimeError: fewer than ``k`` positions have been written.
        """
        positions = self.written.nonzero().flatten()
        if positions.numel() < self.k:
            raise RuntimeError(f"only {positions.numel()} positions are written, k = {self.k} are read: write() more")
        read, indices, scores = gumbel_topk(
            query.to(self.memory.dtype),
            self.memory[positions],
            self.k,
            temperature=self.temperature,
            seed=seed,
            noise=self.training,
            combine="sum",
        )
        return read, positions[indices], scores

    @torch.no_grad()
    def write(self, features: Tensor, positions: Tensor) -> None:
        """Offer ``features`` ``[N, D]`` to their ``positions`` ``[N]``, in order, detached.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
            ValueError: shapes do not fit, a feature is not finite, or a position lies outside the memory.
        """
        if not self.training:
            raise RuntimeError("the memory is read-only in eval mode: call train() before write()")
        blocks, dim = self.memory.shape
        if features.dim() != 2 or features.shape[1] != dim or positions.shape != features.shape[:1]:
            raise ValueError(
                f"features, positions: expected [N, {dim}] and [N], "
                f"got {list(features.shape)} and {list(positions.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError("features: expected finite values, got NaN or infinity")
        if positions.numel() == 0:
            return
        if int(positions.min()) < 0 or int(positions.max()) >= blocks:
            raise ValueError(f"positions: expected 0 to {blocks - 1}, got {positions.min()} to {positions.max()}")
        features = features.to(self.memory.dtype)
        for turn in _turns(positions):
            self._write_distinct(features[turn], positions[turn])

    def _write_distinct(self, features: Tensor, positions: Tensor) -> None:
        stored = self.memory[positions]
        similarity = functional.cosine_similarity(features, stored, dim=1, eps=_EPS)
        new = (similarity < self.threshold) | ~self.written[positions]
        self.memory[positions[new]] = features[new]
        self.written[positions] = True

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        return (
            f"blocks={self.memory.shape[0]}, dim={self.memory.shape[1]}, threshold={self.threshold:g}, k={self.k}, "
            f"temperature={self.temperature:g}"
        )


def _turns(positions: Tensor) -> list[Tensor]:
    """Row indices in turns: the first row of every position, then the second of each that has one, and so on.

    Within a turn the positions are distinct, so a turn is one vectorised write; turn after turn, each position sees its
    rows in their order.
    """
    order = positions.argsort(stable=True)
    ordered = positions[order].contiguous()
    first = torch.searchsorted(ordered, ordered)
    turn = torch.arange(len(ordered), device=ordered.device) - first
    return [order[turn == index] for index in range(int(turn.max()) + 1)]
