"""``contrastive_loss`` of the kind "sigmoid": every backend against the whole matrix of logits in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends.torch import contrastive_loss as tiled
from tests import oracle
from tests.ops.test_contrastive_loss import BACKENDS, COMPILED, cases, degrade, make, op


@pytest.mark.parametrize(("backend", "tile", "dtype"), [
    ("torch", (4, 3), torch.float64), ("torch", None, torch.float64), ("torch", (4, 3), torch.float32),
    pytest.param("cpp", None, torch.float32, marks=COMPILED[0].marks),
])  # fmt: skip
def test_sigmoid_matches_the_reference(backend, tile, dtype, seed, monkeypatch):
    if tile:
        monkeypatch.setattr(tiled, "TILE", tile)

    @settings(max_examples=60)
    @given(case=cases((1, 2, 3, 9, 17), "sigmoid"), bias=st.sampled_from([-10.0, 0.0, 3.0]), salt=st.integers(0, 2**31))
    def check(case, bias, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(op(backend), reference.contrastive_loss, make(**case, bias=bias), dtype, salt)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
def test_sigmoid_in_half_types(backend, dtype):
    oracle.check(op(backend), reference.contrastive_loss, make(64, 32, ids=20, log_q=True, kind="sigmoid"), dtype)


def test_sigmoid_is_siglips():
    """Algorithm 1 of arXiv 2303.15343."""
    x, y, t, b = torch.randn(7, 4), torch.randn(7, 4), torch.tensor(2.0), torch.tensor(-10.0)
    zimg, ztxt = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    logits = zimg @ ztxt.T * t.exp() + b
    labels = 2 * torch.eye(7) - torch.ones(7, 7)
    want = -torch.sum(torch.nn.functional.logsigmoid(labels * logits)) / 7
    torch.testing.assert_close(em3.ops.contrastive_loss(x, y, logit_scale=t.exp(), logit_bias=b, kind="sigmoid"), want)


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("log_q", [False, True])
def test_gradcheck_of_sigmoid(duplicates, log_q, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", (2, 3))
    args = make(5, 3, k=2, ids=3, log_q=log_q, weight=True, duplicates=duplicates, reduction="none", kind="sigmoid")
    oracle.gradcheck(op("torch"), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_several_real_tiles_of_sigmoid(backend, duplicates):
    b = max(tiled.TILE) + 37
    for log_q in (False, True):
        args = make(b, 16, ids=b // 2, log_q=log_q, weight=True, kind="sigmoid", duplicates=duplicates)
        oracle.check(op(backend), reference.contrastive_loss, args, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero vectors", "identical rows", "scale 100", "scale 100, bias 100"])
def test_hard_inputs_of_sigmoid(backend, kind):
    args = make(40, 8, scale=100.0 if "scale" in kind else 7.0, bias=100.0 if "bias" in kind else -10.0, kind="sigmoid")
    degrade(args, kind)
    out, *grads = oracle.run(op(backend), oracle.convert(args, torch.float32), 0)
    want, *want_grads = oracle.run(reference.contrastive_loss, args, 0)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    for g, w in zip(grads, want_grads, strict=True):
        assert oracle.relative_error(g, w, 1e-2) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_opcheck_of_sigmoid(backend, with_offset, positive):
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    scale, bias = (torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (3.0, -2.0))
    offset = torch.rand(8, requires_grad=True) if with_offset else None
    ids = torch.tensor([0, 1, 0, 2, 3, 1])
    args = (x, y, scale, bias, ids, offset, True, True, positive, backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.em3.contrastive_sigmoid, args, test_utils=tests)
    inputs = [None if t is None else t.detach() for t in args[:6]]
    for need in ([1, 1, 1, 1, with_offset], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5):
        back = (torch.randn(6), torch.randn(6), *inputs, [bool(n) for n in need], positive, backend)
        torch.library.opcheck(torch.ops.em3.contrastive_sigmoid_backward, back)


def test_a_backend_that_cannot_serve_says_why():
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(em3.BackendError, match=r"'triton' cannot serve this call of contrastive_loss: "):
        op("triton")(content=x, ids_embedding=x, logit_scale=2.0, logit_bias=-1.0, kind="sigmoid")
