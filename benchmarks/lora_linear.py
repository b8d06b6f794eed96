"""``lora_linear`` against the frozen linear layer alone (the floor) and LoRA as PEFT computes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import em3

from . import measure

SHAPES = [(8192, 512, 512, 8), (16384, 256, 64, 8)]  # (T, C, D, R)


def rows() -> Iterator[dict]:
    for t, c, d, r in SHAPES:
        x = torch.randn(t, c, requires_grad=True)
        weight, bias = torch.randn(d, c) / c**0.5, torch.randn(d)
        a, b = (torch.randn(r, c) / c**0.5).requires_grad_(), (torch.randn(d, r) / r).requires_grad_()
        grad = torch.randn(t, d)

        def separate(x=x, w=weight, bias=bias, a=a, b=b):
            return F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 2.0

        def ours(x=x, w=weight, bias=bias, a=a, b=b):
            return em3.ops.lora_linear(x, w, bias, a, b, scaling=2.0, backend="torch")

        leaves = [x, a, b]
        calls = {
            "LoRA as two more layers": lambda f=separate, v=leaves, g=grad: torch.autograd.grad(f(), v, g),
            "torch": lambda f=ours, v=leaves, g=grad: torch.autograd.grad(f(), v, g),
        }
        measure.same_function({name: call() for name, call in calls.items()})
        calls["frozen layer alone"] = lambda x=x, w=weight, b=bias, g=grad: torch.autograd.grad(F.linear(x, w, b), x, g)
        times = measure.medians(calls)
        note = f"em3 costs {times['torch'] / times['frozen layer alone']:.2f} times the frozen layer"
        yield measure.row("lora_linear", f"T={t} C={c} D={d} R={r}", "LoRA as two more layers", times, note)
