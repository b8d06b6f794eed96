"""FlexAttention and varlen attention compute what em3 does; they are timed on a GPU, and held against float64 here."""

from __future__ import annotations

import inspect

import pytest
import torch

for package in ("yaml", "psutil"):
    pytest.importorskip(package)

from em3.benchmarks import measure, operations, registry

from .tiny import SHAPES

ATTENTIONS = [shape for shape in SHAPES if shape.op in ("qformer_attention", "lora_target_attention")]


def check(shape, name):
    operation = registry.OPERATIONS[shape.op]
    inputs = operation.make(shape.dims, "cpu", torch.float32)
    grad = operations.gradient(operation.ours(inputs, "auto"))
    want = measure.true_results(operation.truth, inputs, grad)
    found = measure.errors(measure.results(registry.form(operation, name).bind(inputs), grad), want)
    assert found.keys() == want.keys()
    assert max(found.values()) < 1e-5, found


@pytest.mark.filterwarnings("ignore")  # flex_attention recommends to compile it
@pytest.mark.parametrize("shape", ATTENTIONS, ids=[f"{s.op}, {s.name}" for s in ATTENTIONS])
def test_flex_attention(shape, monkeypatch):
    """It refuses gradients on a CPU, but its uncompiled form has them."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    check(shape, "flex")


@pytest.mark.parametrize("shape", ATTENTIONS, ids=[f"{s.op}, {s.name}" for s in ATTENTIONS])
def test_varlen_attention(shape, monkeypatch):
    """The kernel is made up, of PyTorch's documentation: what it is given must fit, and be the right tokens."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def kernel(*args, **options):
        given = signature.bind(*args, **options).arguments
        assert given.keys() == {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}
        query, key, value, ends, key_ends, longest, longest_key = given.values()
        assert query.dim() == key.dim() == value.dim() == 3
        assert ends.dtype == key_ends.dtype == torch.int32
        assert (int(ends[-1]), int(key_ends[-1])) == (len(query), len(key))
        assert (int(ends.diff().max()), int(key_ends.diff().max())) == (longest, longest_key)
        items = zip(*(x.split(e.diff().tolist()) for x, e in ((query, ends), (key, key_ends), (value, key_ends))), strict=True)
        parts = [torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in item)) for item in items]
        return torch.cat([part.transpose(0, 1) for part in parts])

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    check(shape, "varlen")


@pytest.mark.parametrize("op", ["qformer_attention", "lora_target_attention"])
def test_where_they_are_measured(op):
    shape = next(shape for shape in ATTENTIONS if shape.op == op)
    forms = {form.name: form for form in registry.OPERATIONS[op].forms()}
    assert forms["flex"].refuses(shape.dims, "cpu") == "FlexAttention has no backward on a CPU"
    assert forms["varlen"].refuses(shape.dims, "cpu") == "varlen attention runs on a GPU only"
    assert [forms[name].refuses(shape.dims, "cuda:0") for name in ("flex", "varlen")] == [None, None]
    row = operations._needs(forms["varlen"], shape, "cuda", torch.float32)
    assert row == {"status": "not usable", "reason": "it computes in bfloat16 and float16 only"}
