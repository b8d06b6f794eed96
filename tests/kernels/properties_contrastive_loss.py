"""What the Triton kernels of ``contrastive_loss`` compute; see properties.py, whose fixtures and ways these are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends.torch import contrastive_loss as tiled
from em3.backends.triton import contrastive_loss as backend
from em3.kernels import contrastive_loss as kernels
from tests import oracle
from tests.ops.test_contrastive_loss import cases, make, op

TILES = {"whole": kernels.Config(16, 16, 64, 64, 4, 1), "chunks": kernels.Config(16, 32, 32, 16, 4, 1)}


@pytest.fixture
def tiles(monkeypatch):
    """Call it with a tile's name and the number of programs that a launch aims at."""

    def use(name: str, waves: int) -> None:
        monkeypatch.setattr(kernels, "config", lambda *args: TILES[name])
        monkeypatch.setattr(kernels, "waves", lambda device: waves)

    return use


def test_matches_the_reference(tiles, seed):
    @settings(max_examples=5)
    @given(case=cases((2, 17, 33)), tile=st.sampled_from(sorted(TILES)), waves=st.sampled_from([1, 5, 64]), salt=st.integers(0, 2**31))
    def check(case, tile, waves, salt):
        torch.manual_seed(seed ^ salt)
        tiles(tile, waves)
        oracle.check(op("triton"), reference.contrastive_loss, make(**case), torch.float32, salt)

    check()


@pytest.mark.parametrize("tile", TILES)
def test_several_tiles_of_every_program(tile, tiles):
    tiles(tile, 5)
    oracle.check(op("triton"), reference.contrastive_loss, make(52, 40, k=9, ids=40, log_q=True, weight=True), torch.float32)


@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
def test_half_types(dtype, tiles):
    tiles("whole", 5)
    oracle.check(op("triton"), reference.contrastive_loss, make(40, 32, k=3, ids=20, log_q=True), dtype)


@pytest.mark.parametrize("apart", [19, 0])
@pytest.mark.parametrize(("ids", "offset"), [(True, False), (False, True)])
def test_a_shard_of_another_rank(apart, ids, offset, tiles):
    """As in the ring: no row is its own column, ids and offsets of rows and of columns come one behind the other."""
    tiles("whole", 5)
    b, extra, v = 23, 3, 20
    x, y, scale = torch.randn(b, v), torch.randn(apart + extra, v), torch.tensor(0.7, dtype=torch.float64)
    args = (x, y, scale, torch.randint(5, (b + apart,)) if ids else None, torch.randn(b + apart + extra) if offset else None)
    with oracle.poisoned():
        row, col = backend.forward(*args, True, True, apart)
        want_row, want_col = tiled.forward(*args, True, True, apart)
        torch.testing.assert_close((row, col), (want_row, want_col), rtol=1e-6, atol=1e-6)
        back = (torch.rand(b), torch.rand(apart) if apart else None, *args, row, col, [True, True, True, offset], apart)
        for got, want in zip(backend.backward(*back), tiled.backward(*back), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("way", ["rows", "cols", "none"])
def test_no_gradient_is_made_that_nobody_wants(need, way, tiles):
    tiles("whole", 1)
    args = (torch.randn(20, 8), torch.randn(20, 8), torch.tensor(2.0, dtype=torch.float64), None, torch.randn(20))
    row, col = tiled.forward(*args, True, True)
    drow, dcol = torch.rand(20) if way == "rows" else None, torch.rand(20) if way == "cols" else None
    grads = backend.backward(drow, dcol, *args, row, col, [bool(n) for n in need])
    want = tiled.backward(drow, dcol, *args, row, col, [bool(n) for n in need])
    for got, right in zip(grads, want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", TILES)
def test_logits_near_100_keep_their_digits(tile, tiles):
    """Of a scale that is, to base 2, half between two numbers of float32: the logsumexps are those of the scale as it is, which
    the positives have, and what they share out of a gradient adds up to all of it."""
    tiles(tile, 5)
    b, m = 37, 50
    scale = torch.tensor((140 + 2**-17) * math.log(2), dtype=torch.float64)
    x, y = (torch.cat([torch.ones(n, 1), 0.02 * torch.randn(n, 15)], 1) for n in (b, m))
    row, col = backend.forward(x, y, scale, None, None, True, True, m)
    logits = scale * x.double() @ y.double().T
    for got, want in ((row, logits.logsumexp(1)), (col, logits.logsumexp(0))):
        assert (got - want).mean().abs() < 2e-6
        assert (got - want).square().mean().sqrt() < 3e-6
    dx, *_ = backend.backward(torch.ones(b), None, x, y, scale, None, None, row, col, [True, False, False, False], m)
    _, dy, *_ = backend.backward(None, torch.ones(m), x, y, scale, None, None, row, col, [False, True, False, False], m)
    for shared in (dx, dy):
        assert (shared[:, 0] / scale - 1).square().mean().sqrt() < 1.5e-6


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_splitting_keeps_22_bits(scale):
    """Of vectors of any size, the smaller elements of one measured by its largest; zeros stay zeros, NaN and inf spoil their row only."""
    x = torch.randn(19, 40).T[3:33, ::2] * torch.logspace(0, -6, 30)[:, None] * scale  # strided
    x[4] = 0
    high, low, size = kernels.split(x)
    again = (high.float() + low.float()) * size[:, None]
    assert high.shape == (30, 16)
    assert ((again[:, :10] - x).abs() <= x.abs().amax(1, keepdim=True) * 2**-22).all()
    assert not again[:, 10:].any()
    assert not again[4].any()
    assert torch.equal(size.log2().round().exp2(), size), "a factor that is no power of two would round"
    x[5, 2], x[6, 1] = torch.nan, torch.inf
    high, _, size = kernels.split(x)
    assert (torch.isfinite(high).all(1) & torch.isfinite(size)).nonzero()[:, 0].tolist() == [i for i in range(30) if i not in (5, 6)]


@pytest.fixture
def coarse():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def test_products_in_tf32_where_torch_allows_them(tiles, coarse):
    tiles("chunks", 5)
    args = oracle.convert(make(40, 24, ids=9), torch.float32)
    want = oracle.run(op("torch"), args, 0)
    errors = [oracle.relative_error(a, b) for a, b in zip(oracle.run(op("triton"), args, 0), want, strict=True)]
    assert 1e-5 < max(errors) < 1e-3


@pytest.mark.parametrize("v", [24, 72, 200])
def test_the_tiles_of_the_table(v):
    oracle.check(op("triton"), reference.contrastive_loss, make(70, v, ids=40, log_q=True), torch.float32)


def test_it_is_never_the_automatic_choice_on_the_cpu():
    x, scale = torch.randn(4, 3), torch.tensor(2.0, dtype=torch.float64)
    assert backend.supports(x, x, scale, None, None, True, True) is None
    assert not backend.wins(x, x, scale, None, None, True, True)
    with pytest.raises(em3.BackendError, match=r"float32 and the embeddings come as torch\.float64; convert them"):
        op("triton")(content=x.double(), ids_embedding=x.double(), logit_scale=2.0)
    with pytest.raises(em3.BackendError, match="these have width 0"):
        op("triton")(content=x[:, :0], ids_embedding=x[:, :0], logit_scale=2.0)
