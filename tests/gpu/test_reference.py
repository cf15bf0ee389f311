"""The reference on the GPU: the definition of right does not depend on the device."""

from __future__ import annotations

import pytest
import torch
from calls import Call, each_call, outputs
from where import DEVICE

import memad_fast


@each_call
def test_it_gives_the_cpus_results_in_float64(call: Call) -> None:
    if call.ops == ("nearest_keys_stats",):
        pytest.skip("the reference counts no survivors")
    inputs = tuple(value.double() if value.is_floating_point() else value for value in call.inputs())
    with memad_fast.use_backend("reference"):
        expected = outputs(call, tuple(value.clone() for value in inputs))
        got = outputs(call, tuple(value.clone().to(DEVICE) for value in inputs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)
