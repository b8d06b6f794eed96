"""``lora_linear``: a linear layer with one or many low-rank adapters. Public function and registered operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, _dispatch
from ._dropout import Dropout


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *,
                scaling: float | Tensor = 1.0, adapter: Tensor | None = None, offsets: Tensor | None = None,
                dropout: float = 0.0, backend: str | None = None) -> Tensor:  # fmt: skip
    """A linear layer plus a low-rank update, the same for all rows or one adapter a row.

    For row ``i`` with adapter ``g``::

        y_i = x_i weight^T + bias + scaling_g (dropout(x_i) lora_a_g^T) lora_b_g^T

    With ``lora_a [R, C]`` one adapter serves all rows, and neither ``adapter`` nor ``offsets`` may be given. With
    ``lora_a [G, R, C]``, also for ``G = 1``, exactly one of them must say which row uses which adapter. A row without
    an adapter gets the linear layer alone, and no adapter's content reaches it.

    Adapters of different ranks go into one call padded with zeros to the largest: rows of ``lora_a`` and columns of
    ``lora_b``. A padded row's gradient is that of a zero parameter, so it stays zero when both are padded.

    Args:
        x: ``[..., C]``.
        weight: ``[D, C]``.
        bias: ``[D]`` or None.
        lora_a: ``[R, C]`` or ``[G, R, C]``.
        lora_b: ``[D, R]`` or ``[G, D, R]``.
        scaling: a number, or with ``G`` adapters a tensor ``[G]`` that takes no gradient.
        adapter: int32 or int64, of ``x``'s leading shape: the adapter of each row, -1 for none.
        offsets: int32 or int64 ``[G + 1]``: rows ``offsets[g] .. offsets[g + 1] - 1`` of the flattened leading
            dimensions use adapter ``g``; rows from ``offsets[G]`` on use none.
        dropout: probability with which the adapter sees a number of ``x`` as zero, the others being divided by
            ``1 - dropout``. Drawn anew in every call from torch's generator of ``x``'s device.
        backend: ``"auto"`` or a backend's name; the process-wide choice (``em3.set_backend``) by default.

    Returns:
        ``[..., D]``, of the inputs' dtype (under autocast: of its dtype). float32, bfloat16, float16 or float64; for
        the half types ``x lora_a^T`` stays in float32. Gradients flow to every floating-point argument but
        ``scaling`` that requires them, and cost nothing for the others; second-order ones are an error.

    Raises:
        ValueError: naming the argument, what it was and what it must be. On a GPU the content of ``adapter`` and
            ``offsets`` is looked at only under ``em3.debug_checks()``; an adapter outside ``0 .. G - 1`` counts as none.
        em3.BackendError: if the backend asked for cannot serve the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; dropout
    where PEFT has it.
    """
    _checks.outside_transforms("lora_linear")
    _checks.tensor(x, "x", " [..., C]")
    x, weight, bias, lora_a, lora_b = _checks.autocast(x, weight, bias, lora_a, lora_b, device=x.device)
    _check(x, weight, bias, lora_a, lora_b)
    factor, factors = _scaling(scaling, x, lora_a)
    _check_rows(x, lora_a, adapter, offsets)
    _checks.probability(dropout, "dropout")
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device) if dropout else None
    leading, c = x.shape[:-1], x.shape[-1]
    rows = math.prod(leading)
    y = torch.ops.em3.lora_linear(
        x.reshape(rows, c), weight, bias, lora_a, lora_b, factor, factors,
        None if adapter is None else adapter.reshape(rows), offsets, seed, dropout, _dispatch.requested(backend),
    )  # fmt: skip
    return y.view(*leading, weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError("x: was a scalar, must be [..., C]")
    _checks.shape(weight, ["D", x.shape[-1]], "weight")
    d, c = weight.shape
    if bias is not None:
        _checks.shape(bias, [d], "bias")
    _checks.tensor(lora_a, "lora_a", " [R, C] or [G, R, C]")
    if lora_a.dim() not in (2, 3):
        raise ValueError(f"lora_a: was {list(lora_a.shape)}, must be [R, {c}] or [G, R, {c}]")
    adapters: list[int | str] = list(lora_a.shape[:-2])
    _checks.shape(lora_a, [*adapters, "R", c], "lora_a")
    if lora_a.shape[-2] < 1:
        raise ValueError(f"lora_a: was {list(lora_a.shape)}, must have a rank R of at least 1")
    if lora_a.shape[0] < 1:
        raise ValueError(f"lora_a: was {list(lora_a.shape)}, must hold at least one adapter")
    _checks.shape(lora_b, [*adapters, d, lora_a.shape[-2]], "lora_b")
    _checks.same_device_and_dtype("x", x, {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b})


def _scaling(scaling: float | Tensor, x: Tensor, lora_a: Tensor) -> tuple[float, Tensor | None]:
    """The number that all adapters share, and the tensor of one for each or None."""
    if not isinstance(scaling, Tensor):
        if not _checks.is_number(scaling):
            raise ValueError(f"scaling: was {scaling!r}, must be a number, or a tensor [G] with G adapters")
        return float(scaling), None
    if lora_a.dim() == 2:
        raise ValueError(f"scaling: was a tensor {list(scaling.shape)}, must be a number when lora_a is [R, C]")
    _checks.shape(scaling, [lora_a.shape[0]], "scaling")
    if not scaling.is_floating_point():
        raise ValueError(f"scaling: was {scaling.dtype}, must be of a floating-point dtype")
    if scaling.requires_grad:
        raise ValueError("scaling: required a gradient, must be a constant (detach it)")
    _checks.same_device("x", x, {"scaling": scaling})
    return 1.0, scaling


def _check_rows(x: Tensor, lora_a: Tensor, adapter: Tensor | None, offsets: Tensor | None) -> None:
    """What shapes, dtypes and devices show about ``adapter`` and ``offsets``."""
    given = [name for name, value in (("adapter", adapter), ("offsets", offsets)) if value is not None]
    if lora_a.dim() == 2 and given:
        raise ValueError(f"{given[0]}: was given, must be None when lora_a is [R, C] (one adapter for all rows)")
    if lora_a.dim() == 3 and len(given) != 1:
        was = "both were given" if given else "neither was given"
        one = "; for one adapter on all rows pass lora_a [R, C]" if lora_a.shape[0] == 1 else ""
        raise ValueError(f"adapter, offsets: {was}, exactly one must be when lora_a is [G, R, C]{one}")
    shapes = {"adapter": (adapter, list(x.shape[:-1])), "offsets": (offsets, [lora_a.shape[0] + 1])}
    for name, (value, expected) in shapes.items():
        if value is not None:
            _checks.shape(value, expected, name)
            if value.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: was {value.dtype}, must be torch.int32 or torch.int64")
    _checks.same_device("x", x, {"adapter": adapter, "offsets": offsets})


# The registered operator works on rows: x [T, C], adapter [T]. With a seed, the adapters see x times the factors of
# _dropout.Dropout(dropout, seed), of which token i and row c belong to x[i, c]; the backward draws them again.
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
    _check_content(x.shape[0], lora_a, adapter, offsets)
    args = (x, weight, bias, lora_a, lora_b, scaling, scalings, adapter, offsets, _drop(seed, dropout))
    with _checks.no_autocast(x.device):
        return _dispatch.choose("lora_linear", backend, args, _about(*args)).forward(*args)


@torch.library.impl("em3::lora_linear_backward", "default")
def _backward(dy, x, weight, lora_a, lora_b, scaling, scalings, adapter, offsets, seed, dropout, need, backend):
    _check_content(dy.shape[0], lora_a, adapter, offsets)
    args = (lora_a, lora_b, scaling, scalings, adapter, offsets, _drop(seed, dropout))
    # dy stands in for x, which may be absent: it has x's rows, dtype and device.
    like = (dy, weight, None, *args)
    chosen = _dispatch.choose("lora_linear", backend, like, _about(*like))
    with _checks.no_autocast(dy.device):
        return chosen.backward(dy, x, weight, *args, need)


def _drop(seed, dropout):
    return None if seed is None else Dropout(dropout, seed)


def _about(x, weight, bias, lora_a, lora_b, scaling, scalings, adapter, offsets, drop):
    """What the choice of a backend depends on."""
    kind = "shared" if lora_a.dim() == 2 else "index" if adapter is not None else "segments"
    d, c = weight.shape
    return x, kind if drop is None else f"{kind} dropped", (x.shape[0], c, d, *lora_a.shape[:-1])


def _check_content(rows, lora_a, adapter, offsets):
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
