"""``FusionQFormer``: a few trainable queries fuse the tokens of several modalities into one content embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..jagged import Jagged
from ..ops import _checks
from ..ops.qformer_attention import batch_of, parse
from . import _given
from .mean_tokens import MeanTokens
from .qformer_attention import QFormerAttention


class FusionQFormer(nn.Module):
    """Tokens of ``M`` modality streams -> one content embedding an item.

    Each layer lets the queries attend to each other, in every ``cross_every``-th layer to the tokens of all streams
    under one softmax, and passes them through a feed-forward block. The queries of the last layer, normalised and side
    by side, are projected to the embedding. An item without a token in any stream still gets a (constant) embedding.

    With ``mean_residual`` a projection of each stream's mean token is added: what all tokens say together is there from
    the first step, and the queries learn what is left. Queries that start at random dilute a short text among the
    patches of a picture, and are slow to find out which tokens matter.

    Args:
        token_dims: ``C_m`` of each stream.
        dim: ``D``, the width of the queries.
        num_queries: ``Q``.
        num_layers: at least 1.
        num_heads: ``H``; divides ``dim``.
        out_dim: width of the embedding, ``dim`` by default.
        ffn_dim: inner width of the feed-forward block, ``4 * dim`` by default.
        cross_every: the first of each so many layers reads the tokens (BLIP-2: 2).
        norm: ``"pre"`` or ``"post"``: LayerNorm before each block, or after its residual sum (BLIP-2).
        norm_eps: of every LayerNorm (BLIP-2: 1e-12).
        query_norm: whether the queries pass a LayerNorm, and dropout, before the first layer (BLIP-2).
        final_norm: whether they pass one behind the last layer (BLIP-2: not, its layers end in one).
        dropout: of each block's output, in training.
        attention_dropout: of the attention weights, among the queries and on the tokens, in training.
        mean_residual: whether :class:`em3.layers.MeanTokens` of the streams is added to the embedding.
        strategy, backend: as in :func:`em3.ops.qformer_attention`.

    Raises:
        ValueError: naming the argument, what it was and what it must be.

    Source: Q-Former (BLIP-2, arXiv 2301.12597, section 3.1), used over several modalities by EM3 (arXiv 2404.06078).
    """

    def __init__(self, token_dims: Sequence[int], dim: int, *, num_queries: int, num_layers: int = 1, num_heads: int = 4,
                 out_dim: int | None = None, ffn_dim: int | None = None, cross_every: int = 1, norm: str = "pre",
                 norm_eps: float = 1e-5, query_norm: bool = False, final_norm: bool = True,
                 dropout: float = 0.0, attention_dropout: float = 0.0, mean_residual: bool = False,
                 strategy: str = "auto", backend: str | None = None) -> None:  # fmt: skip
        super().__init__()
        _given.heads(num_heads, dim)
        out_dim, ffn_dim = dim if out_dim is None else out_dim, 4 * dim if ffn_dim is None else ffn_dim
        counts = dict(num_queries=num_queries, num_layers=num_layers, cross_every=cross_every, out_dim=out_dim, ffn_dim=ffn_dim)
        for name, value in counts.items():
            _given.size(name, value)
        for name, share in dict(dropout=dropout, attention_dropout=attention_dropout).items():
            _checks.probability(share, name)
        if norm not in ("pre", "post"):
            raise ValueError(f"norm: was {norm!r}, must be 'pre' or 'post'")
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.query = nn.Parameter(torch.empty(num_queries, dim))
        self.norm_query = nn.LayerNorm(dim, norm_eps) if query_norm else None
        self.layers = nn.ModuleList(
            FusionLayer(
                token_dims if i % cross_every == 0 else None, dim, num_heads, ffn_dim, norm, norm_eps,
                dropout, attention_dropout, strategy, backend,
            )
            for i in range(num_layers)
        )  # fmt: skip
        # After post-norm layers this is the last of theirs once more, which costs nothing that could be measured.
        self.norm = nn.LayerNorm(dim, norm_eps) if final_norm else nn.Identity()
        self.out = nn.Linear(num_queries * dim, out_dim)
        self.mean = MeanTokens(token_dims, out_dim) if mean_residual else None
        nn.init.normal_(self.query, std=dim**-0.5)

    def queries(self, streams: Any, masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """What the queries have read, ``[B, Q, D]``: BLIP-2's output, before the projection to one embedding."""
        x = self._first(streams)
        for layer in self.layers:
            x = layer(x, streams, masks)
        return self.norm(x)

    def _first(self, streams: Any) -> Tensor:
        """``[1, Q, D]``: one copy serves all items until the first cross-attention, but under dropout, which each item has a
        mask of its own for."""
        x = self.query[None]
        if self.training and (self.dropout or self.attention_dropout):
            x = x.expand(batch_of(parse(streams, None)), -1, -1)
        return x if self.norm_query is None else F.dropout(self.norm_query(x), self.dropout, self.training)

    @torch.no_grad()
    def attention_weights(self, streams: Any,
                          masks: Sequence[Tensor | None] | None = None) -> list[list[Tensor | Jagged]]:  # fmt: skip
        """What the queries read of each token, for looking at: an entry a layer that reads the tokens, in it one a stream,
        as :func:`em3.ops.qformer_attention_weights` returns them. In training mode the queries come from layers that drop;
        call ``eval()`` before."""
        found, x = [], self._first(streams)
        for layer in self.layers:
            assert isinstance(layer, FusionLayer)
            if layer.cross is not None:
                found.append(layer.attention_weights(x, streams, masks))
            x = layer(x, streams, masks)
        return found

    def forward(self, streams: Any, masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """``streams`` and ``masks`` as in :func:`em3.ops.qformer_attention` -> ``[B, out_dim]``."""
        content: Tensor = self.out(self.queries(streams, masks).flatten(1))
        return content if self.mean is None else content + self.mean(streams, masks)


class FusionLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the tokens (unless ``token_dims`` is None), feed-forward."""

    def __init__(self, token_dims: Sequence[int] | None, dim: int, num_heads: int, ffn_dim: int, norm: str,
                 norm_eps: float, dropout: float, attention_dropout: float, strategy: str,
                 backend: str | None) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.pre, self.dropout, self.attention_dropout = num_heads, norm == "pre", dropout, attention_dropout
        self.norm_self = nn.LayerNorm(dim, norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.cross = self.norm_cross = None
        if token_dims is not None:
            self.norm_cross = nn.LayerNorm(dim, norm_eps)
            self.cross = QFormerAttention(token_dims, dim, num_heads=num_heads, dropout=attention_dropout, strategy=strategy,
                                          backend=backend)  # fmt: skip
        self.norm_ffn = nn.LayerNorm(dim, norm_eps)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor, streams: Any, masks: Sequence[Tensor | None] | None) -> Tensor:
        """``x [1 or B, Q, D]`` -> ``[B, Q, D]``, still ``[1, Q, D]`` if no layer so far has read the tokens."""
        x = self._residual(x, self.norm_self, self._among_queries)
        if self.cross is not None and self.norm_cross is not None:
            cross = self.cross
            x = self._residual(x, self.norm_cross, lambda q: cross(q[0] if len(q) == 1 else q, streams, masks))
        return self._residual(x, self.norm_ffn, lambda q: self.ffn_out(F.gelu(self.ffn_in(q))))

    def attention_weights(self, x: Tensor, streams: Any,
                          masks: Sequence[Tensor | None] | None) -> list[Tensor | Jagged]:  # fmt: skip
        """Of a layer that reads the tokens, given what :meth:`forward` is given."""
        assert self.cross is not None
        assert self.norm_cross is not None
        q = self._residual(x, self.norm_self, self._among_queries)
        if self.pre:
            q = self.norm_cross(q)
        return self.cross.attention_weights(q[0] if len(q) == 1 else q, streams, masks)

    def _residual(self, x: Tensor, norm: nn.Module, block: Any) -> Tensor:
        if self.pre:
            return x + F.dropout(block(norm(x)), self.dropout, self.training)
        return norm(x + F.dropout(block(x), self.dropout, self.training))

    def _among_queries(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, 1 or B, H, Q, E]
        dropout = self.attention_dropout if self.training else 0.0
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2))
