"""The absorbed ``lora_target_attention`` as one step of autograd: how it behaves as a part of a user's graph."""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest
import torch

import em3


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


@pytest.mark.parametrize("name", ["history", "offsets"])
def test_index_tensors_that_are_written_to_are_refused(seed, name):
    given = {"history": torch.tensor([0, 5, 2, 2, 1]), "offsets": torch.tensor([0, 2, 2, 5])}
    out = step(torch.randn(3, 8, requires_grad=True), em3.Jagged(given["history"], given["offsets"]), torch.randn(6, 5))
    given[name][1] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
