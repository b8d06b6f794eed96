"""The registered operator ``em3::lora_linear``, on rows: x ``[T, C]``, adapter ``[T]``.

With a seed, the adapters see x times the factors of ``_dropout.Dropout(dropout, seed)``, of which token i and row c belong to
``x[i, c]``; the backward draws them again.
"""

from __future__ import annotations

import torch

from . import _checks, _dispatch
from ._dropout import Dropout

torch.library.define(
    "em3::lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, Tensor? scalings,"
    " Tensor? adapter, Tensor? offsets, Tensor? seed, float dropout, str backend) -> Tensor",
)
# x is None where nothing that needs it wants a gradient; `need` is for x, weight, bias, lora_a, lora_b, and what is
# not needed comes back as an empty tensor.
torch.library.define(
    "em3::lora_linear_backward",
    "(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? scalings,"
    " Tensor? adapter, Tensor? offsets, Tensor? seed, float dropout, bool[] need, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dlora_a, Tensor dlora_b)",
)


@torch.library.impl("em3::lora_linear", "default")
def _forward(x, weight, bias, lora_a, lora_b, scaling, scalings, adapter, offsets, seed, dropout, backend):
    check_content(x.shape[0], lora_a, adapter, offsets)
    args = (x, weight, bias, lora_a, lora_b, scaling, scalings, adapter, offsets, dropped(seed, dropout))
    with _checks.no_autocast(x.device):
        return choose(backend, args).forward(*args)


@torch.library.impl("em3::lora_linear_backward", "default")
def _backward(dy, x, weight, lora_a, lora_b, scaling, scalings, adapter, offsets, seed, dropout, need, backend):
    check_content(dy.shape[0], lora_a, adapter, offsets)
    args = (lora_a, lora_b, scaling, scalings, adapter, offsets, dropped(seed, dropout))
    # dy stands in for x, which may be absent: it has x's rows, dtype and device.
    with _checks.no_autocast(dy.device):
        grads = choose(backend, (dy, weight, None, *args)).backward(dy, x, weight, *args, need)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def dropped(seed, dropout):
    return None if seed is None else Dropout(dropout, seed)


def choose(backend, args):
    """The module of a backend that serves ``args``, those of its ``forward``."""
    return _dispatch.choose("lora_linear", backend, args, lambda: _about(*args))


def _about(x, weight, bias, lora_a, lora_b, scaling, scalings, adapter, offsets, drop):
    """What the choice of a backend depends on."""
    kind = "shared" if lora_a.dim() == 2 else "index" if adapter is not None else "segments"
    d, c = weight.shape
    return x, kind if drop is None else f"{kind} dropped", (x.shape[0], c, d, *lora_a.shape[:-1])


def check_content(rows, lora_a, adapter, offsets):
    """In the backward again: the user's index tensors may have been written to in between."""
    if adapter is not None:
        _checks.index_content(adapter, -1, lora_a.shape[0], "adapter", "adapter")
    if offsets is not None:
        _checks.offsets_content(offsets, rows, "offsets")


@torch.library.register_fake("em3::lora_linear")
def _forward_fake(x, weight, bias, lora_a, lora_b, scaling, scalings, adapter, offsets, seed, dropout, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("em3::lora_linear_backward")
def _backward_fake(dy, x, weight, lora_a, lora_b, scaling, scalings, adapter, offsets, seed, dropout, need, backend):
    d, c = weight.shape
    shapes = ((dy.shape[0], c), (d, c), (d,), lora_a.shape, lora_b.shape)
    return tuple(dy.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, ctx.scaling, scalings, adapter, offsets, seed, ctx.dropout, ctx.backend = inputs
    _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
    kept = x if need_weight or need_a or need_b else None
    ctx.save_for_backward(kept, weight, lora_a, lora_b, scalings, adapter, offsets, seed)


def _autograd(ctx, dy):
    x, weight, lora_a, lora_b, scalings, adapter, offsets, seed = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:5])
    grads = torch.ops.em3.lora_linear_backward(
        dy.contiguous(), x, weight, lora_a, lora_b, ctx.scaling, scalings, adapter, offsets, seed, ctx.dropout, need,
        ctx.backend,
    )  # fmt: skip
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *[None] * 7)


torch.library.register_autograd("em3::lora_linear", _autograd, setup_context=_setup_context)
_checks.no_second_order("lora_linear")
