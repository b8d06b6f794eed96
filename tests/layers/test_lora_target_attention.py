from __future__ import annotations

import pytest
import torch

import em3
from em3 import reference

from ..oracle import relative_error


@pytest.mark.parametrize("rank", [0, 2])
def test_is_the_operation_on_its_parameters(rank):
    layer = em3.LoRATargetAttention(6, 8, num_heads=2, rank=rank, alpha=3.0)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    target, bank = torch.randn(3, 8), torch.randn(7, 6)
    history = torch.tensor([[0, 6, 2], [-1, 1, -1], [-1, -1, -1]])
    loras = {}
    if rank:
        loras = {"lora_k": (layer.lora_k_a, layer.lora_k_b, 1.5), "lora_v": (layer.lora_v_a, layer.lora_v_b, 1.5)}
    want = reference.lora_target_attention(
        target, history, bank, layer.w_q, layer.w_k, layer.w_v, layer.w_o, num_heads=2, **loras
    )
    got = layer(target, history, bank)
    assert relative_error(got, want) <= 1e-5
    got.sum().backward()
    trained = {n for n, p in layer.named_parameters() if p.grad is not None}
    assert ("w_k" in trained) == (rank == 0)
    assert trained == {n for n, p in layer.named_parameters() if p.requires_grad}


def test_adapters_start_as_nothing():
    layer = em3.LoRATargetAttention(6, 8, num_heads=2)
    assert layer.lora_k_a.any()
    assert not layer.lora_k_b.any()
    assert em3.LoRATargetAttention(6, 8, num_heads=2, train_base=True).w_k.requires_grad
    assert not em3.LoRATargetAttention(6, 8, num_heads=2, rank=0, train_base=False).w_k.requires_grad


@pytest.mark.parametrize(("change", "message"), [({"num_heads": 3}, "num_heads: was 3"), ({"rank": -1}, "rank: was -1")])
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        em3.LoRATargetAttention(6, 8, **{"num_heads": 2} | change)
