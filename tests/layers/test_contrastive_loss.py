from __future__ import annotations

import math

import pytest
import torch

import em3
from em3 import reference


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


@pytest.mark.parametrize("scale", [0.0, -1.0, 200.0])
def test_errors(scale):
    with pytest.raises(ValueError, match="init_logit_scale: was"):
        em3.ContentIDContrastiveLoss(init_logit_scale=scale)
