"""``lora_target_attention`` against gathering the history, projecting it with LoRA and PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import em3

from . import measure

SHAPES = [(64, 200, 256, 4), (64, 1000, 128, 4), (32, 200, 512, 8)]  # (B, N, C = D, H)


def rows() -> Iterator[dict]:
    for b, n, d, h in SHAPES:
        bank = torch.randn(20_000, d)
        history = torch.randint(20_000, (b, n))
        target = torch.randn(b, d, requires_grad=True)
        w_q, w_k, w_v, w_o = (torch.randn(d, d) / d**0.5 for _ in range(4))
        lora = [((torch.randn(8, d) / d**0.5).requires_grad_(), (torch.randn(d, 8) / 8).requires_grad_(), 1.0) for _ in "kv"]
        leaves = [target, *(t for g in lora for t in g[:2])]
        grad = torch.randn(b, d)

        def peer(h=h, w=(w_q, w_k, w_v, w_o), lora=lora, bank=bank, history=history, target=target):
            x = bank[history]
            k, v = (
                F.linear(x, weight) + F.linear(F.linear(x, a), up) * s
                for weight, (a, up, s) in zip(w[1:3], lora, strict=True)
            )
            q = F.linear(target[:, None], w[0])
            q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in (q, k, v))
            return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), w[3])[:, 0]

        def ours(h=h, w=(w_q, w_k, w_v, w_o), lora=lora, bank=bank, history=history, target=target):
            return em3.ops.lora_target_attention(
                target, history, bank, *w, lora_k=lora[0], lora_v=lora[1], num_heads=h, backend="torch"
            )

        calls = {
            "LoRA projection + SDPA": lambda f=peer, v=leaves, g=grad: torch.autograd.grad(f(), v, g),
            "torch": lambda f=ours, v=leaves, g=grad: torch.autograd.grad(f(), v, g),
        }
        measure.same_function({name: call() for name, call in calls.items()})
        shape = f"B={b} N={n} C=D={d} H={h} R=8"
        yield measure.row("lora_target_attention", shape, "LoRA projection + SDPA", measure.medians(calls), "frozen weights")
