"""``qformer_attention`` against projecting keys and values and PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import em3
from em3.ops import _dispatch

from . import measure

# (B, N, C, D, H, Q); the first is the layer of a BLIP-2-sized Q-Former cut down to a ranker's few queries.
SHAPES = [(32, n, d, d, h, q) for d, h, n in ((512, 8, 256), (768, 12, 256), (512, 8, 100)) for q in (4, 8, 16, 32)]


def rows() -> Iterator[dict]:
    for b, n, c, d, h, q in SHAPES:
        for frozen in (True, False):
            x = torch.randn(b, n, c, requires_grad=not frozen)
            query = torch.randn(q, d, requires_grad=True)
            w_q, w_k, w_v, w_o = ((torch.randn(d, w) / w**0.5).requires_grad_() for w in (d, c, c, d))
            leaves = [query, w_q, w_k, w_v, w_o, *([] if frozen else [x])]

            def peer(x=x, query=query, w=(w_q, w_k, w_v, w_o), h=h):
                heads = [F.linear(t, p).unflatten(-1, (h, -1)) for t, p in zip((query[None], x, x), w, strict=False)]
                qs, k, v = (t.transpose(1, 2) for t in heads)
                out = F.scaled_dot_product_attention(qs.expand(len(x), -1, -1, -1), k, v)
                return F.linear(out.transpose(1, 2).flatten(2), w[3])

            def ours(backend, x=x, query=query, w=(w_q, w_k, w_v, w_o), h=h):
                return em3.ops.qformer_attention(
                    query, x, w[0], [w[1]], [w[2]], w[3], num_heads=h, strategy="absorb", backend=backend
                )

            grad = torch.randn(b, q, d)
            calls = {"K/V projection + SDPA": lambda f=peer, v=leaves, g=grad: torch.autograd.grad(f(), v, g)}
            for name in _dispatch.BACKENDS["qformer_attention"]:
                if _dispatch.module("qformer_attention", name).unavailable() is None:
                    calls[name] = lambda f=ours, n=name, v=leaves, g=grad: torch.autograd.grad(f(n), v, g)
            measure.same_function({name: call() for name, call in calls.items()})
            shape = f"B={b} N={n} C=D={d} H={h} Q={q}"
            note = "tokens frozen" if frozen else "gradient to the tokens"
            yield measure.row("qformer_attention", shape, "K/V projection + SDPA", measure.medians(calls), note)
