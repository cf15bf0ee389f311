"""The SimSID report's HierarchicalMemory (algorithm 4.5): three space-aware memories of one grid of patches.

    level 0   every patch                          at its own position
    level 1   the mean of each group of patches    at the group's position
    level 2   the maximum over all patches         at the only position

A read asks every level with the same query and joins the answers. The report does not say what a group is: here it is a
window of ``group`` × ``group`` neighbours on the grid, so that level 1 is as space-aware as level 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memad_fast.memory.space_aware_memory import SpaceAwareMemory


class HierarchicalMemory(nn.Module):
    """Space-aware memories of the patches of a grid, of their groups, and of the whole.

    Args:
        rows, columns: of the grid; position p is the patch in row p // columns, column p % columns.
        dim: D, length of a patch feature.
        group: side of a group of level 1, in patches; groups at the far borders may be smaller.
        threshold, temperature, noise, combine: of every level, see ``SpaceAwareMemory``.
        k: how many rows a read takes of each level; of a level that has fewer positions, all.

    Like its levels it changes in training mode alone. ``levels[i]`` is a ``SpaceAwareMemory``.

    Source: the SimSID report, section 4.2, algorithm 4.5.

    Example:
        >>> import torch
        >>> from memad_fast.memory import HierarchicalMemory
        >>> memory = HierarchicalMemory(rows=2, columns=2, dim=1, k=1)
        >>> memory.store(torch.tensor([[[1.0], [2.0], [3.0], [6.0]]]))
        >>> memory.eval()(torch.tensor([[1.0], [-1.0]])).tolist()  # of all patches, of the mean 3, of the maximum 6
        [[6.0, 3.0, 6.0], [1.0, 3.0, 6.0]]
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        dim: int,
        *,
        group: int = 2,
        threshold: float = 0.9,
        k: int = 5,
        temperature: float = 1.0,
        noise: bool = True,
        combine: str = "sum",
    ) -> None:
        super().__init__()
        for name, value in (("rows", rows), ("columns", columns), ("group", group), ("k", k)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.columns = columns
        self.group = group
        self.levels = nn.ModuleList(
            SpaceAwareMemory(
                size,
                dim,
                threshold=threshold,
                k=min(k, size),
                temperature=temperature,
                noise=noise,
                combine=combine,
            )
            for size in self._sizes(rows)
        )

    @property
    def blocks(self) -> int:
        """Positions of the grid."""
        return self._level(0).memory.shape[0]

    def forward(self, query: Tensor) -> Tensor:
        """``[N, 3·D]``: what the levels answer to ``query`` ``[N, D]``, patches first.

        Raises:
            RuntimeError: nothing, or too little, has been stored yet.
        """
        return torch.cat([level(query)[0] for level in self.levels], dim=1)

    def store(self, features: Tensor, positions: Tensor | None = None) -> None:
        """Offer ``features`` ``[B, P, D]`` of B images to all levels, image by image, detached.

        Args:
            features: of the patches at ``positions``.
            positions: ``[P]`` int64, distinct; ``None``: the whole grid in order. Where a position lies beyond the
                grid, the memory first grows by whole rows. Groups and maximum are those of the patches that are given.

        Raises:
            RuntimeError: the module is in eval mode, where the memory is read-only.
            ValueError: shapes do not fit, a feature is not finite, or a position is negative or given twice.
        """
        if positions is None:
            positions = torch.arange(self.blocks, device=features.device)
        elif positions.numel():
            self._check_positions(positions)
            self.grow(int(positions.max()) // self.columns + 1)
        if features.dim() != 3 or features.shape[1:2] != positions.shape:
            raise ValueError(
                f"features: expected [B, {positions.numel()}, D], one feature a position, got {list(features.shape)}"
            )
        if features.numel() == 0:
            return
        features = features.detach()
        count = features.shape[0]
        self._level(0).write(features.flatten(0, 1), positions.repeat(count))
        groups, means = self._group_means(features, positions)
        self._level(1).write(means.flatten(0, 1), groups.repeat(count))
        self._level(2).write(features.amax(dim=1), positions.new_zeros(count))

    def grow(self, rows: int) -> None:
        """Have a grid of at least ``rows`` rows; what is stored stays where it is."""
        if rows * self.columns > self.blocks:
            for number, size in enumerate(self._sizes(rows)):
                self._level(number).grow(size)

    def clear(self) -> None:
        """Hold nothing again."""
        for number in range(len(self.levels)):
            self._level(number).clear()

    def _level(self, number: int) -> SpaceAwareMemory:
        level = self.levels[number]
        assert isinstance(level, SpaceAwareMemory)
        return level

    def _sizes(self, rows: int) -> tuple[int, int, int]:
        """Positions of every level for a grid of ``rows`` rows."""
        return rows * self.columns, -(-rows // self.group) * self._group_columns, 1

    @property
    def _group_columns(self) -> int:
        return -(-self.columns // self.group)

    def _group_means(self, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The groups that ``positions`` lie in ``[G]``, and the means of their features ``[B, G, D]``."""
        row, column = positions // self.columns, positions % self.columns
        group = row // self.group * self._group_columns + column // self.group
        groups = group.unique()
        members = (groups[:, None] == group).to(features.dtype)
        return groups, members / members.sum(dim=1, keepdim=True) @ features

    def _check_positions(self, positions: Tensor) -> None:
        if positions.dim() != 1 or len(positions.unique()) != positions.numel() or int(positions.min()) < 0:
            raise ValueError(f"positions: expected [P] distinct values of at least 0, got {positions.tolist()}")
