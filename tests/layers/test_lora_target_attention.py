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


@pytest.mark.parametrize("jagged", [False, True])
def test_biases_of_position_and_age(jagged):
    layer = em3.LoRATargetAttention(6, 8, num_heads=2, position_buckets=3, time_buckets=5).double()
    assert not layer.position_bias.any()
    assert not layer.time_bias.any()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)  # at 1 a softmax may be so steep that its gradient is nothing but rounding
    target, bank = torch.randn(4, 8).double(), torch.randn(7, 6).double()
    history = torch.tensor([[0, 6, 2, 5, 1, 3, 4, 0], [1, 4, -1, -1, -1, -1, -1, -1], [-1] * 8, [-1, 2, -1, 6, -1, -1, -1, -1]])
    age = torch.tensor([[900, 15, 14, 7, 6, 2, 0, -3], [1, 0, 9, 9, 9, 9, 9, 9], [9] * 8, [8, 3, 2, 1, 9, 9, 9, 9]])
    position = torch.tensor([[2, 2, 2, 2, 2, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8, [2, 1, 1, 0, 0, 0, 0, 0]])
    bucket = torch.tensor([[4, 4, 3, 3, 2, 1, 0, 0], [1, 0, 3, 3, 3, 3, 3, 3], [3] * 8, [3, 2, 1, 1, 3, 3, 3, 3]])
    if jagged:
        kept, bounds = torch.tensor([8, 2, 0, 4])[:, None] > torch.arange(8), torch.tensor([0, 8, 10, 10, 14])
        history = em3.Jagged(torch.cat([history[kept], torch.tensor([5])]), bounds)  # and one behind the last offset
        age, position, bucket = (torch.cat([t[kept], t.new_zeros(1)]) for t in (age, position, bucket))
    loras = {"lora_k": (layer.lora_k_a, layer.lora_k_b, 1.0), "lora_v": (layer.lora_v_a, layer.lora_v_b, 1.0)}
    want = reference.lora_target_attention(
        target, history, bank, layer.w_q, layer.w_k, layer.w_v, layer.w_o, num_heads=2, **loras,
        biases=[(layer.position_bias, position), (layer.time_bias, bucket)],
    )  # fmt: skip
    got = layer(target, history, bank, age)
    assert relative_error(got.detach(), want.detach()) <= 1e-11
    tables = [layer.position_bias, layer.time_bias]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), tables) for x in (got, want)), strict=True):
        assert relative_error(a, b) <= 1e-11


def test_no_place_has_no_position():
    layer = em3.LoRATargetAttention(6, 8, num_heads=2, position_buckets=3)
    for history in (torch.empty(2, 0, dtype=torch.long), em3.Jagged(torch.empty(0, dtype=torch.long), torch.zeros(3).long())):
        assert not layer(torch.randn(2, 8), history, torch.randn(7, 6)).any()


@pytest.mark.parametrize(("pooling", "top_k"), [("softmax", None), ("din", None), ("top_k", 2)])
def test_pooling(pooling, top_k):
    layer = em3.LoRATargetAttention(6, 8, num_heads=2, rank=0, pooling=pooling, top_k=top_k)
    target, bank, history = torch.randn(2, 8), torch.randn(7, 6), torch.tensor([[0, 6, 2, 3], [-1, 1, -1, -1]])
    want = reference.lora_target_attention(target, history, bank, layer.w_q, layer.w_k, layer.w_v, layer.w_o, num_heads=2,
                                           pooling=pooling, top_k=top_k)  # fmt: skip
    assert relative_error(layer(target, history, bank).detach(), want.detach()) <= 1e-5
    assert f"pooling={pooling}" in repr(layer)


def test_adapters_start_as_nothing():
    layer = em3.LoRATargetAttention(6, 8, num_heads=2)
    assert layer.lora_k_a.any()
    assert not layer.lora_k_b.any()
    assert em3.LoRATargetAttention(6, 8, num_heads=2, train_base=True).w_k.requires_grad
    assert not em3.LoRATargetAttention(6, 8, num_heads=2, rank=0, train_base=False).w_k.requires_grad
