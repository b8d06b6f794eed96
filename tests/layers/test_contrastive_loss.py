from __future__ import annotations

import math

import pytest
import torch

import em3
from em3 import reference
from tests import oracle


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_is_the_operation_with_its_scale(duplicates):
    layer = em3.ContentIDContrastiveLoss(init_logit_scale=5.0, duplicates=duplicates)
    content, ids = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    items = torch.tensor([3, 1, 3, 2, 0, 1])
    scale = torch.tensor(5.0, requires_grad=True)
    want = reference.contrastive_loss(content, ids, item_ids=items, duplicates=duplicates, logit_scale=scale)
    got = layer(content, ids, item_ids=items)
    torch.testing.assert_close(got, want)
    (dscale,) = torch.autograd.grad(want, scale)
    got.backward()
    # d loss / d log s = s * d loss / d s
    torch.testing.assert_close(layer.log_scale.grad, 5 * dscale)


def test_sigmoid_learns_its_scale_and_its_bias():
    layer = em3.ContentIDContrastiveLoss(kind="sigmoid")
    assert [(name, round(p.item(), 5)) for name, p in layer.named_parameters()] == [("log_scale", 2.30259), ("logit_bias", -10.0)]
    content, ids = torch.randn(6, 4), torch.randn(6, 4)
    scale, bias = (torch.tensor(n, requires_grad=True) for n in (10.0, -10.0))
    want = reference.contrastive_loss(content, ids, logit_scale=scale, logit_bias=bias, kind="sigmoid")
    got = layer(content, ids)
    torch.testing.assert_close(got, want)
    dscale, dbias = torch.autograd.grad(want, (scale, bias))
    got.backward()
    torch.testing.assert_close(layer.log_scale.grad, 10 * dscale)
    torch.testing.assert_close(layer.logit_bias.grad, dbias)
    assert list(em3.ContentIDContrastiveLoss().state_dict()) == ["log_scale"]  # what was saved before there was a bias


def test_label_smoothing_and_metrics_are_those_of_the_operations():
    layer = em3.ContentIDContrastiveLoss(init_logit_scale=5.0, label_smoothing=0.2, duplicates="keep", direction="content_to_id")
    content, ids, negatives, items = torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 4), torch.tensor([3, 1, 3, 2, 0, 1])
    more = dict(item_ids=items, log_q=torch.rand(6).log(), weight=torch.rand(6), negatives=negatives)
    options = dict(duplicates="keep", direction="content_to_id", logit_scale=5.0)
    want = reference.contrastive_loss(content, ids, **more, **options, label_smoothing=0.2)
    torch.testing.assert_close(layer(content, ids, **more), want)
    given = oracle.convert(dict(content=content, ids_embedding=ids, **more), torch.float64)
    torch.testing.assert_close(tuple(layer.metrics(content, ids, **more)), reference.contrastive_metrics(**given, **options))


def test_a_training_step_brings_the_scale_back_under_its_maximum():
    layer = em3.ContentIDContrastiveLoss(init_logit_scale=10.0, max_logit_scale=20.0)
    with torch.no_grad():
        layer.log_scale.fill_(math.log(50.0))
    content, ids = torch.randn(5, 4), torch.randn(5, 4)
    capped = em3.ops.contrastive_loss(content, ids, logit_scale=20.0)
    layer.eval()
    torch.testing.assert_close(layer(content, ids), capped)
    torch.testing.assert_close(layer.log_scale.exp().item(), 50.0, rtol=1e-5, atol=0)  # evaluation changes no parameter
    layer.train()
    torch.testing.assert_close(layer(content, ids), capped)
    torch.testing.assert_close(layer.log_scale.exp().item(), 20.0, rtol=1e-5, atol=0)
    layer(content, ids).backward()
    assert layer.log_scale.grad.abs() > 0  # it can come down again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [11.0, 14.0, 50.0, 100.0, 1000.0])
def test_a_scale_at_its_maximum_has_a_gradient(most, dtype):
    """The exponential of a logarithm may be rounded to more than the number."""
    layer = em3.ContentIDContrastiveLoss(init_logit_scale=most, max_logit_scale=most).to(dtype)
    layer(torch.randn(9, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)).backward()
    assert layer.log_scale.grad.abs() > 0


@pytest.mark.parametrize("scale", [0.0, -1.0, 200.0])
def test_errors(scale):
    with pytest.raises(ValueError, match="init_logit_scale: was"):
        em3.ContentIDContrastiveLoss(init_logit_scale=scale)


@pytest.mark.parametrize(("options", "message"), [
    (dict(kind="siglip"), "kind: was 'siglip', must be one of 'infonce', 'sigmoid'"),
    (dict(init_logit_scale="5"), "init_logit_scale: was '5', must be a number"),
    (dict(max_logit_scale="5"), "max_logit_scale: was '5', must be a number"),
    (dict(kind="sigmoid", init_logit_bias="5"), "init_logit_bias: was '5', must be a number"),
    (dict(label_smoothing=-0.1), "label_smoothing: was -0.1, must be from 0 to 1"),
    (dict(kind="sigmoid", label_smoothing=0.1), "label_smoothing: was 0.1 with kind='sigmoid'"),
])  # fmt: skip
def test_options_are_refused_when_the_layer_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        em3.ContentIDContrastiveLoss(**options)
