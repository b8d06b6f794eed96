"""``contrastive_loss`` on a CPU as one step of autograd: a call of the compiled code forward and one backward.

What lies around the matrix of logits (lengths, positives, several of them, smoothing, weights, reductions) is compiled too:
as operators under autograd it keeps and makes tensors of the size of the embeddings, seven times their memory together, and
where there are few logits its calls cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _checks, _contrastive_sigmoid, _dispatch


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
    scale, bias = (t if isinstance(t, Tensor) else None for t in (logit_scale, logit_bias))
    numbers = (_number(logit_scale), _number(logit_bias))
    call = (chosen, numbers, item_ids, options)
    inputs = (content, ids_embedding, negatives, log_q, weight, scale, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        found: Tensor = _Whole.apply(call, *inputs)
        return found
    return _forward(call, inputs, keep=False)[0]


def _number(given: float | Tensor | None) -> float:
    """In double precision, as it comes."""
    return 0.0 if given is None else given.item() if isinstance(given, Tensor) else float(given)


def _chosen(content: Tensor, negatives: Tensor | None, item_ids: Tensor | None, options: dict[str, Any],
            backend: str) -> ModuleType:  # fmt: skip
    """By the widened embeddings, of which only the kind and the size are looked at."""
    b, v = content.shape
    m = b if negatives is None else b + negatives.shape[0]
    x = content if content.dtype == torch.float32 else content.new_empty(1, dtype=torch.float32).expand(b, v)
    args = (x, x if m == b else x.new_empty(1).expand(m, v), x, item_ids, None, True, True)
    if options["kind"] == "sigmoid":
        return _contrastive_sigmoid.served(backend, *args)
    masked = item_ids is not None and options["duplicates"] == "mask"
    return _dispatch.choose("contrastive_loss", backend, args, lambda: (x, "ids" if masked else "plain", (b, m, v)))


def keeps(inputs: Sequence[Tensor | None], need: Sequence[bool]) -> bool:
    """Whether the logits are kept for the backward, which is a quarter of the arithmetic: as long as they and the gradients,
    which the half types add up in float32, leave room under three times the memory of the embeddings."""
    content, _, negatives, *_ = inputs
    assert content is not None
    (b, v), k = content.shape, 0 if negatives is None else negatives.shape[0]
    rows, taken = 2 * b + k, (need[0] + need[1]) * b + need[2] * k
    limit = 2 * rows - taken if content.dtype == torch.float32 else 1.4 * rows - 1.25 * taken
    return b * (b + k) <= limit * v


# The backend's module, scale and bias as numbers, the item ids and the options.
Call = tuple[ModuleType, tuple[float, float], Tensor | None, dict[str, Any]]


def _forward(call: Call, inputs: Sequence[Tensor | None], keep: bool) -> tuple[Tensor, Tensor]:
    """The loss as it is returned, and what the backward needs."""
    (module, numbers, item_ids, options), content, weight = call, inputs[0], inputs[4]
    assert content is not None
    found, state = module.whole_forward(inputs[:5], numbers, item_ids, options, keep)
    if options["reduction"] != "none":
        return content.new_full((), found), state
    losses = state[: content.shape[0]]
    return (losses if weight is None else losses * weight).to(content.dtype), state


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Tensor:
        ctx.need = ctx.needs_input_grad[1:]
        out, state = _forward(call, inputs, keeps(inputs, ctx.need))
        ctx.module, ctx.numbers, item_ids, ctx.options = call
        ctx.save_for_backward(item_ids, state, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        item_ids, state, *inputs = ctx.saved_tensors
        grads = [_room(t, i) if n else None for i, (t, n) in enumerate(zip(inputs, ctx.need, strict=True))]
        ctx.module.whole_backward(grad, inputs[:5], ctx.numbers, item_ids, ctx.options, state, grads)
        for i, (g, t) in enumerate(zip(grads, inputs, strict=True)):
            if g is not None and (g.dtype != t.dtype or g.dim() != t.dim()):
                grads[i] = g.to(t.dtype).view(t.shape)
        if torch.is_grad_enabled():  # under create_graph
            asked = [t if n else None for t, n in zip(inputs, ctx.need, strict=True)]
            grads = list(_checks.NoSecondOrder.apply("contrastive_loss", grad, _checks.anchor("contrastive_loss", asked), *grads))
        return None, *grads


def _room(like: Tensor, place: int) -> Tensor:
    """For the gradient to an argument of ``_Whole``, in a shape and a dtype that the compiled code writes."""
    if place > 4 and like.dim():  # scale and bias
        like = like.view(())
    if place < 3 or like.dtype == torch.float32:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty_like(like, dtype=torch.float32 if place < 5 else torch.float64, memory_format=torch.contiguous_format)
