"""The gradient of stcm_lookup for the values that it read (MemSTC-Net, eq. 6).

    grad_values[m] = Σ grad_read[n] over the queries n that read m, in their order, in float64: ``slot_sums``

Bytes: N·V of the gradient read, M·V written, and the sort of N indices.
"""

from __future__ import annotations

from torch import Tensor

from memad_fast.kernels import slot_sums


def stcm_lookup_backward_values(grad_read: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Gradient of the read for ``values``."""
    out = values.new_empty(values.shape)
    slot_sums.sum_by_row("sum", grad_read, values, grad_read, 1, indices, out)
    return out
