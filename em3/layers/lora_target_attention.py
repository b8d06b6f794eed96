"""``LoRATargetAttention``: the parameters of a target's attention over its LoRA-adapted history."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks
from ..ops._pooling import POOLINGS
from ..ops.lora_target_attention import lora_target_attention, parse_history
from . import _given
from ._buckets import doubling, positions


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
        pooling: how scores become weights: ``"softmax"``, ``"din"`` (each score's sigmoid, not normalised) or ``"top_k"``
            (softmax over the ``top_k`` best); see the operation.
        top_k: for ``"top_k"``, at least 1.
        position_buckets: rows of a learned bias a head by how many events came after one, in buckets that double: 12 tell
            apart up to 2,047. 0 for none.
        time_buckets: the same by an event's age in seconds, which ``forward`` then takes; 28 tell apart up to four years.
        strategy, backend: as in :func:`em3.ops.lora_target_attention`.

    Source: LoRA (arXiv 2106.09685) over the user's content interest, EM3 (arXiv 2404.06078); biases by the logarithm of
    time as in HSTU (Zhai et al., arXiv 2402.17152).
    """

    def __init__(self, content_dim: int, dim: int, *, num_heads: int, rank: int = 8, alpha: float | None = None,
                 train_base: bool | None = None, pooling: str = "softmax", top_k: int | None = None, position_buckets: int = 0,
                 time_buckets: int = 0, strategy: str = "auto", backend: str | None = None) -> None:  # fmt: skip
        super().__init__()
        _given.size("content_dim", content_dim)
        _given.heads(num_heads, dim)
        for name, count in dict(rank=rank, position_buckets=position_buckets, time_buckets=time_buckets).items():
            _given.size(name, count, least=0)
        if alpha is not None:
            _given.number("alpha", alpha)
        _given.choices(strategy, backend)
        _checks.one_of(pooling, POOLINGS, "pooling")
        if pooling != "softmax" and strategy == "project":
            raise ValueError(f"strategy: was 'project', must be 'absorb' or 'auto' with pooling={pooling!r}")
        if top_k is not None:
            _given.size("top_k", top_k)
        if (pooling == "top_k") != (top_k is not None):
            raise ValueError(f"top_k: was {top_k}, must be at least 1 with pooling='top_k' and None without, which was {pooling!r}")
        self.num_heads, self.rank, self.strategy, self.backend = num_heads, rank, strategy, backend
        self.pooling, self.top_k, self.position_buckets, self.time_buckets = pooling, top_k, position_buckets, time_buckets
        self.scaling = (rank if alpha is None else alpha) / rank if rank else 0.0
        frozen = rank > 0 if train_base is None else not train_base
        self.w_q = nn.Parameter(torch.empty(dim, dim))
        self.w_k = nn.Parameter(torch.empty(dim, content_dim), requires_grad=not frozen)
        self.w_v = nn.Parameter(torch.empty(dim, content_dim), requires_grad=not frozen)
        self.w_o = nn.Parameter(torch.empty(dim, dim))
        if rank:
            self.lora_k_a, self.lora_v_a = (nn.Parameter(torch.empty(rank, content_dim)) for _ in range(2))
            self.lora_k_b, self.lora_v_b = (nn.Parameter(torch.empty(dim, rank)) for _ in range(2))
        self.position_bias = nn.Parameter(torch.empty(num_heads, position_buckets)) if position_buckets else None
        self.time_bias = nn.Parameter(torch.empty(num_heads, time_buckets)) if time_buckets else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections; adapters as PEFT starts them: A Kaiming-uniform, B zero; biases zero."""
        for table in (self.position_bias, self.time_bias):
            if table is not None:
                nn.init.zeros_(table)
        for weight in (self.w_q, self.w_k, self.w_v, self.w_o):
            nn.init.xavier_uniform_(weight)
        if self.rank:
            for a, b in ((self.lora_k_a, self.lora_k_b), (self.lora_v_a, self.lora_v_b)):
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                nn.init.zeros_(b)

    def forward(self, target: Tensor, history: Any, bank: Tensor, age: Tensor | None = None) -> Tensor:
        """``target``, ``history`` and ``bank [n, C]`` as in the operation -> shaped like ``target``.

        ``age``: with ``time_buckets``, seconds that have passed since each event, int64 or int32, shaped as the history's row
        numbers. One below 0 counts as 0.
        """
        self._check(target, bank)
        lora_k = lora_v = None
        if self.rank:
            lora_k = (self.lora_k_a, self.lora_k_b, self.scaling)
            lora_v = (self.lora_v_a, self.lora_v_b, self.scaling)
        return lora_target_attention(
            target, history, bank, self.w_q, self.w_k, self.w_v, self.w_o, lora_k=lora_k, lora_v=lora_v,
            num_heads=self.num_heads, biases=self._biases(history, age), pooling=self.pooling, top_k=self.top_k,
            strategy=self.strategy, backend=self.backend,
        )  # fmt: skip

    def _check(self, target: Tensor, bank: Tensor) -> None:
        d, c = self.w_k.shape
        _given.tensor(target, "target", d, "dim", self.w_q)
        _checks.tensor(bank, "bank", " [n, C]; of a ContentBank give its rows")
        if bank.dim() == 2 and bank.shape[1] != c:
            raise ValueError(f"bank: was {list(bank.shape)}, must be {c} wide, as the layer was made (content_dim={c})")

    def _biases(self, history: Any, age: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        ids, _, _ = parse_history(history)
        if age is None and self.time_bias is not None:
            raise ValueError(f"age: was None, must be seconds, shaped as the history's row numbers {list(ids.shape)}, with "
                             f"time_buckets={self.time_buckets}")  # fmt: skip
        if age is not None:
            _checks.shape(age, list(ids.shape), "age")
            if self.time_bias is None:
                raise ValueError(f"age: was {age.dtype} {list(age.shape)}, must be None with time_buckets=0")
            if age.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"age: was {age.dtype}, must be torch.int64 or torch.int32 seconds")
            _checks.same_device("history", ids, {"age": age})
        biases: list[tuple[Tensor, Tensor]] = []
        if self.position_bias is not None:
            biases.append((self.position_bias, doubling(positions(history), self.position_buckets)))
        if self.time_bias is not None and age is not None:
            biases.append((self.time_bias, doubling(age, self.time_buckets)))
        return biases

    def extra_repr(self) -> str:
        d, c = self.w_k.shape
        biases = f", position_buckets={self.position_buckets}, time_buckets={self.time_buckets}"
        pooling = f", pooling={self.pooling}" + (f", top_k={self.top_k}" if self.top_k is not None else "")
        return (f"content_dim={c}, dim={d}, num_heads={self.num_heads}, rank={self.rank}, scaling={self.scaling:.4g}"
                + pooling + (biases if self.position_buckets or self.time_buckets else ""))  # fmt: skip
