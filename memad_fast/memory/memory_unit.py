"""MemAE's memory: every pixel of a feature map, across its channels, is read from one learned bank.

    ω = softmax over the M items of query · item
    ω = ω where ω > threshold, else 0;  ω / Σω
    read = ω · items

With ``block`` > 1 the query is a block×block window across all channels instead of a pixel (DAAD's block-wise query).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast.ops import BankAttentionStats, bank_attention, bank_attention_stats


class MemoryUnit(nn.Module):
    """Reads pixels (or blocks) of a feature map, or plain rows, from learned items.

    Args:
        items: M, memory items.
        dim: D, length of a query: the channels C of the map, or C·block² with blocks.
        block: side in pixels of the window that makes one query; 1 is MemAE's pixel.
        threshold: λ; weights at or below it are dropped.
        shrink: "hard" (MemAE), "soft" or "none", as in ``memad_fast.bank_attention``.
        renormalize: divide the shrunk weights by their sum (MemAE does).

    The items are the parameter ``weight`` ``[M, D]``, drawn from U(±1/√D): the name and the shape of MemAE's published
    ``MemoryUnit``, whose state dict loads as it is. They are learned by gradient; reading never changes them.

    Source: D. Gong et al., "Memorizing Normality to Detect Anomaly: Memory-augmented Deep Autoencoder for Unsupervised
    Anomaly Detection", as published in code (inner product, not cosine).

    Example:
        >>> import torch
        >>> from memad_fast.memory import MemoryUnit
        >>> MemoryUnit(items=50, dim=8)(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
        >>> MemoryUnit(items=50, dim=8)(torch.rand(5, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        items: int,
        dim: int,
        *,
        block: int = 1,
        threshold: float = 0.0025,
        shrink: str = "hard",
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        if items < 1:
            raise ValueError(f"items: expected at least 1, got {items}")
        if block < 1 or dim < 1 or dim % block**2:
            raise ValueError(f"dim: expected a positive multiple of block² = {block**2}, got {dim}")
        self.block = block
        self.threshold = threshold
        self.shrink = shrink
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(items, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        """Read ``features``, a map ``[B, C, H, W]`` or rows ``[N, D]``; same shape and dtype."""
        read = bank_attention(
            self._query(features),
            self.weight.to(features.dtype)[None],
            threshold=self.threshold,
            shrink=self.shrink,
            renormalize=self.renormalize,
            similarity="dot",
        )
        if features.dim() == 2:
            return read[0]
        batch, _, height, width = features.shape
        read = read.reshape(batch, height // self.block, width // self.block, -1).permute(0, 3, 1, 2)
        return functional.pixel_shuffle(read, self.block)

    @torch.no_grad()
    def stats(self, features: Tensor) -> BankAttentionStats:
        """Dead-row share and entropy of the read of ``features`` (see ``memad_fast.bank_attention_stats``)."""
        return bank_attention_stats(
            self._query(features),
            self.weight.to(features.dtype)[None],
            threshold=self.threshold,
            shrink=self.shrink,
            similarity="dot",
        )

    def _query(self, features: Tensor) -> Tensor:
        """One bank for all queries: ``[1, N, D]`` of rows, ``[B, 1, pixels or blocks, D]`` of a map."""
        dim = self.weight.shape[1]
        channels = dim // self.block**2
        if features.dim() == 2 and features.shape[1] == dim:
            return features[None]
        if features.dim() != 4 or features.shape[1] != channels:
            raise ValueError(f"features: expected [B, {channels}, H, W] or [N, {dim}], got {list(features.shape)}")
        if features.shape[2] % self.block or features.shape[3] % self.block:
            raise ValueError(
                f"features: height and width must divide by block {self.block}, got {list(features.shape)}"
            )
        blocks = functional.pixel_unshuffle(features, self.block)
        return blocks.flatten(2).transpose(1, 2)[:, None]

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        items, dim = self.weight.shape
        return (
            f"items={items}, dim={dim}, block={self.block}, threshold={self.threshold:g}, "
            f"shrink={self.shrink!r}, renormalize={self.renormalize}"
        )
