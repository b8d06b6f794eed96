"""What the Triton kernels compute of ``lora_target_attention``; see properties.py, whose tiles these are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3.backends.torch import lora_target_attention as plain_backend
from em3.backends.triton import lora_target_attention as backend
from em3.kernels import qformer_attention as kernels
from em3.ops._pooling import SOFTMAX, Pooling
from tests import oracle
from tests.kernels.properties import TILES, tiles  # noqa: F401, a fixture
from tests.ops.test_lora_target_attention import make, op, plain, shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_reference(dtype, tiles, seed):  # noqa: F811
    @settings(max_examples=6 if dtype == torch.float32 else 2)
    @given(shape=shapes(tiny=dtype == torch.float32), tile=st.sampled_from(sorted(TILES)), waves=st.sampled_from([1, 64]),
           salt=st.integers(0, 2**31))  # fmt: skip
    def check(shape, tile, waves, salt):
        torch.manual_seed(seed ^ salt)
        tiles(tile, waves)
        oracle.check(op("absorb", "triton"), plain, make(**shape), dtype, salt)

    check()


@pytest.mark.parametrize("lengths", [[260, 0], 130], ids=["jagged", "padded"])
def test_long_histories_are_cut_into_parts(lengths, tiles):  # noqa: F811
    """Many places of one row, too: what each adds to the bank's gradient is summed in one order."""
    tiles("whole", 64)
    args = make(2, 2, 16, 40, 7, lengths, holes=True, biases=1)
    oracle.check(op("absorb", "triton"), plain, args, torch.float32)
    oracle.same_bits_twice(op("absorb", "triton"), oracle.convert(args, torch.float32))


@pytest.mark.parametrize(("width", "dtype", "bank"), [
    (40, torch.float32, torch.float32), (264, torch.float32, torch.bfloat16), (72, torch.bfloat16, torch.bfloat16),
    (136, torch.bfloat16, torch.float32), (520, torch.bfloat16, torch.bfloat16), (20, torch.float16, torch.float32),
], ids=str)  # fmt: skip
def test_the_tiles_of_the_table(width, dtype, bank):
    u, w, x = (torch.randn(2, 2, 1, width) * width**-0.5).to(dtype), torch.randn(2, 3, width).to(dtype), torch.randn(9, width).to(bank)
    args = (u, w, torch.randint(-1, 9, (2, 21)), None, x, torch.randn(2, 21, 2), SOFTMAX)
    found, right = ([t.float() for t in way.forward(*args)] for way in (backend, plain_backend))
    dout = torch.randn(2, 2, 1, 3).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert max(oracle.relative_error(got, want) for got, want in zip(found, right, strict=True)) < limit
    y, o, lse = plain_backend.forward(*args)
    for got, want in zip(*(way.backward(dout, *args, y, o, lse, *[True] * 4) for way in (backend, plain_backend)), strict=True):
        assert got.dtype == want.dtype
        assert oracle.relative_error(got, want) < (1e-2 if got.dtype == torch.bfloat16 and limit < 1e-2 else limit)


@pytest.mark.parametrize(("heads", "m", "lengths"), [(3, 1, 20), (3, 3, [33, 0]), (2, 17, [9, 0]), (18, 2, 7)])
def test_every_way_to_lay_heads_into_a_tile(heads, m, lengths, tiles):  # noqa: F811
    """Heads side by side in one tile of 16 rows, in several, and heads of more rows than a tile. Also where only tables learn."""
    tiles("slices", 4)
    args = make(2, heads, 4, 40, 9, lengths, m=m, rank=None, holes=True, biases=2)
    oracle.check(op("absorb", "triton"), plain, args, torch.float32)
    frozen = args | {name: args[name].detach() for name in ("target", "bank", "w_q", "w_k", "w_v", "w_o")}
    assert oracle.leaves(frozen) == [table for table, _ in args["biases"]]
    oracle.check(op("absorb", "triton"), plain, frozen, torch.float32)


@pytest.mark.parametrize("wild", [[0, 9, 5, 10**9], [-5, 3, 7, 12], [10**12, 10**12, 0, 4]])
def test_nothing_leads_outside_the_bank(wild):
    """On a GPU nobody looks at offsets and row numbers; what lies about the bank here is NaN."""
    around = torch.full((40, 16), torch.nan)
    bank = around[14:26].copy_(torch.randn(12, 16))
    rows = torch.tensor([3, -1, 12, 10**12, -(10**12), 2, 11, 0, 5, 2**31 + 3])
    u, w = torch.randn(2, 3, 1, 16), torch.randn(2, 4, 16)
    bias = torch.full((24, 2), torch.nan)[7:17].copy_(torch.randn(10, 2))
    args = (u, w, rows, torch.tensor(wild), bank, bias, SOFTMAX)
    y, o, lse = backend.forward(*args)
    assert torch.isfinite(o).all()
    du, _, dbank, dbias = backend.backward(torch.randn_like(o), *args, y, o, lse, True, False, True, True)
    assert torch.isfinite(du).all()
    assert torch.isfinite(dbank).all()
    assert torch.isfinite(dbias).all()
    assert (dbank.shape, dbias.shape) == (bank.shape, bias.shape)


def test_it_is_never_the_automatic_choice_on_the_cpu():
    args = (torch.randn(2, 2, 1, 8), torch.randn(2, 4, 8), torch.tensor([[0, 1], [2, -1]]), None, torch.randn(3, 8))
    for bias in (None, torch.randn(2, 2, 2)):
        assert backend.supports(*args, bias, SOFTMAX) is None
        assert not backend.wins(*args, bias, SOFTMAX)
    why = backend.supports(*args, None, Pooling("din"))
    assert why == "it pools by softmax only and pooling was 'din'; use another backend"
    with pytest.raises(em3.BackendError, match=r"torch\.float64; convert them"):
        op("absorb", "triton")(**make(2, 2, 2, 4, 5, 3))


def test_few_rows_of_float32_have_no_use_for_tiles_of_sixteen():
    stream = kernels.Stream(torch.randn(5, 64), None, None, torch.zeros(2, 3, dtype=torch.int64))
    rows = [kernels.fitted(kernels.Config(16, 16, 64, 32, 4, 2), stream, torch.randn(h, 2, m, 64)).rows for h, m in ((1, 1), (2, 3), (4, 4))]
    assert rows == [4, 8, 16]
