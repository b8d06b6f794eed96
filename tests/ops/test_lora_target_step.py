"""The absorbed ``lora_target_attention`` as one step of autograd: how it behaves as a part of a user's graph."""

from __future__ import annotations

import contextlib
import warnings
import weakref

import numpy as np
import pytest
import torch

import em3
from tests import oracle


def step(t, h, bank):
    return em3.LoRATargetAttention(5, 8, num_heads=2)(t, h, bank)


@pytest.mark.parametrize("targets", [(3, 8), (3, 2, 8)], ids=str)
def test_its_output_may_be_changed_in_place(targets):
    t = torch.randn(targets, requires_grad=True)
    step(t, torch.randint(9, (3, 4)), torch.randn(9, 5)).add_(1).relu_().sum().backward()
    assert t.grad.shape == t.shape


def test_its_graph_keeps_no_input_that_it_does_not_read():
    given = torch.randn(3, 8, requires_grad=True)
    target = given * 1
    alive = weakref.ref(target)
    loss = step(target, torch.randint(9, (3, 4)), torch.randn(9, 5)).sum()
    del target
    loss.backward()
    assert alive() is None


def test_can_be_traced():
    layer, args = em3.LoRATargetAttention(5, 8, num_heads=2), (torch.randn(3, 8), torch.randint(9, (3, 4)), torch.randn(9, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the shapes that a trace takes for constants, and of its age
        traced = torch.jit.trace(layer, args)
    torch.testing.assert_close(traced(*args), layer(*args))


def test_numbers_of_numpy_are_numbers():
    layer = em3.LoRATargetAttention(5, 8, num_heads=2, pooling="top_k", top_k=np.int64(2), alpha=np.float32(4))
    assert layer(torch.randn(3, 8), torch.randint(9, (3, 4)), torch.randn(9, 5)).shape == (3, 8)


@pytest.mark.parametrize("backend", oracle.backends("lora_target_attention"))
def test_what_is_written_behind_the_back_of_autograd_leads_nowhere(seed, backend):
    """In place it is refused; through ``.data`` the backward may complain or not, but reads nothing outside."""
    for name, wild in (("history", 10**9), ("history", -(10**9)), ("offsets", 10**9), ("offsets", -1)):
        target, bank = torch.randn(3, 8, requires_grad=True), torch.randn(6, 4, requires_grad=True)
        given = {"history": torch.tensor([0, 5, 2, 2, 1]), "offsets": torch.tensor([0, 2, 2, 5])}
        weights = [torch.randn(8, c, requires_grad=True) for c in (8, 4, 4, 8)]
        out = em3.ops.lora_target_attention(target, em3.Jagged(given["history"], given["offsets"]), bank, *weights, num_heads=2,
                                            strategy="absorb", backend=backend)  # fmt: skip
        given[name].data[1] = wild
        with contextlib.suppress(ValueError, IndexError, RuntimeError):
            out.sum().backward()
            assert bank.grad is not None
        given[name][1] = 1
        out = em3.ops.lora_target_attention(target, em3.Jagged(given["history"], given["offsets"]), bank, *weights, num_heads=2,
                                            strategy="absorb", backend=backend)  # fmt: skip
        given[name][1] = 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
