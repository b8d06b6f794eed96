"""``contrastive_metrics``: how well the contrast tells a batch's items apart, for monitoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _checks
from . import _contrastive_checks as check
from ._contrastive_scope import Alone, Scope
from ._contrastive_terms import Batch
from .contrastive_loss import plain, prepared, shared, widened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ContrastiveMetrics(NamedTuple):
    """Two numbers without gradient, float64."""

    accuracy: Tensor  # [], the share of rows whose positive is above every other candidate
    mean_rank: Tensor  # [], of the positive among its candidates: 1 is above all of them


@torch.no_grad()
def contrastive_metrics(content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                        duplicates: str = "mask", logit_scale: float | Tensor, log_q: Tensor | None = None,
                        weight: Tensor | None = None, negatives: Tensor | None = None, direction: str = "both",
                        normalize: bool = True, group: ProcessGroup | None = None) -> ContrastiveMetrics:  # fmt: skip
    """Accuracy@1 and the mean rank of the positive, over the logits of :func:`em3.ops.contrastive_loss`.

    The rank of row ``i`` is 1, plus the candidates ``j`` with ``L_ij > L_ii``, plus half of those with ``L_ij = L_ii``; it
    is first if there are neither, so that embeddings which have all become the same score 0 and not 1. Other rows of the
    row's item are no candidates, unless they are negatives of the loss (``duplicates="keep"``). Both numbers are means
    over the rows by ``weight``, 0 where its sum is 0, and averages of the two directions under ``"both"``. They hold for
    both kinds of the loss: a bias moves no rank. Logits are computed in float32 (float64 for float64), and equal are those
    that its rounding could not tell from the positive's, ``4 sqrt(V)`` units of the product of the row's lengths.

    A row whose positive is NaN makes both numbers NaN.

    It is a function of its own so that a step which asks for no metrics pays nothing. Called, it makes the logits once
    more, tile by tile, in two to three times the time of the loss's forward: call it every so many steps.

    Args:
        content, ids_embedding, item_ids, duplicates, logit_scale, log_q, weight, negatives, direction, normalize: as in
            :func:`em3.ops.contrastive_loss`. ``logit_scale`` matters beside ``log_q`` only.
        group: as there: the metrics are then those of the batch of all ranks, on each of them, and the call is a collective.

    Returns:
        ``(accuracy, mean_rank)``, tensors without dimensions, float64, without gradient.

    Raises:
        ValueError, RuntimeError: as :func:`em3.ops.contrastive_loss`.
    """
    _checks.outside_transforms("contrastive_metrics")
    check.embeddings(content, ids_embedding, negatives)
    if _checks.autocast_is_on(content.device):
        content, ids_embedding, negatives = (widened(t, content) for t in (content, ids_embedding, negatives))
    check.tensors(content, ids_embedding, item_ids, logit_scale, None, log_q, weight, negatives)
    check.options(item_ids is not None, negatives is not None, duplicates, direction, normalize)
    batch = prepared(
        content, ids_embedding, item_ids, logit_scale, None, log_q, negatives, duplicates, direction, "infonce", 0.0,
        normalize,
    )  # fmt: skip
    weight = widened(weight, content)
    scope: Scope = Alone(content.shape[0])
    if group is None:
        check.weights(weight)
    else:
        options = dict(duplicates=duplicates, direction=direction, normalize=normalize, metrics=True)
        options |= plain(logit_scale=logit_scale)
        batch, scope = shared(group, batch, weight, options)
    positive = _between(batch)
    found = scope.above(
        batch.x, batch.candidates, batch.scale, None if duplicates == "keep" else batch.item_ids, batch.offset,
        *(positive if asked else None for asked in batch.asked),
    )  # fmt: skip
    above = torch.stack([of for of, asked in zip(found, batch.asked, strict=True) if asked])  # [1 or 2, B]
    above = above.masked_fill(positive.isnan().any(1), torch.nan)
    weight = torch.ones_like(above[0]) if weight is None else weight.double()
    best = torch.where(above.isnan(), above, (above == 0).double())
    means = torch.stack([best.mean(0), above.mean(0) + 1, torch.ones_like(above[0])])  # [3, B]
    first, ranks, mass = scope.total((means * weight).sum(1)).unbind()
    mass = torch.where(mass == 0, torch.inf, mass)
    return ContrastiveMetrics(first / mass, ranks / mass)


def _between(batch: Batch) -> Tensor:
    """``[B, 2]``: the least and the largest logit that rounding could make of the positive's."""
    exact = batch._replace(duplicates="mask").positive()
    lengths = [torch.linalg.vector_norm(rows, dim=-1).double() for rows in (batch.x, batch.y)]
    product = 4 * batch.x.shape[1] ** 0.5 * batch.scale.abs() * lengths[0] * lengths[1]
    off = torch.finfo(batch.x.dtype).eps * (product if batch.log_q is None else product - 4 * batch.log_q)
    return torch.stack([exact - off, exact + off], 1).to(batch.x.dtype)
