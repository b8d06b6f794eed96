"""``lora_linear`` as one step of autograd, for eager calls on the CPU.

Of few rows the registered operator took 65 us forward and 325 us forward and backward, most of it for being one. A graph of
``torch.compile`` holds the operator, other devices use it too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks, _lora_linear_operator
from ._dropout import Dropout

# scaling, scalings, adapter, offsets, dropout
How = tuple[float, Tensor | None, Tensor | None, Tensor | None, Dropout | None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, how: How, backend: str) -> Tensor:
    """``x [..., C]`` -> ``[..., D]``."""
    if _checks.recorded((x, lora_a, lora_b, weight, bias)):
        found: Tensor = _checks.apply(_Step, True, (how, backend), x, weight, bias, lora_a, lora_b)
        return found
    return _forward(x, weight, bias, lora_a, lora_b, how, backend)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, how: How,
             backend: str) -> tuple[Tensor, Any]:  # fmt: skip
    """The result and the module of the backend that it is of."""
    rows = x if x.dim() == 2 else _flat(x)
    args = (rows, weight, bias, lora_a, lora_b, *how)
    if lora_a.dim() == 3:
        _lora_linear_operator.check_content(rows.shape[0], lora_a, how[2], how[3])
    chosen = _lora_linear_operator.choose(backend, args)
    y: Tensor = chosen.forward(*args)
    if rows is not x:  # in place: what a function of autograd returns as a view cannot be changed in place
        y = y.contiguous().resize_(*x.shape[:-1], y.shape[1])
    return y, chosen


def _flat(x: Tensor) -> Tensor:
    *leading, width = x.shape
    return x.reshape(math.prod(leading), width)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[How, str], x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor,
                lora_b: Tensor) -> Tensor:  # fmt: skip
        how, backend = call
        ctx.scaling, scalings, adapter, offsets, ctx.drop = how
        _, _, need_weight, _, need_a, need_b = ctx.needs_input_grad
        # All that gradients depend on, so that autograd sees what was changed meanwhile.
        kept = x if need_weight or need_a or need_b else None
        ctx.save_for_backward(kept, weight, lora_a, lora_b, scalings, adapter, offsets)
        y, ctx.chosen = _forward(x, weight, bias, lora_a, lora_b, how, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        given = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, *_gradients(ctx, dy, *given)
        with torch.no_grad():
            grads = _gradients(ctx, dy, *given)
        anchor = _checks.anchor("lora_linear", given)
        return None, *_checks.NoSecondOrder.apply("lora_linear", dy, anchor, *grads)


def _gradients(ctx: Any, dy: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scalings: Tensor | None,
               adapter: Tensor | None, offsets: Tensor | None) -> Any:  # fmt: skip
    """To x, weight, bias, lora_a and lora_b."""
    how, need = (ctx.scaling, scalings, adapter, offsets, ctx.drop), list(ctx.needs_input_grad[1:])
    rows = dy if dy.dim() == 2 else _flat(dy)
    if lora_a.dim() == 3:
        _lora_linear_operator.check_content(rows.shape[0], lora_a, adapter, offsets)
    if x is not None and rows is not dy:
        x = _flat(x)
    with _checks.no_autocast(dy.device):
        grads = ctx.chosen.backward(rows.contiguous(), x, weight, lora_a, lora_b, *how, need)
    if rows is dy or grads[0] is None:
        return grads
    return grads[0].view(*dy.shape[:-1], weight.shape[1]), *grads[1:]
