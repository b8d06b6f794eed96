"""``contrastive_loss`` on a CPU as one step of autograd: a call of the compiled code forward and one backward.

What lies around the matrix of logits (lengths, positives, several of them, smoothing, weights, reductions) is compiled too:
as operators under autograd it keeps and makes tensors of the size of the embeddings, seven times their memory together, and
where there are few logits its calls cost more than the arithmetic.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _checks, _contrastive_sigmoid, _dispatch
from . import _contrastive_checks as check

# The logits are kept for the backward where there are at most so many candidates for each column of the embeddings: a
# quarter of the arithmetic for at most the memory of the embeddings.
KEPT = 2


def serves(content: Tensor, backend: str) -> bool:
    """Whether a call is one of float32 or the half types on the CPU, outside of graphs: a graph holds operators, and its
    compiler joins what lies around them."""
    if 0 in content.shape or backend not in ("auto", "cpp") or torch.compiler.is_compiling():
        return False
    plain = type(content) in (Tensor, torch.nn.Parameter)
    return plain and content.device.type == "cpu" and content.dtype != torch.float64


def loss(content: Tensor, ids_embedding: Tensor, negatives: Tensor | None, logit_scale: float | Tensor,
         logit_bias: float | Tensor | None, item_ids: Tensor | None, log_q: Tensor | None, weight: Tensor | None,
         options: dict[str, Any], backend: str) -> Tensor | None:  # fmt: skip
    """As :func:`em3.ops.contrastive_loss`, from checked arguments; None if the backend that is to serve has no such call."""
    chosen = _chosen(content, negatives, item_ids, options, backend)
    if not hasattr(chosen, "whole_forward"):
        return None
    check.log_probabilities(None if log_q is None else -log_q.detach())
    scale, bias = (
        n if n is None or isinstance(n, Tensor) else torch.tensor(n, dtype=torch.float64, device="cpu")
        for n in (logit_scale, logit_bias)
    )
    inputs = (content, ids_embedding, negatives, scale, bias, log_q, weight)
    anchor = _checks.anchor("contrastive_loss", inputs)
    found: Tensor = _Whole.apply(chosen, item_ids, options, (anchor,), *inputs)
    return found


def _chosen(content: Tensor, negatives: Tensor | None, item_ids: Tensor | None, options: dict[str, Any],
            backend: str) -> ModuleType:  # fmt: skip
    """By the widened embeddings, of which only the kind and the size are looked at."""
    b, v = content.shape
    m = b if negatives is None else b + negatives.shape[0]
    x = content.detach() if content.dtype == torch.float32 else content.new_empty(b, v, dtype=torch.float32)
    args = (x, x if m == b else x.new_empty(m, v), x, item_ids, None, True, True)
    if options["kind"] == "sigmoid":
        return _contrastive_sigmoid.served(backend, *args)
    masked = item_ids is not None and options["duplicates"] == "mask"
    return _dispatch.choose("contrastive_loss", backend, args, (x, "ids" if masked else "plain", (b, m, v)))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, item_ids: Tensor | None, options: dict[str, Any], anchor: tuple[Tensor | None],
                *inputs: Tensor | None) -> Tensor:  # fmt: skip
        content, _, negatives, *_, weight = inputs
        assert content is not None
        # needs_input_grad is what tensors require, under no_grad too.
        (ctx.anchor,) = anchor
        ctx.need = [n and ctx.anchor is not None for n in ctx.needs_input_grad[4:]]
        m = content.shape[0] + (0 if negatives is None else negatives.shape[0])
        keep = any(ctx.need) and m <= KEPT * content.shape[1]
        found, state = module.whole_forward(list(inputs), item_ids, options, keep)
        ctx.module, ctx.options = module, options
        ctx.save_for_backward(item_ids, *inputs, *state)
        if options["reduction"] != "none":
            return content.new_full((), found)
        losses = state[2]
        return (losses if weight is None else losses * weight).to(content.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        item_ids, *rest = ctx.saved_tensors
        inputs, state = rest[:7], rest[7:]
        grads = ctx.module.whole_backward(grad, inputs, item_ids, ctx.options, state, ctx.need)
        grads = [None if g is None else g.to(t.dtype).view(t.shape) for g, t in zip(grads, inputs, strict=True)]
        if torch.is_grad_enabled():  # under create_graph
            grads = list(_checks.NoSecondOrder.apply("contrastive_loss", grad, ctx.anchor, *grads))
        return None, None, None, None, *grads
