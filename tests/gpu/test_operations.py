"""The four operations on a GPU against their references in float64 on the same GPU: ``pytest tests/gpu``.

What differs there from the CPU: other branches of the torch backend, index tensors that nobody looks at, and products
in TF32 where the user allows them (not here).
"""

from __future__ import annotations

import pytest
import torch

import em3
from em3 import reference
from em3.ops import _dispatch
from tests import oracle
from tests.ops import test_contrastive_loss as cl
from tests.ops import test_lora_linear as ll
from tests.ops import test_lora_target_attention as lta
from tests.ops import test_qformer_attention as qa

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
QFORMER = [
    *(pytest.param("absorb", *p.values, marks=p.marks) for p in oracle.backends("qformer_attention", DEVICE)),
    ("project", "torch"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(args):
    return oracle.moved(args, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("strategy", "backend"), QFORMER)
@pytest.mark.parametrize("lengths", [[70, 33], [[5, 0, 70, 1], [0, 0, 9, 40]], [64, [5, 0, 70, 1]]], ids=["padded", "jagged", "both"])
def test_qformer_attention(lengths, strategy, backend, dtype):
    args = qa.make(4, 8, 4, 16, [48, 96], lengths, masked=True)
    oracle.check(qa.op(strategy, backend), qa.plain, on_gpu(args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("strategy", "backend"), QFORMER)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("width", [40, 77, 128, 256, 512, 768, 1280])
def test_qformer_attention_of_every_width(width, per_item, strategy, backend, dtype):
    """Every tile of the kernels; the long item is cut into parts, for five items do not fill a GPU."""
    args = qa.make(5, 8, 8, 16, [width], [[300, 0, 4000, 1, 33]], per_item=per_item)
    oracle.check(qa.op(strategy, backend), qa.plain, on_gpu(args), dtype)
    oracle.same_bits_twice(qa.op(strategy, backend), oracle.convert(on_gpu(args), dtype))


@pytest.mark.parametrize("backend", oracle.backends("qformer_attention", DEVICE))
def test_qformer_attention_of_more_elements_than_32_bits_count(backend):
    """Two items 2**31 elements apart."""
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 3, 16), (2**31, 16, 1))
    far.copy_(torch.randn(2, 3, 16))
    u, w = (torch.randn(2, *s, 16, dtype=torch.bfloat16, device=DEVICE) for s in ((1, 3), (4,)))
    (_, a, *_), (_, b, *_) = (
        torch.ops.em3.qformer_attention([u], None, [w], [x], [None], [None], 2, None, 0.0, backend) for x in (far, far.contiguous())
    )
    torch.testing.assert_close(a, b)


def test_qformer_attention_of_shared_queries_over_many_items():
    args = qa.make(1500, 4, 4, 16, [64], [[k % 37 for k in range(1500)]])
    for way in ("triton", "torch"):
        if _dispatch.module("qformer_attention", way).unavailable() is None:
            oracle.check(qa.op("absorb", way), qa.plain, on_gpu(args), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", oracle.backends("lora_linear", DEVICE))
@pytest.mark.parametrize(("g", "route"), [(None, "adapter"), (5, "adapter"), (5, "offsets")])
def test_lora_linear(g, route, backend, dtype):
    oracle.check(ll.op(backend), ll.reference, on_gpu(ll.make((64, 9), 48, 32, 8, g, route=route)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", oracle.backends("lora_linear", DEVICE))
@pytest.mark.parametrize("r", [1, 8, 24, 64, 128])
@pytest.mark.parametrize("g", [None, 3, 200])
def test_lora_linear_of_every_rank(g, r, backend, dtype):
    """Every tile of the kernels, and adapters with many parts of rows, few or none."""
    args = ll.make((6000,), 200, 136, r, g, frozen=("weight", "bias"))
    if g is not None:
        args["adapter"] = args["adapter"].where(torch.rand(6000) < 0.3, 1)
    oracle.check(ll.op(backend), ll.reference, on_gpu(args), dtype)
    oracle.same_bits_twice(ll.op(backend), oracle.convert(on_gpu(args), dtype))


def test_lora_linear_in_a_cuda_graph():
    """Nothing looks at the indices: a graph that was recorded once serves other adapters for each row."""
    args = oracle.convert(on_gpu(ll.make((300,), 40, 24, 8, 7)), torch.bfloat16)
    em3.ops.lora_linear(**args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = em3.ops.lora_linear(**args)
    args["adapter"].copy_(torch.randint(-1, 7, (300,)))
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(y, em3.ops.lora_linear(**args))


TARGET = [
    *(pytest.param("absorb", *p.values, marks=p.marks) for p in oracle.backends("lora_target_attention", DEVICE)),
    ("project", "torch"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("strategy", "backend"), TARGET)
@pytest.mark.parametrize("lengths", [70, [5, 0, 70, 1]], ids=["padded", "jagged"])
@pytest.mark.parametrize("biases", [0, 2])
def test_lora_target_attention(biases, lengths, strategy, backend, dtype):
    args = lta.make(4, 4, 16, 48, 100, lengths, m=3, holes=True, biases=biases)
    oracle.check(lta.op(strategy, backend), lta.plain, on_gpu(args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize("biases", [0, 1])
@pytest.mark.parametrize("width", [40, 77, 128, 256, 512, 768])
def test_lora_target_attention_of_every_width(width, biases, m, dtype):
    """Every tile of the kernels; the long history is cut into parts, and names rows of the bank many times over."""
    reason = _dispatch.module("lora_target_attention", "triton").unavailable()
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    args = on_gpu(lta.make(5, 4, 16, width, 300, [300, 0, 4000, 1, 33], m=m, holes=True, biases=biases))
    oracle.check(lta.op("absorb", "triton"), lta.plain, args, dtype)
    oracle.same_bits_twice(lta.op("absorb", "triton"), oracle.convert(args, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", oracle.backends("contrastive_loss", DEVICE))
@pytest.mark.parametrize("duplicates", ["mask", "positive", "keep"])
@pytest.mark.parametrize("b", [64, 2100])
def test_contrastive_loss(b, duplicates, backend, dtype):
    args = cl.make(b, 32, ids=b // 2, log_q=True, weight=True, duplicates=duplicates)
    oracle.check(cl.op(backend), reference.contrastive_loss, on_gpu(args), dtype)


@pytest.mark.parametrize("backend", oracle.backends("contrastive_loss", DEVICE))
@pytest.mark.parametrize("v", [40, 77, 128, 200, 768])
def test_contrastive_loss_of_every_width(v, backend):
    """Every tile of the kernels, with more blocks of rows than programs; the tensor cores must not lose digits of long sums."""
    args = on_gpu(cl.make(5000, v, k=300, ids=4000, log_q=True, weight=True))
    oracle.check(cl.op(backend), reference.contrastive_loss, args, torch.float32)
    oracle.same_bits_twice(cl.op(backend), oracle.convert(args, torch.float32))


@pytest.mark.parametrize("backend", oracle.backends("contrastive_loss", DEVICE))
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_contrastive_loss_of_hot_logits(kind, backend):
    """Trained embeddings at a scale of 100: most logits of a row's candidates are far under its positive's, some are beside it."""
    args = cl.make(2100, 16, ids=1500, scale=100.0, bias=-50.0, kind=kind)
    near = args["content"] + 0.5 * torch.randn(2100, 16)
    args["ids_embedding"] = near.detach().requires_grad_()
    oracle.check(cl.op(backend), reference.contrastive_loss, on_gpu(args), torch.float32)


@pytest.mark.parametrize("backend", oracle.backends("contrastive_loss", DEVICE))
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("v", [40, 77, 128, 200])
def test_sigmoid_contrast_of_every_width(v, duplicates, backend):
    args = on_gpu(cl.make(3000, v, k=300, ids=2000, log_q=True, weight=True, kind="sigmoid", duplicates=duplicates))
    oracle.check(cl.op(backend), reference.contrastive_loss, args, torch.float32)
    oracle.same_bits_twice(cl.op(backend), oracle.convert(args, torch.float32))


def test_a_row_number_outside_the_bank_is_missing_and_an_error_under_debug_checks():
    args = on_gpu(lta.make(2, 2, 4, 6, 5, 3, holes=True))
    wild = args | {"ids": torch.tensor([[1, 10**12, 4], [-(10**12), 5, 0]], device=DEVICE)}
    tame = args | {"ids": torch.tensor([[1, -1, 4], [-1, -1, 0]], device=DEVICE)}
    for strategy, backend in (("absorb", "auto"), ("absorb", "torch"), ("project", "torch")):
        torch.testing.assert_close(lta.op(strategy, backend)(**wild), lta.op(strategy, backend)(**tame))
        with em3.debug_checks(), pytest.raises(ValueError, match="history: held"):
            lta.op(strategy, backend)(**wild)


def test_arguments_on_two_devices_are_an_error():
    args = on_gpu(lta.make(2, 2, 4, 6, 5, 3))
    with pytest.raises(ValueError, match="bank: was on cpu, must be on cuda:0 like target"):
        lta.op("auto", "auto")(**args | {"bank": args["bank"].detach().cpu()})
