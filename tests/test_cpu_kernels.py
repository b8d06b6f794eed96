"""The compiled CPU kernels on every instruction set and thread count, called concurrently, and after a fork."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import em3
from em3 import reference
from em3.backends import cpp
from em3.backends.cpp import _parts
from em3.backends.cpp import lora_linear as adapting
from em3.backends.cpp import qformer_attention as kernel
from tests import oracle
from tests.ops import test_contrastive_loss as contrast
from tests.ops import test_dropout as dropout
from tests.ops import test_lora_linear as linear
from tests.ops import test_lora_target_attention as target
from tests.ops.test_lora_target_pooling import pooled
from tests.ops.test_qformer_attention import as_streams, make, op

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=f"em3._C: {cpp.unavailable()}")

LENGTHS = [[3, 0, 130, 1, 64, 65, 300], 33]


def args():
    return make(7, 5, 3, 7, [37, 16], LENGTHS, masked=True)


def plain(values, offsets, **kwargs):
    return reference.qformer_attention(streams=as_streams(values, offsets), **kwargs)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
    cpp.compiled().set_thread_runtime("auto")


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def forced_isa(request, monkeypatch):
    oracle.force_isa(request.param, monkeypatch)


def test_dropout_on_every_instruction_set(forced_isa, monkeypatch):
    """One item of 1,300 tokens is cut into parts, and its tokens into tiles: the mask must not see it."""
    made = make(1, 3, 5, 8, [24, 16], [1300, [700]], masked=True)
    monkeypatch.setattr(cpp, "multiplies_bf16", lambda: True)
    for dtype in (torch.float32, torch.bfloat16):
        oracle.check(dropout.op("cpp", 0.3, 5), dropout.dropped(0.3, 5), made, dtype)


@pytest.mark.parametrize("per_item", [False, True])
def test_every_instruction_set(forced_isa, per_item):
    # 1, 3 and 6 rows of scores, read in place; 15, 72 and 300: blocks of them hold 32 or 64.
    for heads, q in ((1, 1), (3, 1), (2, 3), (3, 5), (9, 8), (4, 75)):
        made = make(7, q, heads, 7, [37, 16], LENGTHS, masked=True, per_item=per_item)
        oracle.check(op("absorb", "cpp"), plain, made, torch.float32)


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_every_instruction_set_multiplies_bf16(forced_isa, per_item, frozen, monkeypatch):
    """Without products of numbers in bf16 they are made of others: what only some processors have, all can show."""
    monkeypatch.setattr(cpp, "multiplies_bf16", lambda: True)
    # 15 rows of scores fill a vector or less, 72 and 300 several blocks; E is even, widths are not multiples of a vector.
    for heads, q in ((3, 5), (9, 8), (4, 75)):
        made = oracle.convert(make(7, q, heads, 6, [38, 16], LENGTHS, masked=True, per_item=per_item), torch.bfloat16)
        if frozen:
            made["values"] = [x.detach() for x in made["values"]]
        u = [made["w_q"]]
        assert kernel.in_pairs(u, [torch.empty(heads, 6, 38)], made["values"])
        oracle.check(op("absorb", "cpp"), plain, made, torch.bfloat16)
        got = oracle.run(op("absorb", "cpp"), made, 0)
        with monkeypatch.context() as here:
            here.setattr(cpp, "multiplies_bf16", lambda: False)
            without = oracle.run(op("absorb", "cpp"), made, 0)
        assert not all(torch.equal(a, b) for a, b in zip(got, without, strict=True))


@pytest.mark.parametrize("wanted", ["all", "tokens", "one stream"])
def test_bf16_gradients_of_short_items_cancel(forced_isa, wanted, monkeypatch):
    """A query that sees one token learns nothing of it: what dp and its mean have in common must go, to the last bit."""
    monkeypatch.setattr(cpp, "multiplies_bf16", lambda: True)
    made = oracle.convert(make(6, 5, 3, 6, [38, 16], [[1, 0, 2, 1, 3, 1], [0, 1, 2, 0, 1, 0]]), torch.bfloat16)
    if wanted != "all":
        for leaf in oracle.leaves(made):
            leaf.requires_grad_(False)
        for values in made["values"][: 2 if wanted == "tokens" else 1]:
            values.requires_grad_()
    oracle.check(op("absorb", "cpp"), plain, made, torch.bfloat16)


def test_bf16_of_single_tokens_leaves_nothing_to_learn(forced_isa, monkeypatch):
    """The softmax over one token is 1 whatever the score. What is rounded in dp must be rounded in its mean: otherwise a
    256th of it stays."""
    monkeypatch.setattr(cpp, "multiplies_bf16", lambda: True)
    half = lambda *shape: torch.randn(shape).bfloat16()  # noqa: E731
    u, w, values, dout = [half(3, 1, 5, 38)], [half(3, 6, 38)], [half(4, 1, 38)], half(3, 4, 5, 6)
    made = (u, None, w, values, [None], [None])
    assert kernel.in_pairs(u, w, values)
    du, *_ = kernel.backward(dout, None, *made, *kernel.forward(*made, 4), True, [False], [False])
    assert du[0].abs().max() < 1e-4


@pytest.mark.parametrize("why", ["odd width", "odd stride", "odd head", "float32 queries"])
def test_what_no_pairs_can_be_made_of(why, monkeypatch):
    monkeypatch.setattr(cpp, "multiplies_bf16", lambda: True)
    values = torch.randn(2, 3, 9, dtype=torch.bfloat16)[..., : 9 if why == "odd width" else 8]
    if why != "odd stride":
        values = values.contiguous()
    u = torch.randn(1, 1, 1, values.shape[-1], dtype=torch.float32 if why == "float32 queries" else torch.bfloat16)
    assert not kernel.in_pairs([u], [torch.empty(1, 3 if why == "odd head" else 4, 8)], [values])


def test_every_instruction_set_reads_the_bank(forced_isa):
    for heads, m, c in ((4, None, 64), (7, 1, 37), (3, 5, 37), (4, 75, 16)):
        made = target.make(7, heads, 8, c, 50, LENGTHS[0], m=m, holes=True)
        oracle.check(target.op("absorb", "cpp"), target.plain, made, torch.float32)
        oracle.check(*pooled("din", None, "cpp"), made, torch.float32)


@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
@pytest.mark.parametrize("q", [1, 5], ids=["few rows", "more rows"])
def test_every_instruction_set_reads_half_types(forced_isa, dtype, q):
    """Tokens in a half type are read exactly: smallest, largest and subnormal numbers, and widths that leave a tail."""
    made = oracle.convert(make(7, q, 3, 7, [37, 16, 3], [*LENGTHS, 5], masked=True, per_item=True), torch.float32)
    with torch.no_grad():
        for values in made["values"]:
            few = torch.tensor([torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny / 4, 0.0, -0.0, 100.0])
            values.flatten()[: len(few)] = few
    half = made | {"values": [x.detach().to(dtype).requires_grad_() for x in made["values"]]}
    exact = made | {"values": [x.detach().float().requires_grad_() for x in half["values"]]}
    got, want = (oracle.run(op("absorb", "cpp"), given, 0) for given in (half, exact))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5 if a.dtype == torch.float32 else 1e-2, atol=1e-5)
    weights = torch.full((1, 3, 4), 0.25)
    for number in (torch.finfo(dtype).max, torch.inf, torch.nan):  # what is not finite stays so, and spoils its item
        row = torch.tensor([[[number, 1.0, -number, 0.5]]]).to(dtype)
        y, *_ = kernel.forward([torch.zeros(1, 1, 1, 4)], None, [weights], [row], [None], [None], 1)
        want = row.float() if row.isfinite().all() else torch.full_like(row.float(), torch.nan)
        torch.testing.assert_close(y[0].flatten(), want.flatten(), equal_nan=True, rtol=0, atol=0)


def test_every_instruction_set_contrasts(forced_isa, monkeypatch):
    for largest in contrast.SUMS:
        monkeypatch.setattr(contrast.tiled, "LARGEST_LOGIT", largest)
        for b, v, k in ((1, 1, 0), (2, 3, 3), (97, 8, 5), (200, 37, 0), (193, 16, 200)):
            made = contrast.make(b, v, k=k, ids=None if b == 97 else b, log_q=True, weight=True)
            oracle.check(contrast.op("cpp"), reference.contrastive_loss, made, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *oracle.HALF], ids=str)
def test_every_instruction_set_contrasts_few_rows_and_half_ones(forced_isa, dtype):
    """Of few rows candidates are multiplied where they lie, and rows of the half types become floats as they are read."""
    for b, v, k in ((1, 3, 40), (4, 33, 7), (7, 50, 300), (8, 16, 0), (9, 31, 200), (101, 65, 3)):
        made = contrast.make(b, v, k=k, ids=4, log_q=True)
        oracle.check(contrast.op("cpp"), reference.contrastive_loss, made, dtype)


# Ranks of every kind of tile and more, widths with and without a tail, empty and lone rows; 520 rows of one adapter are
# cut into parts.
LINEAR = [((520,), 37, 16, 8, None), ((150,), 16, 37, 1, 3), ((33,), 64, 5, 17, 4), ((1,), 3, 2, 4, None), ((0,), 8, 8, 2, 2),
          ((700,), 19, 33, 130, 2), ((520,), 40, 24, 5, 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *oracle.HALF], ids=str)
def test_every_instruction_set_adapts(forced_isa, dtype, monkeypatch):
    monkeypatch.setattr(adapting.plain, "enough", lambda weight: float("inf"))
    for shape in LINEAR:
        for p in (0.0, 0.3):
            made = linear.make(*shape, route="offsets" if shape[0] == (150,) else "adapter", per_adapter=True, frozen=("weight",))
            oracle.check(linear.dropping("cpp", p, 5), linear.dropped(p, 5) if p else reference.lora_linear, made, dtype)


@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
def test_every_instruction_set_rounds_to_half_types(forced_isa, dtype):
    """As torch rounds: to the nearest, ties to even; smallest, subnormal and too large numbers, infinities, NaN."""
    top = torch.finfo(dtype).max
    some = torch.cat([torch.randn(4000) * 10.0 ** torch.randint(-42, 39, (4000,)), torch.tensor([0.0, -0.0, top, -top, torch.inf, torch.nan])])
    ties = torch.randint(-(2**15), 2**15, (500,)).to(torch.int16).view(dtype).float()  # and halfway to their neighbours
    some = torch.cat([some, (ties.double() + ties.double() * 2 ** (-9 if dtype == torch.bfloat16 else -12)).float()])
    x, one = torch.ones(len(some), 1), torch.ones(1, 1, 1)
    for width in (1, 21):  # a tail, and whole vectors
        y = torch.zeros(len(some), width, dtype=dtype)
        rows = torch.arange(len(some))  # an adapter for each number, which it adds to zeros
        b = some[:, None, None].expand(-1, width, 1).contiguous()
        cpp.compiled().lora_linear_forward(x, one.expand(len(some), 1, 1).contiguous(), b, 1.0, None, rows, None, y, None, 1, cpp.isa)
        assert torch.equal(y.isnan()[:, 0], some.isnan())
        want = some.to(dtype)[:, None].expand(-1, width)
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("runtime", ["auto", "std"])
@pytest.mark.parametrize("g", [None, 9])
def test_any_number_of_threads_adapts_to_the_same_bits(runtime, g, threads):
    """Parts of one adapter are added up in the same order; what they add up to is tested with the instruction sets."""
    cpp.compiled().set_thread_runtime(runtime)
    made = oracle.convert(linear.make((900,), 24, 20, 6, g), torch.float32)
    x, dy, a, b = (made[k].detach() for k in ("x", "x", "lora_a", "lora_b"))
    a, b = (a[None], b[None].contiguous()) if g is None else (a, b)
    dy = torch.randn(900, 20)
    results = []
    for count in (1, 2, 3, 8):
        dx, y, da, db = torch.zeros_like(x), torch.zeros_like(dy), torch.empty_like(a), torch.empty_like(b)
        how = (a, b, 0.7, None, made.get("adapter"), None)
        cpp.compiled().lora_linear_forward(x, *how, y, None, count)
        cpp.compiled().lora_linear_backward(dy, x, *how, dx, da, db, None, count)
        results.append((y, dx, da, db))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_ranks_that_are_padded_are_not_computed():
    """Behind an adapter's own rank both factors are zero: not even NaN in x makes a gradient there."""
    made = oracle.convert(linear.make((40,), 6, 7, 9, 3), torch.float32)
    with torch.no_grad():
        for g, rank in enumerate((4, 0, 9)):
            made["lora_a"][g, rank:], made["lora_b"][g, :, rank:] = 0, 0
    oracle.check(linear.op("cpp"), reference.lora_linear, made, torch.float32)
    with torch.no_grad():
        made["x"][0] = torch.nan
    da, db = torch.autograd.grad(linear.op("cpp")(**made).sum(), [made["lora_a"], made["lora_b"]])
    assert not da[0, 4:].any()
    assert not db[0, :, 4:].any()
    assert not da[1].any()
    assert not db[1].any()


