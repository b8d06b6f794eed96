"""``lora_target_attention``: every backend and strategy against the plain formulation in float64."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.ops import _checks, _dispatch, _projected
from em3.ops._pooling import SOFTMAX
from em3.ops.lora_target_attention import cheaper
from tests import oracle

WAYS = [
    *(pytest.param("absorb", *p.values, marks=p.marks) for p in oracle.backends("lora_target_attention")),
    ("project", "torch"),
]


def as_history(ids: torch.Tensor, offsets: torch.Tensor | None) -> Any:
    return ids if offsets is None else em3.Jagged(ids, offsets)


def op(strategy: str, backend: str) -> Any:
    def call(ids, offsets, **kwargs):
        return em3.ops.lora_target_attention(
            history=as_history(ids, offsets), strategy=strategy, backend=backend, **kwargs
        )

    return call


def plain(ids, offsets, **kwargs):
    return reference.lora_target_attention(history=as_history(ids, offsets), **kwargs)


def make(batch: int, heads: int, e: int, c: int, rows: int, lengths: list[int] | int, *, m: int | None = None,
         rank: int | None = 2, holes: bool = False, bank_grad: bool = True, biases: int = 0) -> dict[str, Any]:  # fmt: skip
    """Random arguments. ``lengths`` is N of a padded history, or the users' lengths of a jagged one; so many ``biases``."""
    d = heads * e

    def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()

    shape = (batch, lengths) if isinstance(lengths, int) else (sum(lengths),)
    ids = torch.randint(-1 if holes or rows == 0 else 0, max(rows, 0), shape)
    offsets = None if isinstance(lengths, int) else torch.tensor([0, *lengths]).cumsum(0)
    args = dict(
        target=rand(*((batch, d) if m is None else (batch, m, d))), ids=ids, offsets=offsets,
        bank=rand(rows, c).detach().requires_grad_(bank_grad), num_heads=heads,
        w_q=rand(d, d, scale=d**-0.5), w_k=rand(d, c, scale=c**-0.5), w_v=rand(d, c, scale=c**-0.5),
        w_o=rand(d, d, scale=d**-0.5),
    )  # fmt: skip
    if biases:
        args["biases"] = [(rand(heads, 3 + i), torch.randint(-1, 3 + i, shape)) for i in range(biases)]
    if rank is not None:
        args |= {name: (rand(rank, c, scale=c**-0.5), rand(d, rank, scale=0.5), 0.7) for name in ("lora_k", "lora_v")}
    return args


