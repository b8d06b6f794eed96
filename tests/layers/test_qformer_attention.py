from __future__ import annotations

import pytest
import torch

import em3
from em3 import reference


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_operation_on_its_parameters(bias):
    layer = em3.QFormerAttention([6, 5], 8, num_heads=2, bias=bias)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    query = torch.randn(3, 8)
    streams = [torch.randn(2, 4, 6), em3.Jagged(torch.randn(5, 5), torch.tensor([0, 5, 5]))]
    masks = [torch.rand(2, 4) > 0.5, None]
    biases = [layer.b_q, list(layer.b_k), list(layer.b_v), layer.b_o] if bias else [None] * 4
    want = reference.qformer_attention(
        query, streams, layer.w_q, list(layer.w_k), list(layer.w_v), layer.w_o, *biases, num_heads=2, masks=masks
    )
    got = layer(query, streams, masks)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    found = layer.attention_weights(query, streams, masks)
    of = reference.qformer_attention_weights(
        query, streams, layer.w_q, list(layer.w_k), *biases[:2], num_heads=2, masks=masks
    )
    torch.testing.assert_close(found[0], of[0])
    torch.testing.assert_close(found[1].values().permute(1, 2, 0), of[1][0])  # all of them are item 0's


def test_starts_like_multihead_attention_and_survives_a_state_dict():
    layer = em3.QFormerAttention([6], 8, num_heads=2)
    assert not layer.b_q.any()
    assert layer.w_k[0].abs().max() <= (6 / (6 + 8)) ** 0.5
    other = em3.QFormerAttention([6], 8, num_heads=2)
    other.load_state_dict(layer.state_dict())
    query, x = torch.randn(3, 8), torch.randn(2, 4, 6)
    assert torch.equal(layer(query, x), other(query, x))