def test_memory_of_adapters_does_not_grow_with_the_rows():
    """Forward and backward of 64 adapters at 2,000 and 10,000 rows: beyond inputs and outputs, what row numbers take."""
    code = """
import resource, torch
from em3.backends import cpp
torch.set_num_threads(1)
def call(t):
    x, dy, y, dx = (torch.zeros(t, 512) for _ in range(4))
    a, b, adapter = torch.zeros(64, 8, 512), torch.zeros(64, 512, 8), torch.arange(t) % 64
    a += 1; b += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpp.compiled().lora_linear_forward(x, a, b, 1.0, None, adapter, None, y, None, 1)
    cpp.compiled().lora_linear_backward(dy, x, a, b, 1.0, None, adapter, None, dx, torch.empty_like(a), torch.empty_like(b), None, 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
for t in (2000, 10000):
    for _ in range(2):
        grown = call(t)
    assert grown < 4096, f"{grown} KiB at {t} rows"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("runtime", ["auto", "std"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("largest", contrast.SUMS)
def test_every_thread_count_contrasts(runtime, count, largest, threads, monkeypatch):
    """1,000 rows of 64 are worth 8 threads; 3 of them leave parts of unequal length. 5 rows are every thread's."""
    threads(count)
    cpp.compiled().set_thread_runtime(runtime)
    monkeypatch.setattr(contrast.tiled, "LARGEST_LOGIT", largest)
    for b, k in ((1000, 77), (5, 9000)):
        made = contrast.make(b, 64, k=k, ids=400, log_q=True, weight=True)
        oracle.check(contrast.op("cpp"), reference.contrastive_loss, made, torch.float32)
        oracle.same_bits_twice(contrast.op("cpp"), oracle.convert(made, torch.float32))


