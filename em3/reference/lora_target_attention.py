"""``lora_target_attention`` as the textbooks write it: gather the history, project it with LoRA, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..jagged import split_jagged
from .padding import padded


def lora_target_attention(target, history, bank, w_q, w_k, w_v, w_o, *, lora_k=None, lora_v=None,
                          num_heads) -> Tensor:  # fmt: skip
    jagged = split_jagged(history, "history")
    ids, seen = (history, torch.ones_like(history, dtype=torch.bool)) if jagged is None else padded(*jagged)
    seen = seen & (ids >= 0)
    x = bank[ids.clamp(min=0)].to(target.dtype)  # [B, N, C]
    (b, n), d = ids.shape, w_q.shape[0]

    targets = target if target.dim() == 3 else target[:, None]  # [B, M, D]
    q = targets @ w_q.T
    k, v = (_adapted(x, w, lora) for w, lora in ((w_k, lora_k), (w_v, lora_v)))  # [B, N, D]
    q, k, v = (t.reshape(b, t.shape[1], num_heads, d // num_heads).transpose(1, 2) for t in (q, k, v))  # [B, H, ., E]
    scores = (q @ k.transpose(2, 3) * (d // num_heads) ** -0.5).masked_fill(~seen[:, None, None, :], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen[:, None, None, :], 0) if n else scores
    out = (weights @ v).transpose(1, 2).reshape(targets.shape) @ w_o.T  # [B, M, D]
    return out if target.dim() == 3 else out[:, 0]


def _adapted(x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor, float] | None) -> Tensor:
    if lora is None:
        return x @ weight.T
    a, b, scaling = lora
    return x @ weight.T + scaling * ((x @ a.T) @ b.T)
