"""``contrastive_loss`` gives the numbers of the losses that it stands in for, each on its own settings.

The recipes are those of docs/contrast.md. A package that is not installed is skipped.
"""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import em3
from tests.ops.ranks import Ranks

B, V = 12, 16


def peer(name):
    """The module, or a skipped test that says why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package may fail in its own import in any way
        pytest.skip(f"{name} cannot be imported: {' '.join(str(error).split())}")


def embeddings():
    x = torch.randn(B, V, requires_grad=True)
    return x, (x.detach() + torch.randn(B, V)).requires_grad_()


def agree(ours, theirs, *leaves):
    """The same value and the same gradients."""
    torch.testing.assert_close(ours, theirs)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_open_clip():
    open_clip = peer("open_clip.loss")
    x, y = embeddings()
    scale = torch.tensor(14.0, requires_grad=True)
    theirs = open_clip.ClipLoss()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale)
    agree(em3.ops.contrastive_loss(x, y, logit_scale=scale), theirs, x, y, scale)


def test_open_clip_sigmoid():
    open_clip = peer("open_clip.loss")
    x, y = embeddings()
    scale, bias = (torch.tensor(n, requires_grad=True) for n in (10.0, -10.0))
    theirs = open_clip.SigLipLoss()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, bias)
    ours = em3.ops.contrastive_loss(x, y, logit_scale=scale, logit_bias=bias, kind="sigmoid")
    agree(ours, theirs, x, y, scale, bias)


def _gathered(memory, group, x, y):
    """open_clip's loss of gathered embeddings beside ours of the group: value and gradients of this rank."""
    import open_clip.loss

    theirs = open_clip.loss.ClipLoss(gather_with_grad=True, rank=dist.get_rank(group), world_size=dist.get_world_size(group))
    found = []
    for loss in (theirs, functools.partial(_ours, group)):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        value = loss(*(F.normalize(t, dim=-1) for t in leaves), torch.tensor(14.0))
        found.append((value.detach(), torch.autograd.grad(value, leaves)))
    return found


def _ours(group, x, y, scale):
    return em3.ops.contrastive_loss(x, y, logit_scale=scale, group=group)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_open_clip_gathered(tmp_path):
    peer("open_clip.loss")
    ranks = Ranks(2, str(tmp_path / "store"))
    try:
        x, y = (t.detach() for t in embeddings())
        answers = ranks.run(_gathered, list(zip(x.split(B // 2), y.split(B // 2), strict=True)))
    finally:
        ranks.close()
    mean = [sum(values) / 2 for values in zip(*([value for value, _ in found] for found in answers), strict=True)]
    torch.testing.assert_close(mean[1], mean[0])
    for theirs, ours in answers:
        for other, mine in zip(theirs[1], ours[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_sentence_transformers():
    losses = peer("sentence_transformers.losses")
    x, y = embeddings()
    negatives = torch.randn(B, V, requires_grad=True)
    loss = losses.MultipleNegativesRankingLoss(nn.Identity(), scale=20.0)
    theirs = loss.compute_loss_from_embeddings([x, y, negatives], None)
    ours = em3.ops.contrastive_loss(x, y, negatives=negatives, logit_scale=20.0, direction="content_to_id")
    agree(ours, theirs, x, y, negatives)


def test_pytorch_metric_learning():
    losses = peer("pytorch_metric_learning.losses")
    x, y = embeddings()
    labels = torch.arange(B)
    theirs = losses.NTXentLoss(temperature=0.1)(x, labels, ref_emb=y, ref_labels=labels.clone())
    agree(em3.ops.contrastive_loss(x, y, logit_scale=10.0, direction="content_to_id"), theirs, x, y)


def test_sampled_softmax_with_log_q():
    """TFRS's Retrieval task with candidate ids, sampling probabilities and accidental hits removed, as it writes it."""
    x, y = embeddings()
    items, weight = torch.randint(6, (B,)), torch.rand(B)
    log_q = torch.rand(6).log()[items]
    scores = x @ y.T / 0.5 - log_q
    scores = scores + (torch.finfo(torch.float32).min / 100) * ((items[:, None] == items) & ~torch.eye(B, dtype=torch.bool))
    theirs = (weight * F.cross_entropy(scores, torch.arange(B), reduction="none")).sum()
    ours = em3.ops.contrastive_loss(
        x, y, item_ids=items, log_q=log_q, weight=weight, logit_scale=2.0, normalize=False, direction="content_to_id", reduction="sum",
    )  # fmt: skip
    agree(ours, theirs, x, y)