def test_one_shift_that_fails_is_made_good():
    """A bound within the limit, and a row whose sum underflows: the kernel sees that, and takes running maxima instead."""
    made = contrast.make(60, 16, scale=149.0)
    with torch.no_grad():
        made["ids_embedding"][:] = 0.01 * made["ids_embedding"] - made["content"][:1]  # row 0 meets logits near -149 only
    oracle.check(contrast.op("cpp"), reference.contrastive_loss, made, torch.float32)


@pytest.mark.parametrize("where", ["content", "ids_embedding"])
@pytest.mark.parametrize("row", [0, 250, 499])
def test_a_nan_shows(where, row):
    made = oracle.convert(contrast.make(500, 16, reduction="none"), torch.float32)
    with torch.no_grad():
        made[where][row, 3] = torch.nan
    assert contrast.op("cpp")(**made).isnan().all()


@pytest.mark.parametrize(("isa", "reason"), [
    ("avx10", "EM3_CPU_ISA=avx10: must be one of baseline, avx2, avx512, avx512_bf16"),
    ("avx512", "EM3_CPU_ISA=avx512: this processor or operating system lacks"),
])  # fmt: skip
def test_an_instruction_set_that_is_not_there(isa, reason, monkeypatch):
    if cpp.compiled().cpu_features()["isa"].get(isa, "unknown") is None:
        pytest.skip(f"this processor has {isa}")
    monkeypatch.setattr(cpp, "isa", isa)
    with pytest.raises(em3.BackendError, match=reason):
        op("absorb", "cpp")(**oracle.convert(args(), torch.float32))
    op("absorb", "auto")(**oracle.convert(args(), torch.float32))  # automatic choice serves it
    rows = em3.env_report()["operations"]
    assert next(r["reason"] for r in rows if r["backend"] == "cpp").startswith(reason)
    monkeypatch.setenv("EM3_CPU_ISA", isa)
    assert f"uses nothing, for EM3_CPU_ISA={isa} cannot be used" in str(em3.env_report())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_default_dtype_and_device(dtype):
    """Memory is made in the kernel's dtype, not in torch's default one."""
    inputs = oracle.convert(args(), torch.float32)
    want = oracle.run(op("absorb", "cpp"), inputs, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            out = op("absorb", "cpp")(**inputs)
            grads = torch.autograd.grad(out, oracle.leaves(inputs), torch.ones_like(out))
        got = oracle.run(op("absorb", "cpp"), inputs, 0)
    finally:
        torch.set_default_dtype(before)
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (out, *grads))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("runtime", ["auto", "std"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_thread_count(runtime, count, threads):
    threads(count)
    cpp.compiled().set_thread_runtime(runtime)
    oracle.check(op("absorb", "cpp"), plain, args(), torch.float32)
    oracle.same_bits_twice(op("absorb", "cpp"), oracle.convert(args(), torch.float32))


def counted_parts(monkeypatch):
    """Lets items be cut into parts of 4 tokens; returns the list of the numbers of parts that calls will choose."""
    monkeypatch.setattr(_parts, "PART", 4)
    cut, real = [], _parts.count
    monkeypatch.setattr(_parts, "count", lambda *args: cut.append(real(*args)) or cut[-1])
    return cut


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("m", [None, 5])
def test_long_histories_are_cut_into_parts(batch, frozen, m, threads, monkeypatch):
    threads(3)
    cut = counted_parts(monkeypatch)
    for lengths in (40, [3, 0, 50][:batch], [50, 9, 0][:batch]):
        made = target.make(batch, 2, 8, 16, 20, lengths, m=m, holes=True, bank_grad=not frozen, biases=1)
        for pooling in ("softmax", "din"):
            call, truth = pooled(pooling, None, "cpp")
            oracle.check(call, truth, made, torch.float32)
            oracle.same_bits_twice(call, oracle.convert(made, torch.float32))
    assert max(cut) == -(-6 // batch)


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_long_items_are_cut_into_parts(batch, per_item, frozen, threads, monkeypatch):
    """Fewer items than threads: each is cut, and the parts are joined to the same numbers."""
    threads(3)
    cut = counted_parts(monkeypatch)
    for lengths in ([40, [3, 0, 50][:batch]], [[0, 0, 9][:batch], 1], [33]):
        made = make(batch, 5, 3, 7, [37, 16][: len(lengths)], lengths, masked=True, per_item=per_item)
        if frozen:
            made["values"] = [x.detach() for x in made["values"]]
        oracle.check(op("absorb", "cpp"), plain, made, torch.float32)
        oracle.same_bits_twice(op("absorb", "cpp"), oracle.convert(made, torch.float32))
    assert max(cut) == -(-6 // batch)
    poisoned = oracle.convert(made, torch.float32)
    with torch.no_grad():
        poisoned["values"][0][~poisoned["masks"][0]] = torch.nan
    for a, b in zip(*(oracle.run(op("absorb", "cpp"), oracle.convert(a, torch.float32), 0) for a in (poisoned, made)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("runtime", ["auto", "std"])
def test_calls_from_several_threads_at_once(runtime, threads):
    threads(2)
    cpp.compiled().set_thread_runtime(runtime)
    inputs = [oracle.convert(args(), torch.float32) for _ in range(4)]
    want = [oracle.run(op("absorb", "cpp"), a, 0) for a in inputs]
    with ThreadPoolExecutor(4, initializer=threads, initargs=(2,)) as pool:  # each thread has a count of its own
        for _ in range(5):
            for got, expected in zip(pool.map(lambda a: oracle.run(op("absorb", "cpp"), a, 0), inputs), want, strict=True):
                assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def _in_child(inputs, count, results):
    torch.set_num_threads(count)
    u, c, w, values, offsets = inputs
    module = __import__("em3.backends.cpp.qformer_attention", fromlist=["forward"])
    y, _, _, _ = module.forward(u, c, w, values, offsets, [None], values[0].shape[0])
    results.put(float(y[0].sum()))


def test_in_a_forked_worker():
    """As in a data loader's worker: forked after the parent has used its threads."""
    inputs = ([torch.randn(2, 1, 3, 16)], None, [torch.randn(2, 4, 16)], [torch.randn(6, 50, 16)], [None])
    want = float(kernel.forward(*inputs, [None], 6)[0][0].sum())
    context = multiprocessing.get_context("fork")
    for count in (1, 2):
        results = context.Queue()
        child = context.Process(target=_in_child, args=(inputs, count, results))
        child.start()
        assert results.get(timeout=60) == pytest.approx(want, rel=1e-4, abs=1e-4)
        child.join(60)
        assert child.exitcode == 0


def _adapted(x, dy, a, b, adapter, count):
    """The kernel alone: torch's own products hang in a process forked after its pool was started."""
    y, dx, da, db = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b)
    cpp.compiled().lora_linear_forward(x, a, b, 0.7, None, adapter, None, y, None, count)
    cpp.compiled().lora_linear_backward(dy, x, a, b, 0.7, None, adapter, None, dx, da, db, None, count)
    return [t.numpy() for t in (y, dx, da, db)]


def test_adapters_in_a_forked_worker(threads):
    inputs = (torch.randn(600, 24), torch.randn(600, 20), torch.randn(5, 6, 24), torch.randn(5, 20, 6), torch.arange(600) % 5)
    want = _adapted(*inputs, 2)
    context = multiprocessing.get_context("fork")
    for count in (1, 2):
        results = context.Queue()
        child = context.Process(target=lambda: results.put(_adapted(*inputs, count)))  # noqa: B023
        child.start()
        got = results.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        assert all((g == w).all() for g, w in zip(got, want, strict=True))


def test_a_fork_before_the_first_call_is_known():
    """As where torch has started its threads, em3 has not used them, and a data loader forks."""
    code = """
import os, torch
import em3.backends.cpp
threads = lambda: em3.backends.cpp.compiled().cpu_features()["threads"]
em3.backends.cpp.compiled()
child = os.fork()
if child == 0:
    os._exit(0 if threads() == "std" else 1)
assert os.waitpid(child, 0)[1] == 0, "the child would use the threads of its parent"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_holds_nothing_may_have_any_strides():
    """No item, no token or an empty bank, transposed: the strides of a tensor without elements are nobody's concern."""
    f = torch.randn
    weights = f(16, 16), [f(16, 5)], [f(16, 5)], f(16, 16)
    for values in (f(5, 3, 0).permute(2, 1, 0), f(5, 0, 4).permute(2, 1, 0)):
        query = f(2, 16, requires_grad=True)
        out = em3.ops.qformer_attention(query, values, *weights, num_heads=2, strategy="absorb", backend="cpp")
        assert out.shape == (len(values), 2, 16)
        assert not out.any()
        out.sum().backward()
        assert not query.grad.any()
    history = torch.full((4, 3), -1)
    out = em3.ops.lora_target_attention(f(4, 16), history, f(5, 0).t(), f(16, 16), f(16, 5), f(16, 5), f(16, 16), num_heads=2,
                                        strategy="absorb", backend="cpp")  # fmt: skip
    assert not out.any()
