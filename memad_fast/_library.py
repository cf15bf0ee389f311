"""The ``memad_fast`` operator library: schemas are defined here in Python, once.

So ``torch.ops.memad_fast.*`` exists, with shapes and gradients, where no compiled library does; ``_C_cpu``, ``_C_cuda``
and the Triton kernels add implementations for their device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from memad_fast._triton import serve_by_triton

_library = torch.library.Library("memad_fast", "DEF")
# Of each op that writes: the positions of the arguments that it writes to.
_written: dict[Any, list[int]] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define one op: its schema ("name(Tensor x, ...) -> ..."), its fake kernel and, if it has one, its gradient.

    An op that writes to arguments ("Tensor(a!) x") is not recorded by autograd, and counts as an in-place change:
    a later backward that needs what was overwritten is an error, as after any in-place op of torch.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"memad_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"memad_fast::{name}", backward, setup_context=setup_context, lib=_library)
    serve_by_triton(name)
    op = getattr(torch.ops.memad_fast, name).default
    if op._schema.is_mutable:
        aliases = [argument.alias_info for argument in op._schema.arguments]
        _written[op] = [at for at, alias in enumerate(aliases) if alias is not None and alias.is_write]
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        _library.impl(name, _counting_changes(op), "ADInplaceOrView", with_keyset=True)


def _counting_changes(op: Any) -> Callable[..., None]:
    """The kernel that calls the device's and counts the change, for calls of ``torch.ops``."""

    def kernel(keyset: Any, *arguments: Any) -> None:
        op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)
        _count_changes(op, arguments)

    return kernel


def _count_changes(op: Any, arguments: tuple[Any, ...]) -> None:
    """Add one to the version of each argument that ``op`` wrote to; inference tensors have none."""
    increment_version([arguments[at] for at in _written[op] if not arguments[at].is_inference()])


def call(op: Any, *arguments: Any) -> Any:
    """Call ``op`` of ``torch.ops.memad_fast``; past autograd where no argument wants a gradient.

    ``register_autograd`` makes a Python kernel that is entered even if there is nothing to record: 7 to 12 µs a call.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def write(op: Any, *arguments: Any) -> None:
    """Call ``op``, which writes to arguments, and count the change; 3 µs less than the kernel that ``define`` adds."""
    if torch.compiler.is_compiling():
        op(*arguments)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op(*arguments)
    _count_changes(op, arguments)
