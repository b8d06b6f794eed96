"""``LoRATargetAttention``: the parameters of a target's attention over its LoRA-adapted history."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lora_target_attention


class LoRATargetAttention(nn.Module):
    """Attention of targets ``[B, D]`` or ``[B, M, D]`` over the rows of a content bank that a user's history names.

    Args:
        content_dim: ``C``, the width of the bank.
        dim: ``D``.
        num_heads: ``H``; divides ``dim``.
        rank: ``R`` of the adapters on the key and value projections; 0 for none.
        alpha: their scaling is ``alpha / rank``; ``rank`` by default.
        train_base: whether the key and value projections under the adapters are trained too. By default they are where
            there are no adapters; False with rank 0 leaves them as they start.
        strategy, backend: as in :func:`em3.ops.lora_target_attention`.

    Source: LoRA (arXiv 2106.09685) over the user's content interest, EM3 (arXiv 2404.06078).
    """

    def __init__(self, content_dim: int, dim: int, *, num_heads: int, rank: int = 8, alpha: float | None = None,
                 train_base: bool | None = None, strategy: str = "auto", backend: str | None = None) -> None:  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: was {num_heads}, must be at least 1 and divide dim {dim}")
        if rank < 0:
            raise ValueError(f"rank: was {rank}, must be at least 1, or 0 for no adapters")
        self.num_heads, self.rank, self.strategy, self.backend = num_heads, rank, strategy, backend
        self.scaling = (rank if alpha is None else alpha) / rank if rank else 0.0
        frozen = rank > 0 if train_base is None else not train_base
        self.w_q = nn.Parameter(torch.empty(dim, dim))
        self.w_k = nn.Parameter(torch.empty(dim, content_dim), requires_grad=not frozen)
        self.w_v = nn.Parameter(torch.empty(dim, content_dim), requires_grad=not frozen)
        self.w_o = nn.Parameter(torch.empty(dim, dim))
        if rank:
            self.lora_k_a, self.lora_v_a = (nn.Parameter(torch.empty(rank, content_dim)) for _ in range(2))
            self.lora_k_b, self.lora_v_b = (nn.Parameter(torch.empty(dim, rank)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections; adapters as PEFT starts them: A Kaiming-uniform, B zero."""
        for weight in (self.w_q, self.w_k, self.w_v, self.w_o):
            nn.init.xavier_uniform_(weight)
        if self.rank:
            for a, b in ((self.lora_k_a, self.lora_k_b), (self.lora_v_a, self.lora_v_b)):
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                nn.init.zeros_(b)

    def forward(self, target: Tensor, history: Any, bank: Tensor) -> Tensor:
        """``target``, ``history`` and ``bank [n, C]`` as in the operation -> shaped like ``target``."""
        lora_k = lora_v = None
        if self.rank:
            lora_k = (self.lora_k_a, self.lora_k_b, self.scaling)
            lora_v = (self.lora_v_a, self.lora_v_b, self.scaling)
        return lora_target_attention(
            target, history, bank, self.w_q, self.w_k, self.w_v, self.w_o, lora_k=lora_k, lora_v=lora_v,
            num_heads=self.num_heads, strategy=self.strategy, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        d, c = self.w_k.shape
        return f"content_dim={c}, dim={d}, num_heads={self.num_heads}, rank={self.rank}, scaling={self.scaling:.4g}"
