"""What the Triton kernels compute, under Triton's interpreter: collected by tests/kernels/test_interpreted.py only.

By hand: ``TRITON_INTERPRET=1 pytest -p tests.kernels.interpreter tests/kernels/properties.py``. Small tiles, so that small
inputs have several groups of rows, tiles of tokens, slices of columns, and parts of items.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3.backends.triton import qformer_attention as backend
from em3.kernels import qformer_attention as kernels
from tests import oracle
from tests.ops.test_dropout import dropped
from tests.ops.test_dropout import op as dropping
from tests.ops.test_qformer_attention import make, op, plain, shapes

TILES = {
    "whole": kernels.Config(16, 16, 64, 64, 4, 1),
    "chunks": kernels.Config(32, 16, 64, 16, 4, 1),
    "slices": kernels.Config(16, 32, 32, 16, 4, 1),
}


@pytest.fixture
def tiles(monkeypatch):
    """Call it with a tile's name and the number of programs that a launch aims at."""

    def use(name: str, waves: int) -> None:
        monkeypatch.setattr(kernels, "config", lambda kernel, stream, u, dropped=False: TILES[name])
        monkeypatch.setattr(kernels, "waves", lambda device: waves)

    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(dtype, tiles, seed):
    @settings(max_examples=10 if dtype == torch.float32 else 2)
    @given(shape=shapes(tiny=dtype == torch.float32), tile=st.sampled_from(sorted(TILES)), waves=st.sampled_from([1, 5, 64]),
           salt=st.integers(0, 2**31))  # fmt: skip
    def check(shape, tile, waves, salt):
        torch.manual_seed(seed ^ salt)
        tiles(tile, waves)
        oracle.check(op("absorb", "triton"), plain, make(**shape), dtype, salt)

    check()


@pytest.mark.parametrize(("tile", "dtype", "per_item"), [("whole", torch.float32, False), ("chunks", torch.bfloat16, True)], ids=str)
def test_long_items_are_cut_into_parts(per_item, tile, dtype, tiles):
    tiles(tile, 64)
    args = make(2, 4, 2, 8, [16, 40], [[260, 0], 130], masked=True, per_item=per_item)
    streams = (kernels.Stream(*given) for given in zip(args["values"], args["offsets"], args["masks"], strict=True))
    assert [kernels._parts(stream, 2, 1, TILES[tile], torch.device("cpu")) for stream in streams] == [2, 2]
    oracle.check(op("absorb", "triton"), plain, args, dtype)
    oracle.same_bits_twice(op("absorb", "triton"), oracle.convert(args, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_what_every_backend_drops(dtype, tiles, seed):
    @settings(max_examples=8 if dtype == torch.float32 else 2)
    @given(shape=shapes(tiny=dtype == torch.float32), tile=st.sampled_from(sorted(TILES)), waves=st.sampled_from([1, 64]),
           p=st.sampled_from([0.1, 0.5, 1.0]), salt=st.integers(0, 2**31))  # fmt: skip
    def check(shape, tile, waves, p, salt):
        torch.manual_seed(seed ^ salt)
        tiles(tile, waves)
        oracle.check(dropping("triton", p, salt), dropped(p, salt), make(**shape), dtype, salt)

    check()


def test_dropout_of_items_that_are_cut_into_parts(tiles):
    tiles("whole", 64)
    args = make(2, 4, 2, 8, [16, 40], [[260, 0], 130], masked=True)
    oracle.check(dropping("triton", 0.3, 1), dropped(0.3, 1), args, torch.float32)


def test_four_streams():
    args = make(2, 4, 2, 8, [16, 8, 33, 24], [[5, 0], 7, [0, 3], 20], masked=True)
    oracle.check(op("absorb", "triton"), plain, args, torch.float32)


@pytest.mark.parametrize(("width", "dtype", "masked"), [
    (40, torch.float32, False), (264, torch.float32, True), (72, torch.bfloat16, True), (504, torch.bfloat16, False),
    (504, torch.bfloat16, True), (1032, torch.bfloat16, False),
], ids=str)  # fmt: skip
def test_the_tiles_of_the_table(width, dtype, masked):
    args = make(1, 3, 1, 16, [width], [20 if masked else [20]], masked=masked)
    oracle.check(op("absorb", "triton"), plain, args, dtype)


@pytest.mark.parametrize("values", [torch.randn(9, 3, 16)[:, 1], torch.randn(9, 48)[:, 5:21], torch.randn(16, 9).t()])
def test_tokens_are_read_where_they_lie(values):
    args = oracle.convert(make(2, 3, 2, 8, [16], [[4, 5]]), torch.float32)
    want = oracle.run(op("absorb", "triton"), args | {"values": [values.contiguous().requires_grad_()]}, 0)
    got = oracle.run(op("absorb", "triton"), args | {"values": [values.requires_grad_()]}, 0)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wild", [[0, 9, 5, 10**9], [0, 4, 4, 2**40], [-5, 3, 7, 12], [3, 2, 1, 0], [10**12, 10**12, 0, 4]])
def test_no_offset_leads_outside_the_tokens(wild):
    """On a GPU nobody looks at the offsets; what lies about the tokens here is NaN."""
    around = torch.full((40, 16), torch.nan)
    values = around[14:26].copy_(torch.randn(12, 16))
    u, w = [torch.randn(2, 1, 3, 16)], [torch.randn(2, 4, 16)]
    args = (u, None, w, [values], [torch.tensor(wild)], [None], 3)
    y, o, mass, lse = backend.forward(*args)
    assert torch.isfinite(o).all()
    before = around.clone()
    du, _, _, dx = backend.backward(torch.randn_like(o), None, *args[:6], y, o, mass, lse, True, [False], [True])
    assert torch.isfinite(du[0]).all()
    assert dx[0].shape == values.shape
    assert torch.equal(around.nan_to_num(7), before.nan_to_num(7))


def test_it_is_never_the_automatic_choice_on_the_cpu():
    args = oracle.convert(make(2, 3, 2, 8, [16], [[4, 5]]), torch.bfloat16)
    tensors = ([torch.randn(2, 1, 3, 8)], None, [torch.randn(2, 4, 8)], [torch.randn(2, 3, 8)], [None], [None], 2)
    assert backend.supports(*tensors) is None
    assert not backend.wins(*tensors)
    with pytest.raises(em3.BackendError, match=r"torch\.float64; convert them"):
        op("absorb", "triton")(**oracle.convert(args, torch.float64))
