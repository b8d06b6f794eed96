"""``qformer_attention_weights`` against the plain formulation in float64, stream kind by stream kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends.torch import _chunks
from tests import oracle
from tests.ops.test_qformer_attention import as_streams, make, shapes

TAKES = ("query", "w_q", "w_k", "b_q", "b_k", "num_heads", "masks", "scale")


def weights(values, offsets, **kwargs):
    kept = {name: value for name, value in kwargs.items() if name in TAKES}
    return em3.ops.qformer_attention_weights(streams=as_streams(values, offsets), **kept)


def plain(values, offsets, **kwargs):
    kept = {name: value for name, value in kwargs.items() if name in TAKES}
    return reference.qformer_attention_weights(streams=as_streams(values, offsets), **kept)


def filled_up(found):
    """Every stream as ``[B, H, Q, N]``."""
    return [reference.padding.padded(x.values(), x.offsets())[0].permute(0, 2, 3, 1) if isinstance(x, em3.Jagged) else x for x in found]


def agree(args, dtype):
    rounded = oracle.convert(args, dtype)
    with torch.no_grad():
        want = plain(**oracle.convert(rounded, torch.float64))
    with oracle.poisoned():
        got = weights(**rounded)
    for x, bounds in zip(got, args["offsets"], strict=True):
        assert isinstance(x, em3.Jagged) == (bounds is not None)
    got = filled_up(got)
    assert [x.shape for x in got] == [x.shape for x in want]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert not a.requires_grad
        # A weight is at most 1, and one of float32 scores of size 10 is off by 1e-6 of itself.
        limit = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
        assert b.numel() == 0 or float((a.double() - b).abs().max()) <= limit


@pytest.mark.parametrize(("dtype", "examples"), [(torch.float32, 30), (torch.float64, 15)], ids=str)
def test_matches_the_reference(dtype, examples, seed):
    @settings(max_examples=examples)
    @given(shape=shapes(), salt=st.integers(0, 2**31))
    def check(shape, salt):
        torch.manual_seed(seed ^ salt)
        agree(make(**shape), dtype)

    check()


@pytest.mark.parametrize("chunk", [1, 600])
@pytest.mark.parametrize("per_item", [False, True])
def test_in_chunks(chunk, per_item, monkeypatch):
    monkeypatch.setattr(_chunks, "BUDGET", chunk)
    args = make(5, 3, 2, 8, [12, 7, 9], [6, [4, 0, 9, 1, 2], [0, 3, 0, 30, 1]], masked=True, per_item=per_item)
    agree(args, torch.float32)


def test_no_keys_are_formed(monkeypatch):
    """Beyond the weights themselves, memory is that of one chunk, and no product is as wide as the keys."""
    args = oracle.convert(make(3, 2, 2, 4, [16], [[9, 30, 2]], grad=False), torch.float32)
    seen = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **k: seen.append(real(a, b, **k)) or seen[-1])
    weights(**args)
    (absorbed, *scores) = [x.shape for x in seen]
    assert absorbed == (2, 2, 16)  # [H, Q, C]
    assert all(s[1] == 4 for s in scores)  # [b, H * Q, n]


@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
def test_half_types(dtype):
    agree(make(3, 4, 2, 16, [24, 16], [30, [9, 0, 31]], masked=True, grad=False), dtype)
    args = oracle.convert(make(3, 4, 2, 16, [24], [30], grad=False), torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        (got,) = weights(**args)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), plain(**args)[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_masked_or_of_no_item_is_zero(poison):
    args = oracle.convert(make(3, 3, 2, 4, [8, 8], [6, [4, 0, 6]], masked=True, grad=False), torch.float32)
    args["masks"][0][1] = False
    args["values"][1] = torch.cat([args["values"][1], torch.full((5, 8), poison)])
    args["values"][0][~args["masks"][0]] = poison
    padded, jagged = weights(**args)
    assert not padded.permute(0, 3, 1, 2)[~args["masks"][0]].any()
    assert not jagged.values()[10:].any()
    sums = sum(x.sum(-1) for x in filled_up([padded, em3.Jagged(jagged.values()[:10], jagged.offsets())]))
    torch.testing.assert_close(sums[[0, 2]], torch.ones(2, 2, 3))
    assert not sums[1].any()  # nothing to read


def test_scale_and_projected_queries():
    args = oracle.convert(make(2, 3, 2, 4, [8], [7], grad=False), torch.float64)
    torch.testing.assert_close(weights(scale=0.9, **args), plain(scale=0.9, **args))
    ready = args | dict(query=args["query"] @ args["w_q"].T + args["b_q"], w_q=None, b_q=None)
    torch.testing.assert_close(weights(**ready), weights(**args))


def test_compiles_and_meta():
    args = oracle.convert(make(3, 2, 2, 4, [8, 6], [5, [4, 0, 6]], masked=True), torch.float32)

    def both(**kwargs):
        padded, jagged = weights(**kwargs)
        return padded, jagged.values()

    torch._dynamo.reset()
    for a, b in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(**args), both(**args), strict=True):
        torch.testing.assert_close(a, b)
    shapeless = both(**oracle.moved(args, "meta"))
    assert [x.shape for x in shapeless] == [(3, 2, 2, 5), (10, 2, 2)]


def test_error_messages():
    f = torch.randn
    good = dict(query=f(2, 4), streams=[f(2, 3, 8)], w_q=f(4, 4), w_k=[f(4, 8)], num_heads=2)
    wrong = {
        "w_k": (dict(w_k=[f(4, 7)]), r"w_k\[0\]: was \[4, 7\], must be \[4, 8\]"),
        "mask": (dict(masks=[torch.ones(2, 4, dtype=torch.bool)]), r"masks\[0\]: was torch.bool \[2, 4\]"),
        "bias": (dict(w_q=None, b_q=f(4)), "b_q: was given, must be None without w_q"),
        "offsets": (dict(streams=[em3.Jagged(f(6, 8), torch.tensor([0, 7]))]), r"streams\[0\].offsets: ended at 7"),
    }
    em3.ops.qformer_attention_weights(**good)
    for changed, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            em3.ops.qformer_attention_weights(**good | changed)
