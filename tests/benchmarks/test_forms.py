"""All forms of an operation are one function, and what their arithmetic is said to cost is what they do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

for package in ("yaml", "psutil"):
    pytest.importorskip(package)

from em3.benchmarks import contrastive_loss, forms, measure, operations, registry

from .tiny import LINEAR, QFORMER, SHAPES, TARGET

IDS = [f"{shape.op}, {shape.name}" for shape in SHAPES]


def bound(shape):
    operation = registry.OPERATIONS[shape.op]
    inputs = operation.make(shape.dims, "cpu", torch.float32)
    return operation, inputs, operations.gradient(operation.ours(inputs, "auto"))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_every_form_is_the_same_function(shape):
    operation, inputs, grad = bound(shape)
    want = measure.true_results(operation.truth, inputs, grad)
    assert set(want) == {"output", *forms.leaves(inputs)}
    took_part = []
    for form in operation.forms():
        if form.compiled or form.missing() or form.refuses(shape.dims, "cpu"):
            continue
        found = measure.errors(measure.results(form.bind(inputs), grad), want)
        assert max(found.values()) < 1e-5, f"{form.name}: {found}"
        took_part.append(form.name)
    assert {"em3", "em3 torch", "plain"} <= set(took_part)


def test_torch_compile_takes_part():
    shape = SHAPES[-1]
    operation, inputs, grad = bound(shape)
    want = measure.true_results(operation.truth, inputs, grad)
    found = measure.errors(measure.results(registry.form(operation, "compile").bind(inputs), grad), want)
    assert max(found.values()) < 1e-5


def test_the_truth_of_a_batch_larger_than_a_block():
    """It goes through the matrix in blocks of rows; the plain form does not."""
    operation, inputs, grad = bound(SHAPES[-1])
    whole = measure.true_results(operation.truth, inputs, grad)
    before, contrastive_loss.BLOCK = contrastive_loss.BLOCK, 7
    try:
        parts = measure.true_results(operation.truth, inputs, grad)
    finally:
        contrastive_loss.BLOCK = before
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


@pytest.mark.parametrize(
    ("op", "dims"),
    [
        ("qformer_attention", QFORMER | {"B": 3}),
        ("qformer_attention", QFORMER | {"B": 3, "tokens": "trained"}),
        ("lora_linear", LINEAR),
        ("lora_linear", LINEAR | {"G": 3}),
        ("lora_target_attention", TARGET),
        ("lora_target_attention", TARGET | {"Q": 5}),
        ("contrastive_loss", {"B": 24, "V": 8}),
    ],
)
def test_flops_of_the_plain_form_are_those_that_torch_counts(op, dims):
    operation = registry.OPERATIONS[op]
    call = operation.plain(operation.make(dims, "cpu", torch.float32))
    with FlopCounterMode(display=False) as forward, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = call.forward()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, list(call.leaves.values()), operations.gradient(out))
    work = operation.plain_work(dims)
    assert forward.get_total_flops() == work.forward_flops
    assert backward.get_total_flops() == work.backward_flops


def test_skewed_lengths():
    drawn = forms.lengths(4096, 100, skewed=True)
    assert (drawn[15::16] == 0).all()
    rest = drawn[drawn > 0]
    assert int(rest.max()) <= 400
    assert 70 < float(rest.double().mean()) < 100  # the tail is cut off at four times the mean
    assert float(rest.double().median()) < 0.8 * float(rest.double().mean())
    assert forms.lengths(5, 7, skewed=False).tolist() == [7] * 5


def test_padding_reads_each_row_where_it_stands():
    index, real = forms.padding(torch.tensor([0, 2, 2, 5]))
    assert real.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert index[real].tolist() == [0, 1, 2, 3, 4]
    assert int(index.max()) <= 4
