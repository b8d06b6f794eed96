"""What the Triton kernels of ``contrastive_loss`` with ``kind="sigmoid"`` compute; see properties.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends.torch import contrastive_sigmoid as tiled
from em3.backends.triton import contrastive_sigmoid as backend
from tests import oracle
from tests.kernels import properties_contrastive_loss as infonce
from tests.ops.test_contrastive_loss import cases, make, op

TILES = infonce.TILES
tiles, coarse = infonce.tiles, infonce.coarse  # fixtures


def test_matches_the_reference(tiles, seed):
    @settings(max_examples=5)
    @given(case=cases((1, 2, 17, 21), "sigmoid"), tile=st.sampled_from(sorted(TILES)), waves=st.sampled_from([1, 5, 64]),
           bias=st.sampled_from([-10.0, 0.0, 3.0]), salt=st.integers(0, 2**31))  # fmt: skip
    def check(case, tile, waves, bias, salt):
        torch.manual_seed(seed ^ salt)
        tiles(tile, waves)
        oracle.check(op("triton"), reference.contrastive_loss, make(**case, bias=bias), torch.float32, salt)

    check()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_several_tiles_of_every_program(tile, duplicates, tiles):
    tiles(tile, 5)
    args = make(36, 40, k=9, ids=20, log_q=True, weight=True, kind="sigmoid", duplicates=duplicates)
    oracle.check(op("triton"), reference.contrastive_loss, args, torch.float32)


@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
def test_half_types(dtype, tiles):
    tiles("whole", 5)
    args = make(40, 32, k=3, ids=20, log_q=True, kind="sigmoid", duplicates="positive")
    oracle.check(op("triton"), reference.contrastive_loss, args, dtype)


def agree(args, positive, apart, drow, dcol, need):
    """Forward and backward with the torch backend."""
    with oracle.poisoned():
        sums = [of.forward(*args, True, True, positive, apart) for of in (backend, tiled)]
        grads = [of.backward(drow, dcol, *args, [bool(n) for n in need], positive, apart) for of in (backend, tiled)]
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("apart", [19, 0])
@pytest.mark.parametrize(("ids", "offset"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("positive", [False, True])
def test_a_shard_of_another_rank(apart, ids, offset, positive, tiles):
    """As in the ring: no row is its own column, ids and offsets of rows and of columns come one behind the other."""
    tiles("whole", 5)
    b, extra, v = 23, 3, 20
    x, y = torch.randn(b, v), torch.randn(apart + extra, v)
    scale, bias = (torch.tensor(n, dtype=torch.float64) for n in (0.7, -2.0))
    items = torch.randint(5, (b + apart,)) if ids else None
    args = (x, y, scale, bias, items, torch.randn(b + apart + extra) if offset else None)
    agree(args, positive, apart, torch.rand(b), torch.rand(apart) if apart else None, [1, 1, 1, 1, offset])


@pytest.mark.parametrize("need", [*torch.eye(5, dtype=torch.int).tolist(), [0] * 5], ids=str)
@pytest.mark.parametrize("way", ["rows", "cols", "none"])
def test_no_gradient_is_made_that_nobody_wants(need, way, tiles):
    tiles("whole", 1)
    scale, bias = (torch.tensor(n, dtype=torch.float64) for n in (2.0, -1.0))
    args = (torch.randn(20, 8), torch.randn(20, 8), scale, bias, None, torch.randn(20))
    drow, dcol = torch.rand(20) if way == "rows" else None, torch.rand(20) if way == "cols" else None
    agree(args, False, None, drow, dcol, need)


@pytest.mark.parametrize("tile", TILES)
def test_what_is_small_keeps_its_digits(tile, tiles):
    """A pair alone: losses from 1e-37 to 100, each right to what rounds its logit and some 1e-7 of itself, and so the slopes."""
    tiles(tile, 5)
    for logit in (-85.0, -40.0, -15.0, -3.0, -0.1, 0.0, 0.4, 2.0, 20.0, 100.0):
        x, scale, bias = torch.ones(1, 1), torch.tensor(logit / 2).double(), torch.tensor(logit / 2).double()
        args = (x, x, scale, bias, None, None)
        row, col = backend.forward(*args, True, True, False, 1)
        want, limit = math.log1p(math.exp(logit)), 5e-7 + 2**-23 * abs(logit)
        assert abs(float(row) - want) < limit * want
        assert abs(float(col) - want) < limit * want
        slope = backend.backward(torch.ones(1), None, *args, [False, False, False, True, False], False, 1)[3]
        want = 1 / (1 + math.exp(-logit))
        assert abs(float(slope) - want) < limit * want


@pytest.mark.parametrize("tile", TILES)
def test_where_scale_and_bias_cancel_nothing_is_lost_before(tile, tiles):
    """Of logits of 97 and a bias of -97, neither of which float32 has to base 2, their difference is left, not 5e-6 more."""
    tiles(tile, 5)
    x = torch.ones(20, 1)
    scale = torch.tensor((140 + 2**-17) * math.log(2), dtype=torch.float64)
    row, _ = backend.forward(x, x, scale, torch.tensor(-97.0).double(), None, None, True, True, False, 20)
    want = 20 * math.log1p(math.exp(float(scale) - 97))
    assert ((row - want).abs() < 1e-6 * want).all()


def test_products_in_tf32_where_torch_allows_them(tiles, coarse):
    tiles("chunks", 5)
    args = oracle.convert(make(40, 24, ids=9, kind="sigmoid"), torch.float32)
    want = oracle.run(op("torch"), args, 0)
    errors = [oracle.relative_error(a, b) for a, b in zip(oracle.run(op("triton"), args, 0), want, strict=True)]
    assert 1e-5 < max(errors) < 1e-3


@pytest.mark.parametrize(("v", "duplicates"), [(24, "positive"), (72, "mask"), (72, "positive"), (200, "positive")])
def test_the_tiles_of_the_table(v, duplicates):
    args = make(70, v, ids=40, log_q=True, kind="sigmoid", duplicates=duplicates)
    oracle.check(op("triton"), reference.contrastive_loss, args, torch.float32)


def test_the_same_bits_twice(tiles):
    tiles("whole", 5)
    args = oracle.convert(make(30, 12, ids=9, log_q=True, kind="sigmoid", duplicates="positive"), torch.float32)
    oracle.same_bits_twice(op("triton"), args)


def test_it_is_never_the_automatic_choice_on_the_cpu():
    x, number = torch.randn(4, 3), torch.tensor(2.0, dtype=torch.float64)
    assert backend.supports(x, x, number, None, None, True, True) is None
    assert not backend.wins(x, x, number, None, None, True, True)
    given = dict(logit_scale=2.0, logit_bias=-1.0, kind="sigmoid")
    with pytest.raises(em3.BackendError, match=r"float32 and the embeddings come as torch\.float64; convert them"):
        op("triton")(content=x.double(), ids_embedding=x.double(), **given)
    with pytest.raises(em3.BackendError, match="these have width 0"):
        op("triton")(content=x[:, :0], ids_embedding=x[:, :0], **given)
