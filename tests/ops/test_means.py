"""``mean_rows`` against float64: compiled on every instruction set, and by PyTorch where a gradient is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from em3 import use_backend
from em3.backends import cpp
from em3.ops import _means
from em3.ops._means import mean_rows
from tests.oracle import force_isa

compiled_only = pytest.mark.skipif(cpp.unavailable() is not None, reason=f"em3._C: {cpp.unavailable()}")


@pytest.fixture(params=["baseline", "avx2", "avx512", "none"])
def path(request, monkeypatch):
    """The compiled kernel on an instruction set, or PyTorch."""
    if request.param == "none":
        with use_backend("torch"):
            yield request.param
        return
    force_isa(request.param, monkeypatch)
    yield request.param


def oracle(rows, offsets, places):
    read = rows.double() if places is None else rows.double()[places]
    cuts = zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    return torch.stack([read[a:b].mean(0) if b > a else torch.zeros(rows.shape[1], dtype=torch.float64) for a, b in cuts])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 300), st.booleans(), st.integers(0, 2**31))
def check(lengths, width, looked_up, seed):
    torch.manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        total = int(offsets[-1])
        rows = torch.randn(50 if looked_up else total + 3, width + 2).to(dtype)[:, :width]  # neither side by side nor all read
        places = torch.randint(1, 50, (total + 2,)) if looked_up else None
        rows[0 if looked_up else total] = torch.nan  # named by nobody
        if looked_up:
            places[total] = 0
        else:
            rows[total:] = torch.nan
        found = mean_rows(rows, offsets, places)
        assert found.dtype == torch.float32
        expected = oracle(rows, offsets, places)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-6)
        torch.testing.assert_close(mean_rows(rows, offsets.int(), places), found, rtol=0, atol=0)


def test_against_float64(path):
    check()


def test_many_segments_on_two_threads(seed, path):
    """Parts are cut where the rows are, with empty segments in front, between and behind."""
    lengths = torch.tensor([0, 0, 3000, 0, 1, 0, 900, 900, 0, 0])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = torch.randn(int(offsets[-1]), 130)
    torch.testing.assert_close(mean_rows(rows, offsets).double(), oracle(rows, offsets, None), rtol=1e-5, atol=1e-5)
    assert mean_rows(rows, torch.tensor([0])).shape == (0, 130)
    assert not mean_rows(rows[:0], torch.zeros(4, dtype=torch.int64)).any()


def test_gradient_and_graphs(seed, path):
    rows, offsets, places = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 2, 5]), torch.tensor([5, 1, 1, 0, 3])
    assert torch.autograd.gradcheck(lambda r: mean_rows(r, offsets, places), rows)
    single = rows.detach().float().requires_grad_()
    assert mean_rows(single, offsets).requires_grad
    compiled = torch.compile(lambda r: mean_rows(r, offsets, places), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(single.detach()), mean_rows(single.detach(), offsets, places))


@compiled_only
def test_the_compiled_kernel_is_what_serves(monkeypatch):
    monkeypatch.setattr(_means.F, "embedding_bag", None)
    mean_rows(torch.randn(4, 3), torch.tensor([0, 4]))
    with torch.no_grad():
        mean_rows(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 4]))


def test_whatever_integers_default_dtype_or_transform(seed, path):
    rows, offsets, places = torch.randn(6, 5), torch.tensor([0, 2, 5]), torch.tensor([5, 1, 1, 0, 3])
    want = mean_rows(rows, offsets, places)
    for of_offsets, of_places in ((torch.int32, torch.int32), (torch.int32, torch.int64), (torch.int64, torch.int32)):
        torch.testing.assert_close(mean_rows(rows, offsets.to(of_offsets), places.to(of_places)), want, rtol=0, atol=0)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(mean_rows(rows, offsets, places), want, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mean_rows(rows, offsets, places), want)
    found = torch.func.grad(lambda r: mean_rows(r, offsets).sum())(rows)
    torch.testing.assert_close(found, torch.tensor([1 / 2] * 2 + [1 / 3] * 3 + [0])[:, None].expand(6, 5))


def test_is_recorded_where_operations_are(seed):
    rows, offsets = torch.randn(6, 5), torch.tensor([0, 2, 5])
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda r: mean_rows(r, offsets))(rows)
    other = torch.randn(6, 5)
    torch.testing.assert_close(graph(other), mean_rows(other, offsets))


def direct():
    return dict(x=torch.randn(5, 8), places=torch.tensor([0, 4, 2, 2]), offsets=torch.tensor([0, 1, 1, 4]), mean=torch.empty(3, 8), threads=2)


@compiled_only
@pytest.mark.parametrize(("change", "message"), [
    (dict(x=torch.randn(5, 8).double()), "mean_rows: x: was torch.float64, must be torch.float32, torch.bfloat16 or torch.float16"),
    (dict(x=torch.randn(8, 5).t()), "mean_rows: x: was of strides"),
    (dict(x=torch.randn(8)), r"mean_rows: x: was \[8\]"),
    (dict(x=torch.randn(5, 8, device="meta")), "mean_rows: x: was on meta"),
    (dict(places=torch.tensor([0, 4, 2, 5])), "mean_rows: a place named a row outside"),
    (dict(places=torch.tensor([0, -1, 2, 2])), "mean_rows: a place named a row outside"),
    (dict(places=torch.tensor([0, 4, 2])), "mean_rows: C must be at least 1, offsets must begin with 0 and end within"),
    (dict(places=torch.tensor([0, 4, 2, 2], dtype=torch.int32)), "mean_rows: places: was torch.int32"),
    (dict(offsets=torch.tensor([1, 1, 1, 4])), "mean_rows: C must be at least 1, offsets must begin with 0"),
    (dict(offsets=torch.tensor([0, 3, 1, 4])), "mean_rows: offsets must not decrease"),
    (dict(offsets=torch.tensor([0, 2**62, 1, 4])), "mean_rows: offsets must not decrease"),
    (dict(offsets=torch.tensor([], dtype=torch.int64)), r"mean_rows: offsets: was empty, must be \[B \+ 1\]"),
    (dict(mean=torch.empty(2, 8)), r"mean_rows: mean: was \[2, 8\], must be \[3, 8\]"),
    (dict(mean=torch.empty(3, 16)[:, ::2]), "mean_rows: mean: was of strides"),
])  # fmt: skip
def test_the_compiled_code_takes_nothing_on_trust(change, message):
    cpp.compiled().mean_rows(**direct())
    with pytest.raises(ValueError, match=message):
        cpp.compiled().mean_rows(**direct() | change)