@st.composite
def shapes(draw: st.DrawFn, tiny: bool = True) -> dict[str, Any]:
    """Any shape; without ``tiny`` only those large enough for a rounding error to be typical of its type."""
    batch = draw(st.integers(0 if tiny else 3, 5))
    one = st.sampled_from([0, 1, 2, 17, 40] if tiny else [17, 40])
    lengths = draw(st.one_of(one, st.lists(one, min_size=batch, max_size=batch)))
    return dict(
        batch=batch, lengths=lengths, heads=draw(st.sampled_from([1, 2, 3] if tiny else [2, 4])),
        e=draw(st.sampled_from([1, 4, 7] if tiny else [16])), c=draw(st.sampled_from([1, 3, 16, 33] if tiny else [16, 33])),
        rows=draw(st.sampled_from([2, 5, 100] if tiny else [20, 100])), m=draw(st.sampled_from([None, 0, 1, 4] if tiny else [None, 1, 4])),
        rank=draw(st.sampled_from([None, 1, 3])), holes=draw(st.booleans()), bank_grad=draw(st.booleans()),
        biases=draw(st.sampled_from([0, 1, 2])),
    )  # fmt: skip


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(strategy, backend, dtype, seed):
    oracle.skip_unless_served(backend, dtype)

    @settings(max_examples=50 if dtype == torch.float32 else 20)
    @given(shape=shapes(tiny=dtype not in oracle.HALF), salt=st.integers(0, 2**31))
    def check(shape, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(op(strategy, backend), plain, make(**shape), dtype, salt)

    check()


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_a_real_size(strategy, backend):
    args = make(6, 4, 32, 128, 3000, [200, 0, 1000, 3, 57, 1], rank=8, m=3, biases=1)
    oracle.check(op(strategy, backend), plain, args, torch.float32)


@pytest.mark.parametrize("strategy", ["absorb", "project"])
@pytest.mark.parametrize("lengths", [4, [2, 0, 5]], ids=["padded", "jagged"])
@pytest.mark.parametrize("m", [None, 3])
def test_gradcheck(strategy, lengths, m):
    oracle.gradcheck(op(strategy, "torch"), make(3, 2, 2, 3, 4, lengths, m=m, holes=True, biases=1))


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("kind", ["no items", "all missing", "jagged", "empty bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_users_without_history(strategy, backend, kind, dtype):
    oracle.skip_unless_served(backend, dtype)
    lengths = {"no items": 0, "all missing": 5, "jagged": [0, 0, 0], "empty bank": 5}[kind]
    args = oracle.convert(make(3, 2, 4, 8, 0 if kind == "empty bank" else 7, lengths, biases=1), dtype)
    if kind == "all missing":
        args["ids"] = torch.full((3, 5), -1)
    with oracle.poisoned():
        out, *grads = oracle.run(op(strategy, backend), args, 0)
    assert not out.any()
    assert not any(g.any() for g in grads), "a gradient came out of an empty history"


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_jagged_equals_padded(strategy, backend):
    jagged = oracle.convert(make(4, 2, 8, 16, 30, [5, 0, 9, 1], biases=1), torch.float32)
    ids, mask = reference.padding.padded(jagged["ids"], jagged["offsets"])
    [(table, buckets)] = jagged["biases"]
    padded = jagged | dict(ids=ids.masked_fill(~mask, -1), offsets=None,
                           biases=[(table, reference.padding.padded(buckets, jagged["offsets"])[0])])  # fmt: skip
    for a, b in zip(oracle.run(op(strategy, backend), jagged, 0), oracle.run(op(strategy, backend), padded, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("behind", [0, 2])
def test_users_of_one_length_are_not_padded(holes, behind, monkeypatch):
    """Unless something lies behind the last offset, or a graph is traced that must serve other lengths too."""
    common, found = _projected._common_length, []
    monkeypatch.setattr(_projected, "_common_length", lambda *args: found.append(common(*args)) or found[-1])
    args = make(3, 2, 4, 6, 9, [5, 5, 5], m=2, holes=holes, biases=1)
    if behind:
        args["ids"] = torch.cat([args["ids"], torch.tensor([1, 8])])
        [(table, buckets)] = args["biases"]
        args["biases"] = [(table, torch.cat([buckets, torch.tensor([0, 1])]))]
    oracle.check(op("project", "torch"), plain, args, torch.float32)
    assert found == [None if behind else 5]
    compiled = torch.compile(op("project", "torch"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), op("project", "torch")(**args))
    assert found[1] is None


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_strides_do_not_matter(strategy, backend):
    args = oracle.convert(make(3, 2, 4, 12, 20, 6), torch.float32)
    want = oracle.run(op(strategy, backend), args, 0)
    wide = torch.randn(40, 17)
    wide[::2, 3:15] = args["bank"].detach()
    strided = args | dict(bank=wide[::2, 3:15].requires_grad_(), ids=args["ids"].t().contiguous().t(),
                          target=args["target"].detach().t().contiguous().t().requires_grad_(),
                          w_k=args["w_k"].detach().t().contiguous().t().requires_grad_())  # fmt: skip
    for a, b in zip(want, oracle.run(op(strategy, backend), strided, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_a_bank_of_another_dtype(strategy, backend):
    """A bf16 bank under float32 weights: its rows are read exactly, so only its own rounding is in the result."""
    args = oracle.convert(make(3, 2, 8, 16, 50, [9, 4, 30]), torch.float32)
    args["bank"] = args["bank"].detach().bfloat16().requires_grad_()
    exact = args | dict(bank=args["bank"].detach().float().requires_grad_())
    got, want = (oracle.run(op(strategy, backend), a, 0) for a in (args, exact))
    assert got[0].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(a, b) < (1e-5 if a.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_same_bits_twice(strategy, backend):
    args = oracle.convert(make(5, 2, 16, 40, 30, [3, 70, 0, 1, 200], biases=1), torch.float32)
    oracle.same_bits_twice(op(strategy, backend), args)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("lengths", [6, [4, 0, 6]], ids=["padded", "jagged"])
@pytest.mark.parametrize("m", [None, 2])
def test_torch_compile_fullgraph(strategy, backend, lengths, m):
    args = oracle.convert(make(3, 2, 4, 8, 20, lengths, m=m, biases=1), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op(strategy, backend), fullgraph=True, backend="aot_eager")
    for a, b in zip(oracle.run(op(strategy, backend), args, 0), oracle.run(compiled, args, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["absorb", "project"])
def test_autocast(strategy, dtype):
    args = oracle.convert(make(2, 2, 4, 8, 20, [3, 5], biases=1), torch.float32)
    call = op(strategy, "auto")
    with torch.autocast("cpu", dtype=dtype):
        out = call(**args)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(**args)
    assert out.dtype == compiled.dtype == dtype
    torch.testing.assert_close(compiled, out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(out, plain(**args).to(dtype), rtol=5e-2, atol=5e-2)
    grads = torch.autograd.grad(out.float().sum(), oracle.leaves(args))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", oracle.backends("lora_target_attention"))
@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 3, 7])], ids=["padded", "jagged"])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(backend, offsets, biased):
    u = torch.randn(2, 2, 3, 8, requires_grad=True)
    bank = torch.randn(9, 8, requires_grad=True)
    history = torch.randint(-1, 9, (2, 5) if offsets is None else (7,))
    w = torch.randn(2, 5, 8, requires_grad=True)
    bias = torch.randn(*history.shape, 2, requires_grad=True) if biased else None
    args = (u, w, history, offsets, bank, bias, "softmax", 0)
    torch.library.opcheck(torch.ops.em3.lora_target_attention, (*args, backend))
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    y, o, lse = torch.ops.em3.lora_target_attention(*args, backend)
    back = (torch.randn_like(o), *args, y, o, lse, True, True, True, biased, backend)
    torch.library.opcheck(torch.ops.em3.lora_target_attention_backward, back)
    torch.library.opcheck(torch.ops.em3.bank_rows, (history, 9))
    torch.library.opcheck(torch.ops.em3.bias_rows, (history, 9, "buckets"))


@pytest.mark.parametrize("backend", oracle.backends("lora_target_attention"))
def test_a_row_number_outside_the_bank_is_never_read(backend):
    """What a GPU does without debug_checks, shown on the CPU with the check taken away: missing, not a wild read."""
    backend = _dispatch.module("lora_target_attention", backend)
    u, w, bank = torch.randn(2, 1, 1, 4), torch.randn(2, 3, 4), torch.randn(5, 4)
    wild = torch.tensor([[1, 10**12, -(10**12), 4]])
    tame = torch.tensor([[1, -1, -1, 4]])
    for offsets, shape in ((None, (1, 4)), (torch.tensor([0, 4]), (4,))):
        got = backend.forward(u, w, wild.view(shape), offsets, bank, None, SOFTMAX)
        want = backend.forward(u, w, tame.view(shape), offsets, bank, None, SOFTMAX)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("jagged", [False, True])
@pytest.mark.parametrize("rows", [9, 500], ids=["whole bank projected", "rows projected"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bank_row_reaches_nobody_who_does_not_name_it(strategy, backend, jagged, rows, poison):
    clean = oracle.convert(make(4, 2, 4, 6, rows, [5, 0, 7, 2] if jagged else 6, holes=True), torch.float32)
    clean["ids"].clamp_(max=rows - 2)
    clean["ids"][clean["ids"] == 0] = 1
    clean["ids"].view(-1)[-2] = -1
    spoiled = oracle.convert(clean, torch.float32)
    with torch.no_grad():  # rows that nobody names, among them the one that stands where there is none
        spoiled["bank"][0], spoiled["bank"][rows - 1] = poison, poison
    for a, b in zip(oracle.run(op(strategy, backend), spoiled, 0), oracle.run(op(strategy, backend), clean, 0), strict=True):
        torch.testing.assert_close(a, b)
    clean["ids"].view(-1)[0] = spoiled["ids"].view(-1)[0] = 0  # now user 0 names it
    got, want = (op(strategy, backend)(**a) for a in (spoiled, clean))
    assert not torch.isfinite(got[0]).all()
    torch.testing.assert_close(got[1:], want[1:])
    a, b = (torch.autograd.grad(y[1:].sum(), x["target"])[0] for y, x in ((got, spoiled), (want, clean)))
    torch.testing.assert_close(a[1:], b[1:])


@pytest.mark.parametrize("backend", oracle.backends("lora_target_attention"))
def test_indices_that_change_before_the_backward_are_refused(backend):
    args = oracle.convert(make(3, 2, 4, 6, 9, [4, 1, 6]), torch.float32)
    for name, wrong, message in (("ids", 10**9, r"history: held 1000000000"), ("offsets", 12, r"history.offsets: ended at 12")):
        changed = args | {name: args[name].clone()}
        out = op("absorb", backend)(**changed)
        changed[name].numpy()[-1] = wrong
        with pytest.raises(ValueError, match=message):
            out.sum().backward()


@pytest.mark.parametrize("backend", oracle.backends("lora_target_attention"))
def test_second_order_gradients_are_an_error(backend):
    args = oracle.convert(make(2, 2, 4, 6, 9, 5), torch.float32)
    first = torch.autograd.grad(op("absorb", backend)(**args).square().sum(), oracle.leaves(args), create_graph=True)
    with pytest.raises(RuntimeError, match="lora_target_attention has no second-order gradients"):
        torch.autograd.grad(first[0].sum(), args["bank"])


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_training_after_an_evaluation_in_inference_mode(strategy, backend):
    args = oracle.convert(make(4, 2, 4, 6, 9, [5, 0, 7, 2]), torch.float32)

    def work():  # in a thread of its own, which keeps no memory yet
        with torch.inference_mode():
            want = op(strategy, backend)(**args)
        return want, oracle.run(op(strategy, backend), args, 0)[0]

    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(*pool.submit(work).result())


@pytest.mark.parametrize("strategy", ["absorb", "project"])
def test_shapes_without_data(strategy):
    args = oracle.moved(oracle.convert(make(3, 2, 4, 6, 9, 5, m=2), torch.float32), "meta")
    out, *grads = oracle.run(op(strategy, "auto"), args, 0)
    assert out.is_meta
    assert out.shape == (3, 2, 8)
    assert [g.shape for g in grads] == [t.shape for t in oracle.leaves(args)]
    jagged = oracle.moved(oracle.convert(make(3, 2, 4, 6, 9, [5, 0, 1]), torch.float32), "meta")
    assert op("absorb", "auto")(**jagged).shape == (3, 8)
    with pytest.raises(ValueError, match=r"history.offsets: was on meta, .*use strategy='absorb'"):
        op("project", "auto")(**jagged)


def test_wild_offsets_that_nobody_looked_at(monkeypatch):
    monkeypatch.setattr(_checks, "looks", lambda tensor: False)
    for strategy in ("absorb", "project"):
        args = oracle.convert(make(3, 2, 4, 6, 9, [5, 1, 4]), torch.float32)
        tame = op(strategy, "torch")(**args | {"offsets": torch.tensor([0, 5, 10, 10])})
        wild = op(strategy, "torch")(**args | {"offsets": torch.tensor([-(10**15), 5, 10**15, 10**12])})
        torch.testing.assert_close(wild, tame)


@pytest.mark.parametrize("name", ["history", "history.offsets", "bank", "w_q", "w_k", "w_v", "w_o", "lora_k[0] (A)",
                                  "lora_k[1] (B)", "lora_v[0] (A)", "lora_v[1] (B)"])  # fmt: skip
def test_arguments_on_another_device(name):
    """Every tensor but the first, one after the other."""
    args = oracle.convert(make(2, 2, 4, 6, 9, [3, 4]), torch.float32)
    if name.startswith("lora"):
        lora, entry = list(args[name[:6]]), int(name[7])
        lora[entry] = lora[entry].to("meta")
        args[name[:6]] = tuple(lora)
    else:
        place = {"history": "ids", "history.offsets": "offsets"}.get(name, name)
        args[place] = args[place].to("meta")
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: was on meta, must be on cpu like target")):
        op("auto", "auto")(**args)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("jagged", [False, True])
def test_a_bias_of_no_item_reaches_nothing(strategy, backend, jagged):
    """What lies in the table for a place where there is no item, were it NaN; and -1 is no bias."""
    args = oracle.convert(make(3, 2, 4, 6, 9, [5, 0, 7] if jagged else 6, biases=1), torch.float32)
    [(table, buckets)] = args["biases"]
    args["ids"].view(-1)[[1, 3]] = -1
    buckets.view(-1)[[1, 3]] = 2
    buckets.masked_fill_((buckets == 2) & (args["ids"] >= 0), 0)
    want = oracle.run(op(strategy, backend), args | {"biases": [(table, buckets.masked_fill(buckets == 2, -1))]}, 0)
    with torch.no_grad():
        table[:, 2] = torch.nan
    got = oracle.run(op(strategy, backend), args, 0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_cost_model_takes_the_cheaper_form():
    bank = torch.empty(100_000, 256, device="meta")
    assert cheaper(64 * 200, 64, bank, 1, 4, 256) == "absorb"
    assert cheaper(1 * 200, 1, bank, 500, 4, 256) == "project"
    assert cheaper(4 * 100, 4, torch.empty(20_000, 1024, device="meta"), 1, 4, 32) == "absorb"


def messages() -> dict[str, tuple[dict[str, Any], str]]:
    f = torch.randn
    ids = torch.tensor([[0, 4], [2, -1]])
    return {
        "target batch": (dict(target=f(3, 4)), r"target: was \[3, 4\], must be \[2, D\] or \[2, M, D\] like history"),
        "target rank": (dict(target=f(2)), r"target: was \[2\], must be"),
        "history dtype": (dict(history=ids.float()), r"history: was torch.float32, must be torch.int64 or torch.int32"),
        "history rank": (dict(history=ids[None]), r"history: was \[1, 2, 2\], must be padded \[B, N\]"),
        "foreign history": (dict(history=[1, 2]), r"history: was list, must be a padded tensor, or jagged"),
        "row too large": (dict(history=ids + 1), r"history: held 5, must be from -1 \(-1 = none\) to 4, the last row of the bank"),
        "row too small": (dict(history=ids - 1), r"history: held -2, must be from -1"),
        "jagged row": (dict(history=em3.Jagged(torch.tensor([1, 9]), torch.tensor([0, 1, 2]))), r"history: held 9, must be"),
        "falling": (dict(history=em3.Jagged(torch.tensor([1, 2]), torch.tensor([0, 2, 1]))), r"history.offsets: fell from 2 to 1"),
        "running past": (dict(history=em3.Jagged(torch.tensor([1, 2]), torch.tensor([0, 2, 3]))), r"history.offsets: ended at 3, must not run past the 2 rows"),
        "first offset": (dict(history=em3.Jagged(torch.tensor([1, 2]), torch.tensor([1, 1, 2]))), r"history.offsets: began with 1, must begin with 0"),
        "bank rank": (dict(bank=f(5)), r"bank: was \[5\], must be \[n, C\]"),
        "bank dtype": (dict(bank=torch.ones(5, 6, dtype=torch.int8)), r"bank: was torch.int8, must be torch.float32, "),
        "heads": (dict(num_heads=3), r"num_heads: was 3, must be at least 1 and divide the width 4 of target"),
        "w_q": (dict(w_q=f(4, 5)), r"w_q: was \[4, 5\], must be \[4, 4\]"),
        "w_k": (dict(w_k=f(4, 5)), r"w_k: was \[4, 5\], must be \[4, 6\]"),
        "lora rank": (dict(lora_k=(f(0, 6), f(4, 0), 1.0)), r"lora_k\[0\] \(A\): was \[0, 6\], must be of a rank R of at least 1"),
        "lora form": (dict(lora_k=f(2, 6)), r"lora_k: was Tensor, must be \(A \[R, C\], B \[D, R\], scaling\) or None"),
        "lora A": (dict(lora_k=(f(2, 5), f(4, 2), 1.0)), r"lora_k\[0\] \(A\): was \[2, 5\], must be \[R, 6\]"),
        "lora B": (dict(lora_v=(f(2, 6), f(4, 3), 1.0)), r"lora_v\[1\] \(B\): was \[4, 3\], must be \[4, 2\]"),
        "lora scaling": (dict(lora_v=(f(2, 6), f(4, 2), f(()))), r"lora_v\[2\] \(scaling\): was Tensor, must be a number"),
        "dtype": (dict(w_o=f(4, 4).double()), r"w_o: was torch.float64, must be torch.float32 like target"),
        "device": (dict(bank=torch.empty(5, 6, device="meta")), r"bank: was on meta, must be on cpu like target"),
        "biases form": (dict(biases=f(2, 3)), r"biases: was Tensor, must be a list of \(table \[H, buckets\], buckets\) or None"),
        "bias form": (dict(biases=[f(2, 3)]), r"biases\[0\]: was Tensor, must be \(table \[H, buckets\], buckets\)"),
        "table heads": (dict(biases=[(f(3, 3), ids)]), r"biases\[0\]\[0\] \(table\): was \[3, 3\], must be \[2, buckets\]"),
        "table dtype": (dict(biases=[(ids, ids)]), r"biases\[0\]\[0\] \(table\): was torch.int64, must be torch.float32, "),
        "buckets shape": (dict(biases=[(f(2, 5), ids[:1])]), r"biases\[0\]\[1\] \(buckets\): was \[1, 2\], must be \[2, 2\]"),
        "buckets dtype": (dict(biases=[(f(2, 5), ids.float())]), r"biases\[0\]\[1\] \(buckets\): was torch.float32, must be"),
        "bucket": (dict(biases=[(f(2, 4), ids)]), r"biases\[0\]\[1\] \(buckets\): held 4, must be from -1 \(-1 = none\) to 3, the last bucket"),
        "bias device": (dict(biases=[(f(2, 5), ids.to("meta"))]), r"biases\[0\]\[1\] \(buckets\): was on meta, must be on cpu"),
        "pooling": (dict(pooling="mean"), r"pooling: was 'mean', must be one of 'softmax', 'din', 'top_k'"),
        "no top_k": (dict(pooling="top_k"), r"top_k: was None, must be an integer of at least 1 with pooling='top_k'"),
        "top_k 0": (dict(pooling="top_k", top_k=0), r"top_k: was 0, must be an integer of at least 1"),
        "top_k unused": (dict(top_k=3), r"top_k: was 3, must be None with pooling='softmax'"),
        "pooling projected": (dict(pooling="din", strategy="project"), r"strategy: was 'project', must be 'absorb' or 'auto' with pooling='din'"),
        "strategy": (dict(strategy="best"), r"strategy: was 'best', must be one of"),
        "backend": (dict(backend="x"), r"backend: was 'x', must be one of"),
    }  # fmt: skip


@pytest.mark.parametrize("case", messages())
@pytest.mark.parametrize("strategy", ["absorb", "project"])
def test_error_messages(case, strategy):
    changed, message = messages()[case]
    f = torch.randn
    good = dict(target=f(2, 4), history=torch.tensor([[0, 4], [2, -1]]), bank=f(5, 6), w_q=f(4, 4), w_k=f(4, 6),
                w_v=f(4, 6), w_o=f(4, 4), num_heads=2, strategy=strategy)  # fmt: skip
    em3.ops.lora_target_attention(**good)
    with pytest.raises(ValueError, match=message):
        em3.ops.lora_target_attention(**good | changed)


@pytest.mark.parametrize("rows", [3, 20], ids=["bank", "history"])
@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_a_bank_row_that_is_named_behind_the_last_user_only_reaches_nobody(strategy, backend, rows):
    bank = torch.randn(rows, 5)
    bank[2] = torch.nan
    history = em3.Jagged(torch.tensor([0, 1, -1, 0, 2, 2]), torch.tensor([0, 2, 4]))
    weights = [torch.randn(4, width, requires_grad=True) for width in (4, 5, 5, 4)]
    target = torch.randn(2, 4, requires_grad=True)
    out = em3.ops.lora_target_attention(target, history, bank, *weights, num_heads=2, strategy=strategy, backend=backend)
    for result in (out, *torch.autograd.grad(out.sum(), [target, *weights])):
        assert result.isfinite().all()


def test_a_bank_that_is_no_tensor_is_told_apart():
    made = make(3, 2, 4, 8, 10, [2, 1, 0])
    with pytest.raises(ValueError, match=r"bank: was object, must be a tensor \[n, C\]; of a ContentBank give its rows"):
        op("absorb", "torch")(**made | {"bank": object()})
