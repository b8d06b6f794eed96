"""The formulas of ``contrastive_loss`` around its operator: what is one number a row, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _contrastive_kinds as kinds
from ._contrastive_scope import Scope

KINDS = ("infonce", "sigmoid")
DIRECTIONS = ("both", "content_to_id", "id_to_content")


class Batch(NamedTuple):
    """What is contrasted: checked, widened, normalised."""

    x: Tensor  # [B, V], content
    y: Tensor  # [B, V], ID embeddings
    extra: Tensor | None  # [K, V]
    scale: Tensor  # [], float64
    bias: Tensor | None  # [], float64; of the kind "sigmoid" only
    item_ids: Tensor | None  # [B]
    log_q: Tensor | None  # [B]
    duplicates: str
    direction: str
    kind: str
    smoothing: float

    @property
    def asked(self) -> list[bool]:
        """Whether the rows' and the columns' direction is asked for."""
        return [self.direction in ("both", way) for way in DIRECTIONS[1:]]

    @property
    def candidates(self) -> Tensor:
        """``[M, V]``, M = B + K."""
        return self.y if self.extra is None else torch.cat([self.y, self.extra])

    @property
    def offset(self) -> Tensor | None:
        """``[M]``: what a candidate's logit is corrected by."""
        if self.log_q is None or self.extra is None:
            return None if self.log_q is None else -self.log_q
        return torch.cat([-self.log_q, self.log_q.new_zeros(self.extra.shape[0])])

    @property
    def masked(self) -> Tensor | None:
        return self.item_ids if self.duplicates == "mask" else None

    def ways(self, *pairs: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of the two directions' pairs of tensors those that are asked for."""
        return [pair for pair, asked in zip(pairs, self.asked, strict=True) if asked]

    def positive(self) -> Tensor:
        """``L_ii [B]``, without the bias."""
        x, y = self.x, self.y
        if self.duplicates == "positive":
            # Here the positives cancel each other; where all rows are one item, all but entirely.
            x, y = x.double(), y.double()
        found = self.scale * (x * y).sum(-1, dtype=self.scale.dtype)
        return found if self.log_q is None else found - self.log_q


def losses(batch: Batch, scope: Scope, request: str) -> Tensor:
    """``loss_i [B]``, the mean over the directions that are asked for."""
    return infonce(batch, scope, request) if batch.kind == "infonce" else sigmoid(batch, scope, request)


def infonce(batch: Batch, scope: Scope, request: str) -> Tensor:
    """``loss_i [B]``, from the logsumexp over the *other* candidates ``n_i``.

    With the positive's logit ``p_i``, ``logsumexp(p_i, n_i) - p_i = log(1 + exp(n_i - p_i))``. Here the positive cancels
    exactly, so that a loss of 1e-4 keeps its digits where logits are near 100. What other targets than the positive alone
    add is linear in the logits: means over positives and over candidates, which take no matrix. The positive comes first, so
    that in the backward, where it comes last, its gradients are not there while the matrix's are made.
    """
    positive = batch.positive()
    found = scope.sums(
        kinds.INFONCE, batch.x, batch.candidates, batch.scale, None, batch.masked, batch.offset, batch.asked, request
    )
    # At the threshold log(1 + e^40) is 40 in float64 too; the default of 20 is off by 2e-9.
    ways = [F.softplus(n - positive, threshold=40) for n, asked in zip(found, batch.asked, strict=True) if asked]
    loss = sum(ways[1:], ways[0]) / len(ways)
    if batch.duplicates == "positive":
        loss = loss + (1 - batch.smoothing) * _over_positives(batch, scope)
    return loss + batch.smoothing * _over_candidates(batch, scope) if batch.smoothing else loss


def sigmoid(batch: Batch, scope: Scope, request: str) -> Tensor:
    """``loss_i [B]``: the row's own pair, and the sum over all others."""
    assert batch.bias is not None
    kind = kinds.SIGMOID_POSITIVE if batch.duplicates == "positive" else kinds.SIGMOID
    item_ids = None if batch.duplicates == "keep" else batch.item_ids
    own = F.softplus(-(batch.positive() + batch.bias), threshold=40)  # first, as in infonce()
    found = scope.sums(
        kind, batch.x, batch.candidates, batch.scale, batch.bias, item_ids, batch.offset, batch.asked, request
    )
    ways = [others for others, asked in zip(found, batch.asked, strict=True) if asked]
    return own + sum(ways[1:], ways[0]) / len(ways)


def _over_positives(batch: Batch, scope: Scope) -> Tensor:
    """``[B]``: by how much the positive's logit is over the mean logit of all positives, a mean over the directions."""
    assert batch.item_ids is not None
    x, y = batch.x.double(), batch.y.double()
    pairs = batch.ways((x, y), (y, x))
    parts = [others for _, others in pairs] + ([] if batch.log_q is None else [batch.log_q[:, None].double()])
    ones = torch.ones_like(batch.item_ids, dtype=torch.float64)[:, None]
    sums = scope.item_sums(torch.cat([*parts, ones], 1), batch.item_ids)
    means = (sums[:, :-1] / sums[:, -1:]).split([part.shape[1] for part in parts], 1)
    of_log_q = None if batch.log_q is None else means[-1]
    ways = [_over_mean(batch, pair, mean, of_log_q) for pair, mean in zip(pairs, means, strict=False)]
    return sum(ways[1:], ways[0]) / len(ways)


def _over_candidates(batch: Batch, scope: Scope) -> Tensor:
    """``[B]``: by how much the positive's logit is over the mean logit of all candidates, a mean over the directions.

    The candidates' sum is that over everything, ``[V]``; where items are masked, it is that less the item's, ``[B, V]``, and
    the positive apart: a row whose item is the whole batch then has exactly nothing to be over.
    """
    (b, v), extra = batch.x.shape, batch.extra
    pairs = batch.ways((batch.x, batch.y), (batch.y, batch.x))
    log_q = batch.x.new_zeros(b) if batch.log_q is None else batch.log_q
    parts = [*(others for _, others in pairs), log_q[:, None], batch.x.new_ones(b, 1)]
    further = batch.x.new_zeros(v + 1, dtype=torch.float64)  # the sum of the extra negatives, and how many there are
    if extra is not None:
        further = torch.cat([extra.sum(0, dtype=torch.float64), further.new_full((1,), extra.shape[0])])
    widths = [part.shape[1] for part in parts]
    total = scope.total(torch.cat([*(part.sum(0, dtype=torch.float64) for part in parts), further]))
    sums, further = total.split([sum(widths), v + 1])
    if batch.masked is not None:
        sums = sums - scope.item_sums(torch.cat(parts, 1), batch.masked)
    *vectors, of_log_q, count = sums.split(widths, -1)
    ways = []
    for i, (pair, vector) in enumerate(zip(pairs, vectors, strict=True)):
        n = count
        if i == 0 and batch.asked[0]:  # content_to_id
            vector, n = vector + further[:v], count + further[v:]
        over = _over_mean(batch, pair, vector / n.clamp(min=1), of_log_q / n.clamp(min=1))
        ways.append(over if batch.masked is None else over * (n / (n + 1)).squeeze(1))
    return sum(ways[1:], ways[0]) / len(ways)


def _over_mean(batch: Batch, pair: tuple[Tensor, Tensor], mean: Tensor, of_log_q: Tensor | None) -> Tensor:
    """``[B]``: the logit of each anchor with its other less that with ``mean``, ``[B, V]`` or ``[V]``.

    ``of_log_q`` is the mean ``log_q`` that goes with it, ``[B, 1]`` or ``[1]``.
    """
    anchors, others = pair
    over = batch.scale * (anchors * (others - mean.to(others.dtype))).sum(-1, dtype=torch.float64)
    return over if batch.log_q is None or of_log_q is None else over - (batch.log_q - of_log_q.squeeze(-1))


class _Unit(torch.autograd.Function):
    """Division by the norm as one step of autograd, which else keeps more and makes more of the size of the rows: forward and
    backward of [2048, 64] took 0.22 ms against 0.43, of [16384, 128] 4.3 against 13.3 (one thread), before the norm was one in
    float64, which takes 1.1 ms of the latter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)  # squares of 1e20 are no float32
        inverse = torch.where(norm > 1e-12, 1 / norm, 0).to(rows.dtype)
        found = rows * inverse
        ctx.save_for_backward(found, inverse)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found, inverse = ctx.saved_tensors
        return torch.addcmul(grad, found, (found * grad).sum(-1, keepdim=True), value=-1).mul_(inverse)


def unit(rows: Tensor) -> Tensor:
    """Rows of norm 1; those of norm 0 stay, and take no gradient."""
    found: Tensor = _Unit.apply(rows)
    return found


def reduced(loss: Tensor, weight: Tensor | None, reduction: str, scope: Scope) -> Tensor:
    if weight is not None:
        loss = weight * loss
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    own = loss.sum() if scope.ranks == 1 else loss.sum() * scope.ranks
    if weight is None:
        rows = scope.rows
        return own / (rows.clamp(min=1) if isinstance(rows, Tensor) else max(1, rows))
    mass = scope.total(weight.sum())
    return own / torch.where(mass == 0, torch.inf, mass)
