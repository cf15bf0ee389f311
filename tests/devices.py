"""What calls on a GPU must not do, shown without one: wait for a value, or move to another device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from memad_fast import _backend

_aten = torch.ops.aten
# What the host reads by tolist passes unseen on a CPU; fake_gpu refuses that too.
_WAITING = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.bincount, _aten.equal, _aten._unique2,
    _aten.is_nonzero, _aten.item,
}  # fmt: skip


class NothingWaits(TorchDispatchMode):
    """Refuses the operators whose result, or its shape, the host must wait for on a GPU."""

    def __enter__(self) -> NothingWaits:
        """Refuses ``tolist`` too, which is no operator on a CPU."""
        self._tolist = mock.patch.object(torch.Tensor, "tolist", side_effect=AssertionError("tolist waits"))
        self._tolist.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        """Allows all again."""
        self._tolist.stop()
        super().__exit__(*raised)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``op`` unless it waits."""
        masks = op.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if op.overloadpacket in _WAITING or masks:
            raise AssertionError(f"{op} waits for the device")
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """The second of several GPUs, of which torch knows shapes and devices only: reading a value is an error."""
    available = mock.patch.object(_backend, "_problem", return_value="")
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=False)
    with available, capturing, FakeTensorMode():
        yield torch.device("cuda:1")


def captured(step: Callable[..., Any], *arguments: torch.Tensor) -> Callable[..., Any]:
    """The operators of one call, to run again on other arguments: all that a CUDA graph keeps of a call.

    Values that the host read while the call was made stay what they were; tensors that are no arguments are read and
    written where they lie.
    """
    return make_fx(step)(*arguments)
