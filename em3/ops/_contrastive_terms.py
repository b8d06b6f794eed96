"""The formulas of ``contrastive_loss`` around its operator: what is one number a row, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._contrastive_scope import Scope

DIRECTIONS = ("both", "content_to_id", "id_to_content")


class Batch(NamedTuple):
    """What is contrasted: checked, widened, normalised."""

    x: Tensor  # [B, V], content
    y: Tensor  # [B, V], ID embeddings
    extra: Tensor | None  # [K, V]
    scale: Tensor  # [], float64
    item_ids: Tensor | None  # [B]
    log_q: Tensor | None  # [B]
    duplicates: str
    direction: str

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

    def positive(self) -> Tensor:
        """``L_ii [B]``."""
        x, y = self.x, self.y
        if self.duplicates == "positive":
            # Here the positives cancel each other; where all rows are one item, all but entirely.
            x, y = x.double(), y.double()
        found = self.scale * (x * y).sum(-1, dtype=self.scale.dtype)
        return found if self.log_q is None else found - self.log_q


def infonce(batch: Batch, scope: Scope, request: str) -> Tensor:
    """``loss_i [B]``, from the logsumexp over the *other* candidates ``n_i``.

    With the positive's logit ``p_i``, ``logsumexp(p_i, n_i) - p_i = log(1 + exp(n_i - p_i))``. Here the positive cancels
    exactly, so that a loss of 1e-4 keeps its digits where logits are near 100.
    """
    found = scope.statistics(
        batch.x, batch.candidates, batch.scale, batch.masked, batch.offset, batch.asked, request
    )
    positive = batch.positive()
    # At the threshold log(1 + e^40) is 40 in float64 too; the default of 20 is off by 2e-9.
    ways = [F.softplus(n - positive, threshold=40) for n, asked in zip(found, batch.asked, strict=True) if asked]
    loss = sum(ways[1:], ways[0]) / len(ways)
    return loss + _excess(batch, scope) if batch.duplicates == "positive" else loss


def _excess(batch: Batch, scope: Scope) -> Tensor:
    """``[B]``: by how much the positive's logit is over the mean logit of all positives, a mean over the directions."""
    assert batch.item_ids is not None
    x, y = batch.x.double(), batch.y.double()
    pairs = [pair for pair, asked in zip(((x, y), (y, x)), batch.asked, strict=True) if asked]  # anchors, others
    parts = [others for _, others in pairs] + ([] if batch.log_q is None else [batch.log_q[:, None].double()])
    means = _item_means(parts, batch.item_ids, scope)
    spread = [(anchors * (others - mean)).sum(-1) for (anchors, others), mean in zip(pairs, means, strict=False)]
    excess = batch.scale * sum(spread[1:], spread[0]) / len(spread)
    return excess if batch.log_q is None else excess - (parts[-1] - means[-1]).squeeze(1)


def _item_means(parts: list[Tensor], item_ids: Tensor, scope: Scope) -> list[Tensor]:
    """``[B, F]`` each: in place of each row the mean of the rows of its item."""
    ones = torch.ones_like(item_ids, dtype=torch.float64)[:, None]
    sums = scope.item_sums(torch.cat([*parts, ones], 1), item_ids)
    return list((sums[:, :-1] / sums[:, -1:]).split([part.shape[1] for part in parts], 1))


def unit(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norm > 1e-12, norm, torch.inf)


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
