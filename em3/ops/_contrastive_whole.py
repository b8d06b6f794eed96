"""``contrastive_loss`` of a small batch as one step of autograd: one call of the compiled kernel, gradients included.

Here the time goes into the number of calls and not into what they compute. A gradient that turns out not to be needed costs
less than a second call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch

# Logits. Forward and backward, AVX2, one thread's processor time on a busy machine, in turns, ms: the full matrix with two
# cross entropies, the operators with autograd around them, this call. V=128, B=2: 0.32, 0.84, 0.20; 64: 0.44, 1.08, 0.32;
# 128: 0.71, 1.38, 0.53; 256: 1.6, 2.5, 1.3; 512: 7.6, 5.4, 3.9. V=32, B=256: 1.1, -, 0.58; 300: 1.6, 1.5, 0.68; 400: 2.9,
# 1.8, 0.99. V=512, B=256: 5.2, -, 4.5; 300: 6.9, 9.1, 7.9; 400: 10.2, 13.9, 11.8, where the logits' second product weighs
# most. Beyond the limit it would gain ever less, and a backward that nobody runs would cost ever more.
LIMIT = 512 * 512


def serves(content: Tensor, negatives: Tensor | None, options: dict[str, Any], backend: str) -> bool:
    """Whether a call is one of few logits, of float32 or the half types on the CPU, and of plain InfoNCE."""
    b = content.shape[0]
    if not 0 < b * (b + (0 if negatives is None else negatives.shape[0])) <= LIMIT or backend not in ("auto", "cpp"):
        return False
    if content.device.type != "cpu" or content.dtype == torch.float64 or type(content) not in (Tensor, torch.nn.Parameter):
        return False
    if options["kind"] != "infonce" or options["label_smoothing"] or options["duplicates"] == "positive":
        return False
    # A graph holds operators, and its compiler joins what lies around them.
    return options["reduction"] != "none" and not torch.compiler.is_compiling()


def loss(content: Tensor, ids_embedding: Tensor, negatives: Tensor | None, logit_scale: float | Tensor,
         item_ids: Tensor | None, log_q: Tensor | None, weight: Tensor | None, asked: list[bool],
         options: dict[str, Any], backend: str) -> Tensor | None:  # fmt: skip
    """As :func:`em3.ops.contrastive_loss`, from checked arguments; None if the backend that is to serve has no such call."""
    scale = logit_scale if isinstance(logit_scale, Tensor) else content.new_full((), logit_scale, dtype=torch.float64)
    item_ids = item_ids if options["duplicates"] == "mask" else None
    x, b = content.detach().float(), content.shape[0]
    m = b if negatives is None else b + negatives.shape[0]
    args = (x, x if m == b else x.new_empty(m, x.shape[1]), scale, item_ids, log_q, *asked)
    about = (x, "plain" if item_ids is None else "ids", (b, m, x.shape[1]))
    chosen = _dispatch.choose("contrastive_loss", backend, args, about)
    if not hasattr(chosen, "whole"):
        return None
    found: Tensor = _Whole.apply(
        chosen.whole, content, ids_embedding, negatives, scale, log_q, weight, item_ids, asked, options["reduction"] == "mean",
        options["normalize"], torch.is_grad_enabled(),
    )  # fmt: skip
    return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Callable[..., Any], content: Tensor, ids_embedding: Tensor, negatives: Tensor | None,
                scale: Tensor, log_q: Tensor | None, weight: Tensor | None, item_ids: Tensor | None, asked: list[bool],
                mean: bool, normalize: bool, gradients: bool) -> Tensor:  # fmt: skip
        inputs = (content, ids_embedding, negatives, scale, log_q, weight)
        # needs_input_grad is what tensors require, under no_grad too; and here gradients cost three times the loss.
        need = [n and gradients for n in ctx.needs_input_grad[1:7]]
        found, grads = whole(
            content, ids_embedding, negatives, scale, log_q, weight, item_ids, asked, mean, normalize,
            list(need),
        )  # fmt: skip
        ctx.save_for_backward(*grads)
        # Not by save_for_backward: they are never read, and whoever owns them may have written to them meanwhile.
        ctx.inputs = [t if n else None for t, n in zip(inputs, need, strict=True)]
        ctx.like = [None if t is None else (t.dtype, t.shape) for t in inputs]
        return content.new_full((), found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        factors = {torch.float32: grad.float(), torch.float64: grad.double()}
        grads = [
            None if g is None else (g * factors[g.dtype]).to(like[0]).view(like[1])
            for g, like in zip(ctx.saved_tensors, ctx.like, strict=True)
        ]
        if torch.is_grad_enabled():  # under create_graph
            grads = list(_checks.NoSecondOrder.apply("contrastive_loss", grad, *ctx.inputs, *grads))
        return None, *grads, None, None, None, None, None
