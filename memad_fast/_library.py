"""The ``memad_fast`` operator library: schemas are defined here in Python, once.

So ``torch.ops.memad_fast.*`` exists, with shapes and gradients, where no compiled library does; ``_C_cpu`` and
``_C_cuda`` add implementations for their device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("memad_fast", "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define one op: its schema ("name(Tensor x, ...) -> ..."), its fake kernel and, if it has one, its gradient."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"memad_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"memad_fast::{name}", backward, setup_context=setup_context, lib=_library)
