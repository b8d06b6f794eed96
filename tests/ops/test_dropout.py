"""Dropout of ``qformer_attention``'s weights: every backend drops the same ones, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3.ops._dropout import Dropout
from tests import oracle
from tests.ops.test_qformer_attention import as_streams, make, plain, shapes

BACKENDS = [b for b in oracle.backends("qformer_attention") if b.values[0] != "triton"]


def op(backend: str, p: float, salt: int) -> Any:
    def call(values, offsets, **kwargs):
        torch.manual_seed(salt)
        return em3.ops.qformer_attention(streams=as_streams(values, offsets), backend=backend, dropout=p, **kwargs)

    return call


def dropped(p: float, salt: int) -> Any:
    """The plain formulation with the mask that the operation draws after the same ``manual_seed``."""

    def call(values, offsets, **kwargs):
        torch.manual_seed(salt)
        drop = Dropout(p, torch.randint(torch.iinfo(torch.int64).max, (1,)))
        return plain(values, offsets, drop=drop, **kwargs)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_the_plain_formulation(backend, dtype, seed):
    oracle.skip_unless_served(backend, dtype)

    @settings(max_examples=30)
    @given(shape=shapes(tiny=dtype not in oracle.HALF), p=st.sampled_from([0.1, 0.5, 1.0]), salt=st.integers(0, 2**31))
    def check(shape, p, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(op(backend, p, salt), dropped(p, salt), make(**shape), dtype, salt)

    check()


def test_a_share_p_of_the_weights_is_dropped_anywhere(seed):
    kept = Dropout(0.3, torch.randint(2**62, (1,))).factors(1, torch.arange(4000).view(2, 2000), 60, torch.float64) > 0
    # Over tokens, over rows and over all: within five standard deviations of 0.7, and no two rows alike.
    for share, n in ((kept.double().mean(2), 2000), (kept.double().mean((0, 1)), 120), (kept.double().mean(), 240_000)):
        assert (share - 0.7).abs().max() < 5 * (0.21 / n) ** 0.5
    agree = (kept[0][:, None] == kept[0][None]).double().mean(-1)  # [rows, rows]
    assert (agree - torch.eye(60) - 0.58 * (1 - torch.eye(60))).abs().max() < 5 * (0.58 * 0.42 / 2000) ** 0.5


def test_another_call_drops_others_and_a_seed_repeats_them():
    args = make(2, 3, 2, 8, [16], [40], grad=False)
    first, again = op("torch", 0.5, 1)(**args), op("torch", 0.5, 1)(**args)
    assert torch.equal(first, again)
    assert not torch.equal(first, op("torch", 0.5, 2)(**args))


def test_operator_contract():
    u, w = [torch.randn(2, 1, 3, 8, requires_grad=True)], [torch.randn(2, 5, 8, requires_grad=True)]
    x = [torch.randn(2, 5, 8, requires_grad=True)]
    args = (u, None, w, x, [None], [None], 2, torch.tensor([7]), 0.5, "torch")
    torch.library.opcheck(torch.ops.em3.qformer_attention, args)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles(backend):
    args = oracle.convert(make(3, 2, 2, 8, [16], [9]), torch.float32)

    def call(values, offsets, **kwargs):
        return em3.ops.qformer_attention(streams=as_streams(values, offsets), backend=backend, dropout=0.5, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    first, second = compiled(**args), compiled(**args)
    assert first.isfinite().all()
    assert first.requires_grad
    assert not torch.equal(first, second)


def test_layers_drop_in_training_only():
    layer = em3.layers.FusionQFormer([16], 8, num_queries=2, num_heads=2, attention_dropout=0.5)
    x = torch.randn(3, 7, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("given_", "message"), [
    (dict(dropout=1.5), "dropout: was 1.5, must be a probability from 0 to 1"),
    (dict(dropout=float("nan")), "dropout: was nan, must be"),
    (dict(dropout=0.1, strategy="project"), "strategy: was 'project', must be 'absorb' or 'auto' with dropout"),
])  # fmt: skip
def test_errors(given_, message):
    args = make(2, 3, 2, 8, [16], [4], grad=False)
    values, offsets = args.pop("values"), args.pop("offsets")
    with pytest.raises(ValueError, match=message):
        em3.ops.qformer_attention(streams=as_streams(values, offsets), **args, **given_)
