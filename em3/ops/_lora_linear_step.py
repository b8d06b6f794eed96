"""``lora_linear`` as one step of autograd, for eager calls on the CPU.

Of few rows a registered operator with a gradient took 65 us forward and 326 us forward and backward where the products take 20
and 60. A graph of ``torch.compile`` holds the operator, other devices use it too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks, _lora_linear_operator

# scaling, scalings, adapter, offsets, seed, dropout and backend
How = tuple[float, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, str]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, how: How) -> Tensor:
    """``x [..., C]`` -> ``[..., D]``."""
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_a.requires_grad or lora_b.requires_grad or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):  # fmt: skip
        found: Tensor = _Step.apply(how, x, weight, bias, lora_a, lora_b)
        return found
    return _forward(how, x, weight, bias, lora_a, lora_b)


def _forward(how: How, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    if x.dim() == 2:
        y: Tensor = _lora_linear_operator.forward(x, weight, bias, lora_a, lora_b, *how)
        return y
    *leading, c = x.shape
    y = _lora_linear_operator.forward(x.reshape(math.prod(leading), c), weight, bias, lora_a, lora_b, *how)
    return y.contiguous().resize_(*leading, y.shape[1])  # in place: what a function of autograd returns as a view stays one


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: How, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        _, scalings, adapter, offsets, seed, _, _ = ctx.how = how
        _, _, need_weight, _, need_a, need_b = ctx.needs_input_grad
        # All that gradients depend on, whose own gradients are refused by that.
        ctx.save_for_backward(x if need_weight or need_a or need_b else None, weight, lora_a, lora_b)
        return _forward(how, x, weight, bias, lora_a, lora_b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        given = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, *_gradients(ctx, dy, *given)
        with torch.no_grad():
            grads = _gradients(ctx, dy, *given)
        anchor = _checks.anchor("lora_linear", given)
        return None, *_checks.NoSecondOrder.apply("lora_linear", dy, anchor, *grads)


def _gradients(ctx: Any, dy: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Any:
    """To x, weight, bias, lora_a and lora_b."""
    need = list(ctx.needs_input_grad[1:])
    if dy.dim() == 2:
        return _lora_linear_operator.gradients(dy.contiguous(), x, weight, lora_a, lora_b, *ctx.how[:-1], need, ctx.how[-1])
    *leading, d = dy.shape
    rows, c = math.prod(leading), weight.shape[1]
    dx, *others = _lora_linear_operator.gradients(
        dy.reshape(rows, d), None if x is None else x.reshape(rows, c), weight, lora_a, lora_b, *ctx.how[:-1], need, ctx.how[-1]
    )
    return None if dx is None else dx.view(*leading, c), *others
