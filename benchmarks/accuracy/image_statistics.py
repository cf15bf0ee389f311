"""A detector that looks at no part of an image: its brightness, contrast, quantiles and roughness as a whole.

Score: the Mahalanobis distance of these numbers to those of the normal images (shrunk covariance). A method that does
not beat it has shown nothing, for it may have seen no more than this.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memad_fast.data import Dataset, Images

_QUANTILES = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])


def scores(data: Dataset) -> np.ndarray:
    """``[N]``: the score of every test image; larger is more anomalous."""
    from sklearn.covariance import LedoitWolf
    from sklearn.preprocessing import StandardScaler

    normal = _of_all(data.train)
    scaler = StandardScaler().fit(normal)
    return LedoitWolf().fit(scaler.transform(normal)).mahalanobis(scaler.transform(_of_all(data.test)))


def statistics(images: Tensor) -> Tensor:
    """``[B, 9·C + 2]`` of ``[B, C, H, W]``: mean, deviation, seven quantiles a channel; mean steps across and down."""
    pixels = images.flatten(2)
    quantiles = torch.quantile(pixels, _QUANTILES, dim=2).permute(1, 2, 0).flatten(1)
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(dim=1, keepdim=True)
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(dim=1, keepdim=True)
    return torch.cat([pixels.mean(dim=2), pixels.std(dim=2), quantiles, across, down], dim=1)


def _of_all(images: Images) -> np.ndarray:
    return np.concatenate([statistics(batch.images).double().numpy() for batch in images.batches(64)])
