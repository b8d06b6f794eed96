"""What the Triton kernels of ``lora_linear`` compute; see properties.py, whose fixtures and ways these are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3.backends.torch import lora_linear as plain
from em3.backends.triton import lora_linear as backend
from em3.kernels import lora_linear as kernels
from em3.reference.lora_linear import lora_linear as reference
from tests import oracle
from tests.ops.test_lora_linear import calls, dropped, dropping, make, op


@pytest.fixture
def tiles(monkeypatch):
    """Call it with the number of programs that a launch aims at, and the adapters that are looked at in a step."""
    monkeypatch.setattr(kernels, "config", lambda kernel, dtype, r, even: kernels.Config(16, 16, 4, 1))

    def use(waves: int, groups: int = 2) -> None:
        monkeypatch.setattr(kernels, "waves", lambda device: waves)
        monkeypatch.setattr(kernels, "MAX_GROUPS", groups)

    return use


def test_matches_the_reference(tiles, seed):
    """Dropout, scalings and gradients of all kinds; several steps over the adapters; parts and their sums."""

    @settings(max_examples=6)
    @given(args=calls(), p=st.sampled_from([0.0, 0.3, 1.0]), waves=st.sampled_from([1, 64]), salt=st.integers(0, 2**31),
           dtype=st.sampled_from([torch.float32, *oracle.HALF]))  # fmt: skip
    def check(args, p, waves, salt, dtype):
        tiles(waves)
        if p:
            oracle.check(dropping("triton", p, salt), dropped(p, salt), args, dtype, salt)
        else:
            oracle.check(op("triton"), reference, args, dtype, salt)

    check()


@pytest.mark.parametrize(("shape", "route", "dtype"), [
    ((70, 20, 33, 5, None), "adapter", torch.float32), ((70, 20, 17, 20, 3), "adapter", torch.bfloat16),
    ((70, 33, 20, 3, 3), "offsets", torch.float16),
], ids=["one", "index", "segments"])  # fmt: skip
def test_several_parts_of_an_adapter(shape, route, dtype, tiles):
    """Tiles of columns, ranks above 16, sums of parts beside adapters that are whole or have no rows."""
    tiles(64)
    args = make(shape[:1], *shape[1:], route=route, per_adapter=True, frozen=("bias",))
    if route == "adapter" and shape[-1]:
        args["adapter"] = torch.where(torch.arange(70) % 9 == 0, -1, torch.where(torch.arange(70) % 11 == 0, 2, 0))
    oracle.check(op("triton"), reference, args, dtype)
    oracle.same_bits_twice(op("triton"), oracle.convert(args, dtype))


@pytest.mark.parametrize("adapter", [torch.tensor([2, -1, 0, 5, 2, 7, -9, 0, 2]), torch.full((4,), -1), torch.zeros(0, dtype=torch.int64)])
def test_rows_are_sorted_by_adapter(adapter):
    """One outside 0 .. G - 1 is none; rows of one adapter keep their order."""
    order, bounds = kernels.by_adapter(adapter, None, len(adapter), 6)
    assert bounds.dtype == torch.int32
    for g in range(6):
        assert order[bounds[g] : bounds[g + 1]].tolist() == (adapter == g).nonzero()[:, 0].tolist()
    assert (bounds[-1] - bounds[0]).item() == ((adapter >= 0) & (adapter < 6)).sum()


def test_offsets_that_nobody_looked_at():
    _, bounds = kernels.by_adapter(None, torch.tensor([-4, 9, 3, 10**12, 5]), 20, 4)
    assert bounds.tolist() == [0, 9, 9, 20, 20]


def test_there_are_never_more_parts_than_programs():
    for t, g, size in ((0, 3, 16), (15, 40, 16), (16, 2, 16), (100, 7, 16), (3, 5, 16)):
        for counts in (torch.randint(g, (t,)).bincount(minlength=g), torch.tensor([t] + [0] * (g - 1))):
            rows = kernels.Rows(None, counts)
            assert ((counts + size - 1) // size).sum() <= kernels._parts(rows, t, g, size, 0)
            assert ((counts + size - 1) // size).clamp(min=1).sum() <= kernels._parts(rows, t, g, size, 1)
            several = ((counts + size - 1) // size) * (counts > size)
            assert several.sum() <= -(-2 * t // size)


def test_a_float32_number_of_low_keeps_more_than_a_half_type_has(tiles):
    """Two ranks that nearly cancel: rounded to bf16 before the second product, their difference would be gone."""
    tiles(4)
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    a = torch.stack([torch.ones(16), torch.ones(16)]).bfloat16()
    a[1, 0] += 2**-7
    b = torch.tensor([[1.0, -1.0]]).expand(16, 2).bfloat16()
    y = em3.ops.lora_linear(x, torch.zeros(16, 16, dtype=torch.bfloat16), None, a, b, backend="triton")
    torch.testing.assert_close(y, torch.full_like(y, -(2**-7)))


@pytest.mark.parametrize(("dtype", "c", "r", "g"), [
    (torch.float32, 72, 8, None), (torch.bfloat16, 72, 40, 3), (torch.float32, 64, 20, 2), (torch.float16, 64, 128, 2),
], ids=str)  # fmt: skip
def test_the_tiles_of_the_table(dtype, c, r, g):
    args = make((70,), c, 48, r, g, frozen=("weight",))
    assert kernels.even(args["x"], 48) == (c == 64)
    oracle.check(op("triton"), reference, args, dtype)


def test_rows_that_lie_apart():
    """Strided rows of x, and a result that is not contiguous: PyTorch's product of an expanded x."""
    args = make((20,), 6, 5, 3, 2, dtype=torch.float32)
    apart = torch.randn(20, 3, 6)[:, 1].requires_grad_()
    for x in (apart, torch.randn(1, 6).expand(20, 6)):
        oracle.check(lambda x=x, **more: em3.ops.lora_linear(x, **more, backend="triton"), lambda x=x, **more: reference(x, **more),
                     {name: value for name, value in args.items() if name != "x"} | {"x": x}, torch.float32)  # fmt: skip


def test_one_adapter_in_float32_is_added_to_the_weight(monkeypatch):
    """As in the other backends; its gradients still come from the kernels where the weight is frozen."""
    monkeypatch.setattr(plain, "enough", lambda weight: 1)
    for frozen in (("weight",), ()):
        oracle.check(op("triton"), reference, make((40,), 7, 5, 3, None, frozen=frozen), torch.float32)


def test_it_is_never_the_automatic_choice_on_the_cpu():
    args = tuple(make(dtype=torch.float32)[name] for name in ("x", "weight", "bias", "lora_a", "lora_b"))
    assert backend.supports(*args, 1.0, None, None, None) is None
    assert not backend.wins(*args, 1.0, None, None, None)
    with pytest.raises(em3.BackendError, match=r"torch\.float64; convert them"):
        op("triton")(**make())
    with pytest.raises(em3.BackendError, match="at most 128, and the rank is 129"):
        op("triton")(**make(r=129, dtype=torch.float32))
    with pytest.raises(em3.BackendError, match=r"width 1 and more, and the weight is \[0, 5\]"):
        op("triton")(**make(d=0, dtype=torch.float32))
