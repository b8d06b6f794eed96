"""``QFormerAttention``: the parameters of one cross-attention from queries to modality streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..jagged import Jagged
from ..ops import _checks
from ..ops.qformer_attention import qformer_attention
from ..ops.qformer_attention_weights import qformer_attention_weights
from . import _given


class QFormerAttention(nn.Module):
    """Cross-attention of queries ``[Q, D]`` or ``[B, Q, D]`` over one or more token streams under one softmax.

    Args:
        token_dims: ``C_m`` of each stream.
        dim: ``D``.
        num_heads: ``H``; divides ``dim``.
        bias: whether the four projections have biases.
        dropout: of the attention weights, in training.
        strategy, backend: as in :func:`em3.ops.qformer_attention`.

    Source: cross-attention of the Q-Former (BLIP-2, arXiv 2301.12597).
    """

    def __init__(self, token_dims: Sequence[int], dim: int, *, num_heads: int, bias: bool = True,
                 dropout: float = 0.0, strategy: str = "auto", backend: str | None = None) -> None:  # fmt: skip
        super().__init__()
        _given.sizes("token_dims", token_dims)
        _given.heads(num_heads, dim)
        _checks.probability(dropout, "dropout")
        _given.choices(strategy, backend)
        self.num_heads, self.dropout, self.strategy, self.backend = num_heads, dropout, strategy, backend
        self.w_q = nn.Parameter(torch.empty(dim, dim))
        self.w_k = nn.ParameterList(torch.empty(dim, c) for c in token_dims)
        self.w_v = nn.ParameterList(torch.empty(dim, c) for c in token_dims)
        self.w_o = nn.Parameter(torch.empty(dim, dim))
        self.b_q = nn.Parameter(torch.empty(dim)) if bias else None
        self.b_k = nn.ParameterList(torch.empty(dim) for _ in token_dims) if bias else None
        self.b_v = nn.ParameterList(torch.empty(dim) for _ in token_dims) if bias else None
        self.b_o = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, as ``nn.MultiheadAttention`` starts."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, query: Tensor, streams: Any, masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """``query [Q, D]`` or ``[B, Q, D]``, ``streams`` and ``masks`` as in the operation -> ``[B, Q, D]``."""
        self._check(query, streams, masks)
        return qformer_attention(
            query, streams, self.w_q, list(self.w_k), list(self.w_v), self.w_o, self.b_q,
            None if self.b_k is None else list(self.b_k), None if self.b_v is None else list(self.b_v), self.b_o,
            num_heads=self.num_heads, masks=masks, dropout=self.dropout if self.training else 0.0, strategy=self.strategy,
            backend=self.backend,
        )  # fmt: skip

    def attention_weights(self, query: Tensor, streams: Any,
                          masks: Sequence[Tensor | None] | None = None) -> list[Tensor | Jagged]:  # fmt: skip
        """What the queries read of each token: :func:`em3.ops.qformer_attention_weights` with this layer's parameters."""
        self._check(query, streams, masks)
        return qformer_attention_weights(
            query, streams, self.w_q, list(self.w_k), self.b_q, None if self.b_k is None else list(self.b_k),
            num_heads=self.num_heads, masks=masks,
        )  # fmt: skip

    def _check(self, query: Tensor, streams: Any, masks: Sequence[Tensor | None] | None) -> None:
        _given.tensor(query, "query", self.w_q.shape[0], "dim", self.w_q)
        _given.streams(streams, masks, self._token_dims(), self.w_q)

    def _token_dims(self) -> list[int]:
        return [w.shape[1] for w in self.w_k]

    def extra_repr(self) -> str:
        return f"token_dims={self._token_dims()}, dim={self.w_q.shape[0]}, num_heads={self.num_heads}, bias={self.b_q is not None}"
