"""``lora_target_attention`` as the textbooks write it: gather the history, project it with LoRA, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..jagged import split_jagged
from .padding import padded


def lora_target_attention(target, history, bank, w_q, w_k, w_v, w_o, *, lora_k=None, lora_v=None, num_heads, biases=None,
                          pooling="softmax", top_k=None) -> Tensor:  # fmt: skip
    jagged = split_jagged(history, "history")
    ids, seen = (history, torch.ones_like(history, dtype=torch.bool)) if jagged is None else padded(*jagged)
    seen = seen & (ids >= 0)
    x = bank[ids.clamp(min=0)].to(target.dtype)  # [B, N, C]
    (b, n), d = ids.shape, w_q.shape[0]

    targets = target if target.dim() == 3 else target[:, None]  # [B, M, D]
    q = targets @ w_q.T
    k, v = (_adapted(x, w, lora) for w, lora in ((w_k, lora_k), (w_v, lora_v)))  # [B, N, D]
    q, k, v = (t.reshape(b, t.shape[1], num_heads, d // num_heads).transpose(1, 2) for t in (q, k, v))  # [B, H, ., E]
    scores = q @ k.transpose(2, 3) * (d // num_heads) ** -0.5  # [B, H, M, N]
    for table, buckets in biases or ():
        if jagged is not None:
            buckets, _ = padded(buckets, jagged[1])
        added = table[:, buckets.clamp(min=0)].masked_fill(buckets < 0, 0)  # [H, B, N]
        scores = scores + added.transpose(0, 1)[:, :, None]
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    if pooling == "top_k" and n > top_k:
        best = scores.topk(top_k, -1).values
        rounding = 4 * torch.finfo(scores.dtype).eps * best[..., [0, -1]].abs().amax(-1, keepdim=True)
        scores = scores.masked_fill(scores < best[..., -1:] - rounding, -torch.inf)
    weights = scores.softmax(-1) if n and pooling != "din" else scores.sigmoid()
    weights = weights.masked_fill(~seen[:, None, None, :], 0)
    out = (weights @ v).transpose(1, 2).reshape(targets.shape) @ w_o.T  # [B, M, D]
    return out if target.dim() == 3 else out[:, 0]


def _adapted(x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor, float] | None) -> Tensor:
    if lora is None:
        return x @ weight.T
    a, b, scaling = lora
    return x @ weight.T + scaling * ((x @ a.T) @ b.T)
