"""``Jagged`` as a container."""

from __future__ import annotations

import pytest
import torch

import em3


def test_moves_as_a_tensor_does():
    jagged = em3.Jagged(torch.randn(4, 2), torch.tensor([0, 1, 4], dtype=torch.int32))
    half = jagged.to(torch.float16)
    assert (half.values().dtype, half.offsets().dtype) == (torch.float16, torch.int32)
    assert torch.equal(half.offsets(), jagged.offsets())
    for moved in (jagged.to("meta"), jagged.to(device="meta", non_blocking=True), jagged.to("meta", torch.float64)):
        assert moved.values().device.type == moved.offsets().device.type == "meta"
    assert jagged.to("cpu").values() is jagged.values()
    with pytest.raises(TypeError):
        jagged.to("meta", 3, 4, 5, 6, 7)
