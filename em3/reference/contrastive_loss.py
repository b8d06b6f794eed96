"""``contrastive_loss`` as the papers write it: the whole matrix of logits, and a logsumexp over its rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_loss(content, ids_embedding, *, item_ids=None, duplicates="mask", logit_scale, log_q=None, weight=None,
                     negatives=None, direction="both", reduction="mean", normalize=True) -> Tensor:  # fmt: skip
    b, v = content.shape
    extra = content.new_empty(0, v) if negatives is None else negatives  # [K, V]
    if normalize:
        content, ids_embedding, extra = (unit(t) for t in (content, ids_embedding, extra))
    correction = content.new_zeros(b) if log_q is None else log_q
    own = torch.eye(b, dtype=torch.bool, device=content.device)
    same = own if item_ids is None else item_ids[:, None] == item_ids

    def one_way(anchors: Tensor, others: Tensor, extra: Tensor) -> Tensor:
        corrected = logit_scale * anchors @ others.T - correction  # [B, B]
        candidates = corrected.masked_fill(same & ~own, -torch.inf) if duplicates == "mask" else corrected
        candidates = torch.cat([candidates, logit_scale * anchors @ extra.T], 1)  # [B, B + K]
        positive = same if duplicates == "positive" else own
        return candidates.logsumexp(1) - (corrected * positive).sum(1) / positive.sum(1)

    ways = []
    if direction in ("both", "content_to_id"):
        ways.append(one_way(content, ids_embedding, extra))
    if direction in ("both", "id_to_content"):
        ways.append(one_way(ids_embedding, content, extra[:0]))
    loss = torch.stack(ways).mean(0)  # [B]

    weight = torch.ones_like(loss) if weight is None else weight
    if reduction == "none":
        return weight * loss
    total, mass = (weight * loss).sum(), weight.sum()
    return total if reduction == "sum" or mass == 0 else total / mass


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; one no longer than 1e-12 counts as zero: it becomes the zero vector, and its gradient is zero."""
    norm = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norm > 1e-12, norm, torch.inf)
