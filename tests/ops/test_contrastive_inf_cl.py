"""The memory of ``contrastive_loss`` on a GPU beside that of Inf-CL: what both allocate is counted, and no kernel runs.

Inf-CL publishes its figures as pictures, so its package (``inf_cl``) is counted as its README calls it, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import em3
from tests.ops.test_contrastive_peers import peer

B, V = 1024, 64  # blocks enough for every program of a launch to have rows of its own


class Nothing:
    """In a kernel's place: a launch that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def allocated(call: Callable[[], object]) -> int:
    """The most bytes that are there at a time of what a call allocates."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert found is not None
    assert most > 0
    return most


def step(loss: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], object]:
    leaves = [t.to(dtype).requires_grad_() for t in (torch.randn(B, V), torch.randn(B, V), torch.tensor(14.0))]
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return em3.ops.contrastive_loss(x, y, logit_scale=scale, backend="triton")


@pytest.fixture
def inf_cl(monkeypatch):
    """Its loss; its kernels and ours launch nothing."""
    peer("triton")
    package, flash, ring = (peer(name) for name in ("inf_cl", "inf_cl.flash", "inf_cl.ring"))
    from em3.backends.triton import contrastive_loss as backend
    from em3.kernels import contrastive_loss as kernels

    for module, names in ((flash, ("_prob_fwd", "_dq_prob_bwd", "_dk_prob_bwd")), (kernels, ("_split", "_statistics", "_gradient"))):
        for name in names:
            monkeypatch.setattr(module, name + "_kernel" * (module is flash), Nothing())
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "cannot_use", lambda device: None)
    monkeypatch.setattr(ring.dist, "all_reduce", lambda tensor: None)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        ways = [package.cal_inf_loss(a, b, scale=scale, head_dim=V) for a, b in ((x, y), (y, x))]
        return (ways[0] + ways[1]) / 2

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_memory_than_inf_cl(dtype, inf_cl, monkeypatch):
    most = allocated(step(ours, dtype))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # which it asserts
    assert most <= allocated(step(inf_cl, dtype))
