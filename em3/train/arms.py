"""The arms of a run: the same ranker with IDs alone, with frozen content, with EM3, and with parts of EM3 left out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..layers import FusionQFormer, MeanTokens
from ..layers.mean_tokens import mean_tokens
from ..models import DIN, EM3, DCNv2
from ..models.em3 import Losses
from .catalogue_tokens import LiveTokens
from .config import Config
from .report import summary

# What the report calls them.
NAMES = {
    "id_only": summary.ID_ONLY,
    "two_stage": summary.TWO_STAGE,
    "em3": summary.EM3,
    "em3_mean_tokens": "EM3, mean of tokens",
    "em3_no_lora": "EM3 without LoRA",
    "em3_no_contrast": "EM3 without contrast",
}


class IDOnly(nn.Module):
    """A ranker alone, with the methods that a training calls."""

    def __init__(self, ranker: nn.Module) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, batch: Batch) -> tuple[Tensor, None]:
        return self.ranker(batch), None

    def logits(self, batch: Batch, content: None, whole: Batch) -> Tensor:
        found: Tensor = self.ranker(batch)
        return found

    def losses(self, batch: Batch, streams: None) -> Losses:
        loss = F.binary_cross_entropy_with_logits(self.ranker(batch), batch.label)
        return Losses(loss, loss, loss.new_zeros(()), loss.new_empty(0, 0))


class WithEncoders(nn.Module):
    """EM3 on tokens that its encoders make at every step, so that the ranking loss reaches into them."""

    def __init__(self, model: EM3, tokens: LiveTokens) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens
        self.losses, self.items, self.write_back = model.losses, model.items, model.write_back
        self.caches_history = model.caches_history

    def refresh(self, read: Any) -> None:
        was = self.training
        self.eval()
        self.model.refresh(read)
        self.train(was)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        scores: tuple[Tensor, Tensor] = self.model(batch)
        return scores


def frozen_features(read: Any, num_items: int, chunk: int = 2048) -> Tensor:
    """``[n, sum of C_m]``: the mean tokens of every item, standardised over the items that have any."""
    parts = torch.arange(num_items).split(chunk)
    rows = torch.cat([torch.cat([mean for mean, _ in mean_tokens(read(part))], 1) for part in parts])
    present = rows != 0
    count = present.sum(0).clamp(min=1)
    mean = rows.sum(0) / count
    spread = (((rows - mean) * present).square().sum(0) / count).sqrt()
    return (rows - mean) * present / spread.clamp(min=1e-6)


def reads_tokens(arm: str) -> bool:
    """Whether a training of the arm reads tokens at every step."""
    return arm not in ("id_only", "two_stage")


def build(arm: str, config: Config, batches: Batches, token_dims: list[int], features: Tensor | None) -> IDOnly | EM3:
    """The untrained model of an arm; draws from torch's random state.

    Args:
        arm: one of ``config.ARMS``.
        token_dims: ``C_m`` of the token streams.
        features: of :func:`frozen_features`, for ``two_stage``.
    """
    model, (num_users, num_items) = config.model, batches.num_ids
    content = arm != "id_only"
    extra = EM3.extra_dim(model.content_dim, frozen=arm == "two_stage") if content else 0
    ranker = {"din": DIN, "dcnv2": DCNv2}[model.ranker](
        num_users, num_items, dim=model.id_dim, extra_dim=extra,
        hidden=tuple(model.hidden), dropout=model.dropout,
        id_dropout=model.content_id_dropout if content else model.id_dropout,
    )  # fmt: skip
    if not content:
        return IDOnly(ranker)
    fusion: nn.Module | None = None
    if arm == "em3_mean_tokens":
        fusion = MeanTokens(token_dims, model.content_dim)
    elif arm != "two_stage":
        fusion = FusionQFormer(
            token_dims, model.dim, num_queries=model.num_queries, num_layers=model.num_layers,
            num_heads=model.num_heads, out_dim=model.content_dim, ffn_dim=model.ffn_dim, mean_residual=True,
        )  # fmt: skip
    frozen = fusion is None
    em3 = EM3(
        ranker, fusion, num_items=num_items - 1, content_dim=model.content_dim,
        bank_dim=sum(token_dims) if frozen else None, num_heads=model.num_heads,
        # Frozen features are no content embeddings yet: the two-stage arm learns the whole projection.
        rank=0 if frozen else model.rank,
        history="lora" if frozen else "frozen" if arm == "em3_no_lora" else model.history,
        pooling=model.pooling, top_k=model.top_k, position_buckets=model.position_buckets, time_buckets=model.time_buckets,
        id_dim=None if frozen or arm == "em3_no_contrast" else model.id_dim,
        contrast_weight=model.contrast_weight, contrast_gradient=model.contrast_gradient,
    )  # fmt: skip
    if frozen:
        if features is None:
            raise ValueError("features: was None, must be given for the arm two_stage")
        em3.bank.copy_(features)
    return em3
