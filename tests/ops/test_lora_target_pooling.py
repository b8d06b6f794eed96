"""``lora_target_attention`` with the poolings "din" and "top_k" against the plain formulation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3.ops import _dispatch
from tests import oracle
from tests.ops.test_lora_target_attention import make, op, plain, shapes

# Triton has softmax only.
BACKENDS = [backend for backend in oracle.backends("lora_target_attention") if backend.values[0] != "triton"]


def pooled(pooling: str, k: int | None, backend: str = "torch") -> tuple[Any, Any]:
    """The operation and its reference with a pooling."""
    return tuple(lambda fn=fn, **args: fn(**args, pooling=pooling, top_k=k) for fn in (op("absorb", backend), plain))  # type: ignore[misc]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_normalised(dtype, backend, seed):
    oracle.skip_unless_served(backend, dtype)

    @settings(max_examples=25)
    @given(shape=shapes(tiny=dtype not in oracle.HALF), salt=st.integers(0, 2**31))
    def check(shape, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(*pooled("din", None, backend), make(**shape), dtype, salt)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigmoids_of_scores_that_are_large(backend):
    """Weights near 0 and near 1, whose slope is what is left to 1; and far beyond what an exponential holds."""
    for size in (10.0, 1000.0):
        args = oracle.convert(make(3, 2, 4, 6, 9, [5, 0, 7], m=2), torch.float32)
        args = args | {"target": (size * args["target"]).detach().requires_grad_()}
        for got, want in zip(*(oracle.run(fn, oracle.convert(args, dtype), 0) for fn, dtype in
                               zip(pooled("din", None, backend), (torch.float32, torch.float64), strict=True)), strict=True):  # fmt: skip
            assert torch.isfinite(got).all()
            assert oracle.relative_error(got, want, 0.01) < 1e-5 * size


def apart(args: dict[str, Any], heads: int) -> dict[str, Any]:
    """The same with scores whose order is far from any rounding: a bias of its own for each place, half apart."""
    ids, offsets = args["ids"], args["offsets"]
    n = ids.shape[1] if offsets is None else max([0, *offsets.diff().tolist()])
    table = torch.stack([torch.randperm(n) / 2 for _ in range(heads)]).double().requires_grad_()
    within = torch.arange(n).expand(ids.shape) if offsets is None else torch.cat([torch.arange(k) for k in [0, *offsets.diff().tolist()]])
    target = (0.01 * args["target"]).detach().requires_grad_()
    return args | dict(biases=[(table, within.long())], target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 4, 60])
def test_the_best_of_a_history(k, dtype, seed):
    @settings(max_examples=10)
    @given(shape=shapes(tiny=dtype not in oracle.HALF), salt=st.integers(0, 2**31))
    def check(shape, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(*pooled("top_k", k), apart(make(**shape), shape["heads"]), dtype, salt)

    check()


@pytest.mark.parametrize("pooling", ["din", "top_k"])
@pytest.mark.parametrize("lengths", [4, [2, 0, 5]], ids=["padded", "jagged"])
def test_gradcheck_of_other_poolings(pooling, lengths):
    args = apart(make(3, 2, 2, 3, 4, lengths, m=2, holes=True), 2)
    oracle.gradcheck(pooled(pooling, 2 if pooling == "top_k" else None)[0], args)


def test_as_many_as_there_are_is_all_and_equal_scores_join():
    args = make(4, 2, 4, 6, 9, [5, 0, 7, 2])
    for a, b in zip(oracle.run(pooled("top_k", 7)[0], args, 0), oracle.run(op("absorb", "torch"), args, 0), strict=True):
        assert torch.equal(a, b)
    args["ids"].fill_(3)  # one item again and again: all places are the best
    torch.testing.assert_close(pooled("top_k", 1)[0](**args)[0], op("absorb", "torch")(**args)[0])


def test_an_item_named_twice_counts_twice_or_not_at_all(seed):
    """Its two scores may be rounded apart: by the place they have in a product, and that is another in float64."""
    args = oracle.convert(make(400, 4, 16, 64, 50, 61), torch.float32)
    got, want = (pooled("top_k", 10)[0](**given).detach().double() for given in (args, oracle.convert(args, torch.float64)))
    assert float((got - want).norm(dim=-1).div(want.norm(dim=-1)).max()) <= 1e-4


@pytest.mark.parametrize("pooling", ["din", "top_k"])
def test_other_poolings_take_a_backend_that_has_them(pooling):
    args = oracle.convert(make(3, 2, 4, 6, 9, [4, 1, 6]), torch.float32)
    how = dict(pooling=pooling, top_k=2 if pooling == "top_k" else None)
    torch.testing.assert_close(op("auto", "auto")(**args, **how), op("absorb", "torch")(**args, **how))
    compiled = torch.compile(op("auto", "auto"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args, **how), op("absorb", "torch")(**args, **how))
    if pooling == "top_k" and _dispatch.module("lora_target_attention", "cpp").unavailable() is None:
        with pytest.raises(em3.BackendError, match="it has no pooling 'top_k', only 'softmax' and 'din'; use another backend"):
            op("auto", "cpp")(**args, **how)
