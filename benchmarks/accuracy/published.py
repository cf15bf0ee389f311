"""What papers report on the sets that are compared here, for the row that is nearest to what they trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure of a paper, and the row of the tables that it belongs beside."""

    set: str
    system: str
    variant: str
    image_auroc: float
    source: str
    """Paper, table and image size, and what else keeps it from being the same thing."""


_PMB = "PMB, table {}, 128 px"
_SALAD = "SALAD, table I, 256 px, 200 epochs"

PUBLISHED = (
    Published("mvtec_bottle", "pmb", "", 0.952, _PMB.format("I")),
    Published("mvtec_bottle", "pmb", "without memory", 0.713, _PMB.format("V") + ", AE+skip"),
    Published("mvtec_bottle", "auto-encoder", "", 0.80, _PMB.format("V") + ", AE-L2"),
    Published(
        "mvtec_bottle", "memstc", "", 0.97,
        "MemSTC-Net, table I, 224 px, 800 epochs; its peers' figures there are those of pixels",
    ),
    Published(
        "mvtec_bottle", "patchcore", "", 1.0, "PatchCore (arXiv:2106.08265), table S1, 224 px, features of ImageNet"
    ),
    Published("mnist", "pmb", "", 0.981, _PMB.format("II")),
    Published("cxr_zhanglab", "salad", "", 0.8265, _SALAD),
    Published("cxr_zhanglab", "salad", "plain translation", 0.7937, _SALAD + ", SSIM-based AE"),
    Published("cxr_zhanglab", "auto-encoder", "", 0.5987, _SALAD + ", another auto-encoder"),
)  # fmt: skip
