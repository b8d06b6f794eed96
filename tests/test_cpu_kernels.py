"""The compiled CPU kernels on every instruction set and thread count, called concurrently, and after a fork."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from em3 import reference
from em3.backends import cpp
from tests import oracle
from tests.ops.test_qformer_attention import as_streams, make, op

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=f"em3._C: {cpp.unavailable()}")

ISAS = ["baseline", "avx2", "avx512"]
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("per_item", [False, True])
def test_every_instruction_set(isa, per_item, monkeypatch):
    reason = cpp.compiled().cpu_features()["isa"].get(isa, "not compiled on this platform")
    if reason is not None:
        pytest.skip(f"{isa}: {reason}")
    monkeypatch.setattr(cpp, "isa", isa)
    oracle.check(op("absorb", "cpp"), plain, make(7, 5, 3, 7, [37, 16], LENGTHS, masked=True, per_item=per_item), torch.float32)


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cpp, "isa", "avx10")
    with pytest.raises(ValueError, match="avx10"):
        oracle.run(op("absorb", "cpp"), oracle.convert(args(), torch.float32), 0)


@pytest.mark.parametrize("runtime", ["auto", "std"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_thread_count(runtime, count, threads):
    threads(count)
    cpp.compiled().set_thread_runtime(runtime)
    oracle.check(op("absorb", "cpp"), plain, args(), torch.float32)
    oracle.same_bits_twice(op("absorb", "cpp"), oracle.convert(args(), torch.float32))


@pytest.mark.parametrize("runtime", ["auto", "std"])
def test_calls_from_several_threads_at_once(runtime, threads):
    threads(2)
    cpp.compiled().set_thread_runtime(runtime)
    inputs = [oracle.convert(args(), torch.float32) for _ in range(4)]
    want = [oracle.run(op("absorb", "cpp"), a, 0) for a in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, expected in zip(pool.map(lambda a: oracle.run(op("absorb", "cpp"), a, 0), inputs), want, strict=True):
                assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def _in_child(inputs, count, results):
    torch.set_num_threads(count)
    u, c, values, offsets = inputs
    module = __import__("em3.backends.cpp.qformer_attention", fromlist=["forward"])
    y, _, _ = module.forward(u, c, values, offsets, [None], values[0].shape[0])
    results.put(float(y[0].sum()))


def test_in_a_forked_worker():
    """As in a data loader's worker: forked after the parent has used its threads."""
    inputs = ([torch.randn(2, 1, 3, 16)], None, [torch.randn(6, 50, 16)], [None])
    from em3.backends.cpp import qformer_attention as kernel

    want = float(kernel.forward(*inputs, [None], 6)[0][0].sum())
    context = multiprocessing.get_context("fork")
    for count in (1, 2):
        results = context.Queue()
        child = context.Process(target=_in_child, args=(inputs, count, results))
        child.start()
        assert results.get(timeout=60) == pytest.approx(want, rel=1e-4, abs=1e-4)
        child.join(60)
        assert child.exitcode == 0
