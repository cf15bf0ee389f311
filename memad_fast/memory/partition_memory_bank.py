"""PMB's memory (section III-B): strips of a feature map, one query per channel, one learned bank per strip.

A map [B, C, h, w] is cut along h into P strips. Channel c of strip p, flattened to D = (h / P)·w values, is the query:

    ω = softmax over the M items of cos(query, bank[p])   (eq. 2, 3)
    ω = max(ω − threshold, 0)                             (eq. 4)
    read = ω · bank[p]                                    (eq. 5)

In memory order the strips of [B, C, h, w] are already [B, C, P, D], so partitioning is a view and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memad_fast.ops import BankAttentionStats, bank_attention, bank_attention_stats


class PartitionMemoryBank(nn.Module):
    """Reads every channel of every strip of a feature map from that strip's own bank.

    Args:
        partitions: P, how many strips the height is cut into.
        items: M, memory items of each strip.
        height, width: size of the feature map in pixels; ``partitions`` divides ``height``.
        threshold: δ_m; ``None`` takes the paper's 1 / items.
        shrink: "soft" (paper), "hard" or "none", as in ``memad_fast.bank_attention``.
        renormalize: divide the shrunk weights by their sum (the paper does not).

    The items are the parameter ``bank`` ``[P, M, D]``, drawn from U(±1/√D). They are learned by gradient, so ``eval()``
    needs no freezing: reading never changes them.

    Raises:
        ValueError: ``partitions`` does not divide ``height``; the message names both and the values that do.

    Source: P. Xing, Z. Li, "Visual Anomaly Detection via Partition Memory Bank Module and Error Estimation",
    section III-B. Eq. 3 is taken as the cosine of normalised query and normalised item.

    Example:
        >>> import torch
        >>> from memad_fast.memory import PartitionMemoryBank
        >>> memory = PartitionMemoryBank(partitions=4, items=10, height=16, width=16)
        >>> memory(torch.rand(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        partitions: int,
        items: int,
        height: int,
        width: int,
        *,
        threshold: float | None = None,
        shrink: str = "soft",
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        if partitions < 1 or height % partitions:
            divisors = [str(count) for count in range(1, height + 1) if height % count == 0]
            raise ValueError(
                f"partitions: {partitions} does not divide height {height}; these do: {', '.join(divisors)}"
            )
        if items < 1:
            raise ValueError(f"items: expected at least 1, got {items}")
        self.height = height
        self.width = width
        self.threshold = 1.0 / items if threshold is None else threshold
        self.shrink = shrink
        self.renormalize = renormalize
        dim = height // partitions * width
        self.bank = nn.Parameter(torch.empty(partitions, items, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        """Replace ``features`` ``[B, C, height, width]`` by what the memory holds of them; same shape and dtype."""
        read = bank_attention(
            self._query(features),
            self.bank.to(features.dtype),
            threshold=self.threshold,
            shrink=self.shrink,
            renormalize=self.renormalize,
        )
        return read.transpose(1, 2).reshape(features.shape)

    @torch.no_grad()
    def stats(self, features: Tensor) -> BankAttentionStats:
        """Dead-row share and entropy of the read of ``features`` (see ``memad_fast.bank_attention_stats``)."""
        return bank_attention_stats(
            self._query(features), self.bank.to(features.dtype), threshold=self.threshold, shrink=self.shrink
        )

    def _query(self, features: Tensor) -> Tensor:
        """``[B, P, C, D]``: a view of ``features``, if those are contiguous."""
        if features.dim() != 4 or features.shape[2:] != (self.height, self.width):
            raise ValueError(f"features: expected [B, C, {self.height}, {self.width}], got {list(features.shape)}")
        partitions, _, dim = self.bank.shape
        return features.reshape(features.shape[0], features.shape[1], partitions, dim).transpose(1, 2)

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        partitions, items, dim = self.bank.shape
        return (
            f"partitions={partitions}, items={items}, dim={dim}, threshold={self.threshold:g}, "
            f"shrink={self.shrink!r}, renormalize={self.renormalize}"
        )
