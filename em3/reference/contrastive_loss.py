"""``contrastive_loss`` as the papers write it: the whole matrix of logits, and a logsumexp over its rows and columns, or a
sigmoid of each; and how a positive ranks in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(content, ids_embedding, *, item_ids=None, duplicates="mask", logit_scale, logit_bias=None, log_q=None,
                     weight=None, negatives=None, kind="infonce", label_smoothing=0.0, direction="both",
                     reduction="mean", normalize=True) -> Tensor:  # fmt: skip
    b = content.shape[0]
    own, same = _items(b, item_ids, content)
    positive = same if duplicates == "positive" else own

    def one_way(logits: Tensor) -> Tensor:
        further = positive.new_zeros(b, logits.shape[1] - b)
        candidate = torch.cat([~(same & ~own) if duplicates == "mask" else torch.ones_like(same), ~further], 1)
        target = torch.cat([positive, further], 1)
        if kind == "sigmoid":
            margins = torch.where(target, logits + logit_bias, -logits - logit_bias)
            return -(F.logsigmoid(margins) * candidate).sum(1)
        target, share = (t / t.sum(1, keepdim=True, dtype=logits.dtype) for t in (target, candidate))
        target = (1 - label_smoothing) * target + label_smoothing * share
        return logits.masked_fill(~candidate, -torch.inf).logsumexp(1) - (logits * target).sum(1)

    ways = _logits(content, ids_embedding, logit_scale, log_q, negatives, direction, normalize)
    loss = torch.stack([one_way(logits) for logits in ways]).mean(0)  # [B]
    weight = torch.ones_like(loss) if weight is None else weight
    if reduction == "none":
        return weight * loss
    total, mass = (weight * loss).sum(), weight.sum()
    if reduction == "sum":
        return total
    return total / mass if mass else 0 * total  # a mean over nothing: no gradient either


def contrastive_metrics(content, ids_embedding, *, item_ids=None, duplicates="mask", logit_scale, log_q=None, weight=None,
                        negatives=None, direction="both", normalize=True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The share of rows whose positive is the best candidate, and the mean rank of the positive, 1 for the best."""
    b = content.shape[0]
    own, same = _items(b, item_ids, content)
    first, ranks = [], []
    for logits in _logits(content, ids_embedding, logit_scale, log_q, negatives, direction, normalize):
        out = torch.cat([own if duplicates == "keep" else same, own.new_zeros(b, logits.shape[1] - b)], 1)
        others, positive = logits.masked_fill(out, -torch.inf), logits.diagonal()[:, None]
        first.append((others < positive).all(1).double())
        ranks.append(1 + (others > positive).double().sum(1) + (others == positive).double().sum(1) / 2)
    weight = torch.ones(b).to(ranks[0]) if weight is None else weight.double()
    mass = weight.sum()
    return tuple((weight * torch.stack(of).mean(0)).sum() / (mass if mass else 1) for of in (first, ranks))


def _items(b, item_ids, like) -> tuple[Tensor, Tensor]:
    own = torch.eye(b, dtype=torch.bool, device=like.device)
    return own, own if item_ids is None else item_ids[:, None] == item_ids


def _logits(content, ids_embedding, logit_scale, log_q, negatives, direction, normalize) -> list[Tensor]:
    """``[B, B + K]`` of content to ID, ``[B, B]`` of ID to content, as asked for; without a bias."""
    b, v = content.shape
    extra = content.new_empty(0, v) if negatives is None else negatives  # [K, V]
    if normalize:
        content, ids_embedding, extra = (unit(t) for t in (content, ids_embedding, extra))
    correction = content.new_zeros(b) if log_q is None else log_q
    ways = []
    if direction in ("both", "content_to_id"):
        ways.append(torch.cat([logit_scale * content @ ids_embedding.T - correction, logit_scale * content @ extra.T], 1))
    if direction in ("both", "id_to_content"):
        ways.append(logit_scale * ids_embedding @ content.T - correction)
    return ways


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; one no longer than 1e-12 counts as zero: it becomes the zero vector, and its gradient is zero."""
    norm = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norm > 1e-12, norm, torch.inf)
