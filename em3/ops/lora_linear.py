"""``lora_linear``: a linear layer with one or many low-rank adapters. Public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, _dispatch, _lora_linear_operator, _lora_linear_step


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
    eager = _checks.eager_on_cpu((x, weight, bias, lora_a, lora_b))
    if not eager:
        _checks.tensor(x, "x", " [..., C]")
        x, weight, bias, lora_a, lora_b = _checks.autocast(x, weight, bias, lora_a, lora_b, device=x.device)
    if not (eager and _fit(x, weight, bias, lora_a, lora_b)):
        _check(x, weight, bias, lora_a, lora_b)
    factor, factors = _scaling(scaling, x, lora_a)
    if adapter is not None or offsets is not None or lora_a.dim() == 3:
        _check_rows(x, lora_a, adapter, offsets)
    _checks.probability(dropout, "dropout")
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device) if dropout else None
    adapter = None if adapter is None else adapter.reshape(-1)
    request = _dispatch.requested(backend)
    if eager:
        how = (factor, factors, adapter, offsets, _lora_linear_operator.dropped(seed, dropout))
        return _lora_linear_step.linear(x, weight, bias, lora_a, lora_b, how, request)
    leading, c = x.shape[:-1], x.shape[-1]
    y = torch.ops.em3.lora_linear(
        x.reshape(math.prod(leading), c), weight, bias, lora_a, lora_b, factor, factors, adapter, offsets, seed, dropout, request
    )
    return y.view(*leading, weight.shape[0])


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether tensors of one device pass :func:`_check`, which takes four times as long to say what is wrong with them."""
    low, dtype = lora_a.shape, x.dtype
    if not (len(low) in (2, 3) and weight.dim() == 2 and x.dim()) or 0 in low or dtype not in _checks.FLOATS:
        return False
    d, c = weight.shape
    return (
        x.shape[-1] == c == low[-1] and lora_b.shape == (*low[:-2], d, low[-2])
        and weight.dtype is dtype and lora_a.dtype is dtype and lora_b.dtype is dtype
        and (bias is None or (bias.shape == (d,) and bias.dtype is dtype))
    )  # fmt: skip


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


