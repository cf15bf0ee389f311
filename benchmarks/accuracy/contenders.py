"""What is compared: every system beside its own ablation, and beside what needs no system at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STATISTICS = "statistics"
"""The model that is none: see ``image_statistics.py``."""


@dataclass(frozen=True)
class Contender:
    """One row of a table: a model with some options, as ``memad-fast fit --model MODEL --set NAME=VALUE`` takes them.

    Rows of one ``system`` stand together; the one without a ``variant`` is the system, the other its ablation.
    """

    system: str
    variant: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    """The preset that holds the published setting for the full protocol; none: the small one."""
    is_seeded: bool = True
    """Whether two seeds can differ."""

    @property
    def title(self) -> str:
        return f"{self.system}, {self.variant}" if self.variant else self.system


CONTENDERS = (
    Contender("pmb", "", "pmb", published="mnist"),
    Contender("pmb", "without memory", "pmb", {"memory": "none"}, published="mnist"),
    Contender("memstc", "", "memstc", published="paper-industrial"),
    Contender("memstc", "without memory", "memstc", {"memory": "concat"}, published="paper-industrial"),
    # SALAD has no memory. What it adds to a translation auto-encoder trained on SSIM is what is left out here.
    Contender("salad", "", "salad", published="paper"),
    Contender(
        "salad",
        "plain translation",
        "salad",
        {"adversarial": 0.0, "feature": 0.0, "centre": 0.0, "restoration": 0.0, "score": "image"},
        published="paper",
    ),
    Contender("simsid", "", "simsid", published="paper"),
    Contender("simsid", "without memory", "simsid", {"memory": "none"}, published="paper"),
    Contender("patchcore", "", "patchcore"),
    Contender("patchcore", "of raw pixels", "patchcore", {"backbone": "pixels"}),
    # PMB's network without its memories and skips.
    Contender("auto-encoder", "", "pmb", {"memory": "none", "skip": False}, published="mnist"),
    Contender("image statistics", "", STATISTICS, is_seeded=False),
)

SYSTEMS = tuple(dict.fromkeys(contender.system for contender in CONTENDERS))
