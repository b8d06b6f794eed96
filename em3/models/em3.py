"""``EM3``: the three parts around a ranking model, trained by the ranking loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batch
from ..jagged import Jagged
from ..layers import ContentIDContrastiveLoss, LoRATargetAttention, _given
from ..ops._means import mean_rows
from .mlp import mlp

GRADIENTS = ("both", "content", "id")
HISTORIES = ("frozen", "lora", "full")


class Losses(NamedTuple):
    """What a training step minimises, its parts, and the content that was computed on the way."""

    total: Tensor
    ranking: Tensor  # binary cross entropy
    contrast: Tensor  # 0 where there is no contrast
    content: Tensor  # [U, content_dim], of EM3.items(batch)


class EM3(nn.Module):
    """A ranking model, joined by its target's content and by what that content finds in the user's history.

    Per batch: the tokens of each distinct target item go through ``fusion`` to its content embedding ``c`` (with
    gradient); ``interest`` reads ``r`` out of the history's content embeddings in the bank (cached, without gradient),
    whose mean is ``m``; the ranker scores the rows with how these compare among its inputs, see :meth:`compare`; the loss
    is binary cross entropy plus ``contrast_weight`` times the content-ID contrast of the batch's items.

    The bank holds the content embedding of every item. After a training step ``write_back`` puts the batch's items into
    it; ``refresh`` recomputes all of it. Scoring reads targets from the bank
    too, so a new item is served as soon as it is filled in. It is a buffer: under ``DistributedDataParallel`` say
    ``broadcast_buffers=False``, lest every step copies the first rank's bank over the others'; what a rank writes back is then
    its own until all of them ``refresh``.

    ``history`` says how far the ranking loss reaches into the history. With ``"lora"`` it trains adapters on the
    projections of cached content. With ``"frozen"`` it does not: the projections of keys and values stay as they start.
    With ``"full"`` it trains the adapters, and ``fusion`` through the history too: in a training step the content of
    every history item is computed with gradient, each distinct item of targets and histories once, and the bank is not
    read. Scoring always reads it.

    Args:
        ranker: any module with ``forward(batch, extra [B, X]) -> logits [B]`` and ``item_embedding(item_id [K]) ->
            [K, V]``, built for ``X = EM3.extra_dim(content_dim)`` further dense features.
        fusion: tokens -> content, as :class:`em3.FusionQFormer`: a module that maps a list of streams to
            ``[U, content_dim]``. None for frozen two-stage features: the bank then holds them, of any width, and a
            network that is trained maps a target's to its content embedding.
        num_items: ``n`` of the catalogue.
        content_dim: width of the content embedding.
        bank_dim: width of the bank; ``content_dim`` unless ``fusion`` is None.
        num_heads: of the attention over the history.
        rank: of the LoRA adapters on its projections; 0 trains the projections themselves. Not used by ``"frozen"``.
        history: ``"frozen"``, ``"lora"`` or ``"full"``, which needs ``fusion``.
        pooling, top_k, position_buckets, time_buckets: of the attention over the history, as in
            :class:`em3.LoRATargetAttention`; with ``time_buckets`` batches must hold ``history_age``.
        id_dim: ``V``, the width of the ranker's item embedding, for the contrast; None for no contrast.
        contrast_weight: lambda.
        contrast_gradient: ``"both"``, or the side that the contrast trains: ``"content"`` or ``"id"``.

    Source: EM3 (arXiv 2404.06078).
    """

    def __init__(self, ranker: nn.Module, fusion: nn.Module | None, *, num_items: int, content_dim: int,
                 bank_dim: int | None = None, num_heads: int = 4, rank: int = 8, history: str = "lora",
                 pooling: str = "softmax", top_k: int | None = None, position_buckets: int = 0, time_buckets: int = 0,
                 id_dim: int | None = None, contrast_weight: float = 0.1, contrast_gradient: str = "both") -> None:  # fmt: skip
        super().__init__()
        if contrast_gradient not in GRADIENTS:
            raise ValueError(f"contrast_gradient: was {contrast_gradient!r}, must be one of {', '.join(GRADIENTS)}")
        for name, size in dict(num_items=num_items, content_dim=content_dim, bank_dim=bank_dim, id_dim=id_dim).items():
            if size is not None or name in ("num_items", "content_dim"):
                _given.size(name, size)
        for name, module in dict(ranker=ranker, fusion=fusion).items():
            if not isinstance(module, nn.Module) and not (module is None and name == "fusion"):
                raise ValueError(f"{name}: was {type(module).__name__}, must be a torch.nn.Module")
        _given.number("contrast_weight", contrast_weight)
        if not 0 <= contrast_weight < math.inf:
            raise ValueError(f"contrast_weight: was {contrast_weight}, must be at least 0 and finite")
        if history not in HISTORIES:
            raise ValueError(f"history: was {history!r}, must be one of {', '.join(HISTORIES)}")
        if history == "full" and fusion is None:
            raise ValueError("history: was 'full', must be 'frozen' or 'lora' for frozen features (fusion=None)")
        if fusion is not None and bank_dim not in (None, content_dim):
            raise ValueError(f"bank_dim: was {bank_dim}, must be {content_dim} like content_dim unless fusion is None")
        bank_dim = bank_dim or content_dim
        self.ranker: Any = ranker  # Any: of a module's own methods the type checker knows nothing
        self.fusion = fusion
        self.adapt = mlp(bank_dim, (2 * content_dim,), content_dim, 0.0) if fusion is None else None
        self.norm = nn.LayerNorm(content_dim)
        self.history = history
        self.interest = LoRATargetAttention(bank_dim, content_dim, num_heads=num_heads, rank=0 if history == "frozen" else rank,
                                            train_base=False if history == "frozen" else None, pooling=pooling, top_k=top_k,
                                            position_buckets=position_buckets, time_buckets=time_buckets)  # fmt: skip
        if bank_dim == content_dim:
            self._start_as_similarity()
        self.norm_interest = nn.LayerNorm(content_dim)
        self.contrast = self.to_id = None
        if id_dim is not None:
            self.contrast = ContentIDContrastiveLoss()
            self.to_id = nn.Linear(content_dim, id_dim)
        self.contrast_weight, self.contrast_gradient = contrast_weight, contrast_gradient
        self.bank: Tensor
        self.register_buffer("bank", torch.zeros(num_items, bank_dim))

    @staticmethod
    def extra_dim(content_dim: int, *, frozen: bool = False) -> int:
        """Width of the dense features that a ranker inside EM3 is given; ``frozen`` where ``fusion`` is None."""
        return (6 if frozen else 5) * content_dim + 1

    def _start_as_similarity(self) -> None:
        """The attention starts as content similarity, reading content as it is; LoRA adapts it from there."""
        with torch.no_grad():
            for weight in (self.interest.w_q, self.interest.w_k, self.interest.w_v, self.interest.w_o):
                nn.init.eye_(weight)

    def content(self, streams: Any) -> Tensor:
        """Tokens of ``U`` items -> their content embeddings ``[U, content_dim]``."""
        if self.fusion is None:
            raise ValueError("streams: were given to a model of frozen features (fusion=None), whose bank is filled as it is")
        return self.norm(self.fusion(streams))

    @property
    def caches_history(self) -> bool:
        """Whether a training step reads the history's content from the bank, which must then be kept fresh."""
        return self.history != "full"

    def items(self, batch: Batch) -> Tensor:
        """``[U]`` int64, ascending: the items whose tokens a training step reads, ``batch.distinct`` or, with
        ``history="full"``, those of the histories too."""
        return batch.distinct if self.caches_history else torch.nonzero(self._named(batch))[:, 0]

    def _named(self, batch: Batch) -> Tensor:
        """``[n]`` bool: the items that are a target or stand in a history."""
        named = torch.zeros(len(self.bank), dtype=torch.bool, device=batch.distinct.device)
        return named.index_fill_(0, batch.distinct, True).index_fill_(0, batch.history.values(), True)

    def sources(self, batch: Batch, content: Tensor, whole: Batch | None = None) -> tuple[Tensor, Jagged, Tensor]:
        """Where a training step finds its content, when that of ``items(whole)`` is ``content [U, C]``: the rows of
        ``batch.distinct``, and the histories as row numbers into the last. ``whole`` is the batch itself by default."""
        if self.caches_history:
            return content, batch.history, self.bank
        place = self._named(batch if whole is None else whole).cumsum(0) - 1  # [n], of each item in `content`
        history = Jagged(place.index_select(0, batch.history.values()), batch.history.offsets())
        return content.index_select(0, place.index_select(0, batch.distinct)), history, content

    def forward(self, batch: Batch, streams: Any = None) -> tuple[Tensor, Tensor]:
        """Logits ``[B]`` and content embeddings ``[U, content_dim]``.

        ``streams`` are the tokens of ``items(batch)``, whose content is returned; without them all content is read from
        the bank, and that of ``batch.distinct`` returned.
        """
        if streams is None:
            content = self._from_bank(batch.distinct)
            return self._logits(batch, content, batch.history, self.bank), content
        content = self.content(streams)
        items = len(self.items(batch))
        if len(content) != items:
            what = "batch.distinct" if self.caches_history else "items(batch)"
            raise ValueError(f"streams: were of {len(content)} items, must be of the {items} of {what}, in its order")
        return self.logits(batch, content), content

    def content_of(self, items: Tensor, streams: Any = None) -> Tensor:
        """Catalogue numbers ``[U]`` -> content embeddings ``[U, content_dim]``, of the items' tokens or out of the bank."""
        return self._from_bank(items) if streams is None else self.content(streams)

    def logits(self, batch: Batch, content: Tensor, whole: Batch | None = None) -> Tensor:
        """``[B]``, with the content of ``items(whole)`` at hand: of the batch itself, or of one that it is a part of."""
        return self._logits(batch, *self.sources(batch, content, whole))

    def _logits(self, batch: Batch, distinct: Tensor, history: Jagged, bank: Tensor) -> Tensor:
        target = distinct.index_select(0, batch.inverse)  # [B, C]
        found: Tensor = self.ranker(batch, self.compare(target, history, bank, batch.history_age))
        return found

    def compare(self, target: Tensor, history: Jagged, bank: Tensor | None = None, age: Tensor | None = None) -> Tensor:
        """Targets' content ``c [B, C]`` and their users' histories -> dense features ``[B, extra_dim(C)]``.

        A history is row numbers into ``bank [n, width of the bank]``, the model's own by default; ``age [T]`` is read by a
        model with ``time_buckets`` only.

        They are ``[c, r, c * r, |c - r|, c * m, log n]`` with ``r`` normalised in the first two places, and ``n`` the
        events of the history. On MovieTweetings (ID dropout 1, 2 epochs, valid) the last three, and ``m``, took the AUC from
        0.666 to 0.700: a network does not find out by itself that two embeddings are close. ``m`` itself adds nothing beside
        ``c * m``: as configured there, valid, seeds 0 and 1: 0.7339 and 0.7366 with it, 0.7359 and 0.7359 without; without
        ``r`` as well, seed 0: 0.7316. Frozen features do want it (test, seeds 0 and 1, 0.7096 and 0.7027 without, where five
        seeds have 0.7105 with it), so there ``m`` stands before ``c * m``. Without a history ``r`` and ``m`` are zero.
        """
        bank = self.bank if bank is None else bank
        ids, offsets = history.values(), history.offsets()
        length = offsets.diff()[:, None]  # [B, 1]
        read = self.interest(target, history, bank, age if self.interest.time_buckets else None)
        interest = self.norm_interest(read) * (length > 0)  # nor is the bias of the norm an interest
        mean = mean_rows(bank, offsets, ids)  # [B, C], 0 where none
        if self.adapt is not None:
            mean = self.adapt(mean) * (length > 0)
        count = length.clamp(min=1).to(target.dtype).log()
        of_mean = [target * mean] if self.adapt is None else [mean, target * mean]
        return torch.cat([target, interest, target * interest, (target - read).abs(), *of_mean, count], 1)

    def _from_bank(self, rows: Tensor) -> Tensor:
        row = self.bank.index_select(0, rows)
        return row if self.adapt is None else self.norm(self.adapt(row))

    def losses(self, batch: Batch, streams: Any = None) -> Losses:
        """The losses of a training step; ``streams`` as in ``forward``."""
        logits, content = self(batch, streams)
        ranking = F.binary_cross_entropy_with_logits(logits, batch.label.to(logits.dtype))
        if self.contrast is None:
            return Losses(ranking, ranking, ranking.new_zeros(()), content)
        contrast = self.contrast_of(batch, content if streams is None else self.sources(batch, content)[0])
        return Losses(ranking + self.contrast_weight * contrast, ranking, contrast, content)

    def contrast_of(self, batch: Batch, content: Tensor) -> Tensor:
        """The content-ID contrast over ``batch.distinct``, whose content is ``content [U, content_dim]``."""
        if self.contrast is None or self.to_id is None:
            raise ValueError("id_dim: was None, must be the width of the item embedding for a model with a contrast")
        # Each distinct item once, so that no item is its own negative; unseen ones have no ID embedding to align with.
        item_id = batch.distinct_id()
        seen = torch.nonzero(item_id)[:, 0]
        ours, theirs = content.index_select(0, seen), self.ranker.item_embedding(item_id.index_select(0, seen))
        if self.contrast_gradient == "content":
            theirs = theirs.detach()
        elif self.contrast_gradient == "id":
            ours = ours.detach()
        loss: Tensor = self.contrast(self.to_id(ours), theirs)
        return loss

    @torch.no_grad()
    def write_back(self, batch: Batch, content: Tensor) -> None:
        """Put the content of ``items(batch)`` into the bank: after ``backward``, which still reads the old rows."""
        self.bank.index_copy_(0, self.items(batch), content.detach().to(self.bank.dtype))

    @torch.no_grad()
    def refresh(self, read: Callable[[Tensor], Any], rows: Tensor | None = None, chunk: int = 1024) -> None:
        """Recompute the bank, or these rows of it, from the items' tokens; nothing is trained, dropout is off.

        Args:
            read: item numbers ``[U]`` int64 -> the streams of their tokens, as :meth:`TokenStore.read`.
            rows: catalogue numbers, all by default.
            chunk: items at a time.
        """
        training = [module for module in self.modules() if module.training]  # each may have a mode of its own
        self.eval()
        try:
            rows = torch.arange(len(self.bank)) if rows is None else rows
            for part in rows.split(chunk):
                self.bank.index_copy_(0, part.to(self.bank.device), self.content(read(part)).to(self.bank.dtype))
        finally:
            for module in training:
                module.training = True
