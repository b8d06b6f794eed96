"""``lora_linear`` against the two thin layers of the textbook, a loop over adapters, and PEFT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import em3
from em3 import reference

from .forms import Call, Dims, Form, Inputs, Operation, Work, leaves

SCALING = 2.0


def make(dims: Dims, device: str, dtype: torch.dtype) -> Inputs:
    t, c, d, r, g = (dims[key] for key in ("T", "C", "D", "R", "G"))
    several = (g,) if g else ()

    def to(tensor: Tensor, trained: bool = True) -> Tensor:
        return tensor.to(device, dtype).requires_grad_(trained)

    return {
        "x": to(torch.randn(t, c)), "weight": to(torch.randn(d, c) / c**0.5, False), "bias": to(torch.randn(d), False),
        "lora_a": to(torch.randn(*several, r, c) / c**0.5), "lora_b": to(torch.randn(*several, d, r) / r),
        "adapter": torch.randint(g, (t,)).to(device) if g else None, "scaling": SCALING,
    }  # fmt: skip


def ours(inputs: Inputs, backend: str) -> Tensor:
    return em3.ops.lora_linear(**inputs, backend=backend)


def truth(inputs: Inputs) -> Tensor:
    """With many adapters the plain form; the reference's loop would keep ``G`` masks of ``[T, D]``."""
    return reference.lora_linear(**inputs) if inputs["adapter"] is None else plain(inputs).forward()


def plain(inputs: Inputs) -> Call:
    x, weight, bias, a, b = (inputs[name] for name in ("x", "weight", "bias", "lora_a", "lora_b"))

    def low_rank() -> Tensor:
        if inputs["adapter"] is None:
            return F.linear(F.linear(x, a), b)
        # Each row's own adapter is gathered: Punica's baseline "Gather-BMM".
        return torch.bmm(b[inputs["adapter"]], torch.bmm(a[inputs["adapter"]], x[..., None]))[..., 0]  # [T, D]

    return Call(lambda: F.linear(x, weight, bias) + SCALING * low_rank(), leaves(inputs))


def loop(inputs: Inputs) -> Call:
    """One adapter after the other. Which rows belong to whom is known beforehand: the best a loop can hope for."""
    x, a, b = (inputs[name] for name in ("x", "lora_a", "lora_b"))
    rows = [(inputs["adapter"] == g).nonzero()[:, 0] for g in range(len(a))]

    def forward() -> Tensor:
        y = F.linear(x, inputs["weight"], inputs["bias"])
        for g, mine in enumerate(rows):
            y.index_add_(0, mine, SCALING * F.linear(F.linear(x[mine], a[g]), b[g]))
        return y

    return Call(forward, leaves(inputs))


def peft_model(weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> tuple[Any, Any]:
    """A linear layer in a model of PEFT, with the adapter's values as its own parameters; returns model and layer."""
    from peft import get_peft_model

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    model: Any = get_peft_model(nn.Sequential(linear), _peft_config(a, scaling))
    layer: Any = model.base_model.model[0]
    for part, value in zip(_parts(layer, "default"), (a, b), strict=True):
        part.weight = nn.Parameter(value.detach())
    return model, layer


def _peft_config(a: Tensor, scaling: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=len(a), lora_alpha=int(scaling * len(a)), lora_dropout=0.0, target_modules=["0"])


def _parts(layer: Any, adapter: str) -> tuple[Any, Any]:
    return layer.lora_A[adapter], layer.lora_B[adapter]


def peft(inputs: Inputs) -> Call:
    """One adapter, as PEFT trains it; several in PEFT's batch of mixed adapters, where each row bears the name of its own.
    PEFT means the latter for inference and its models refuse it in training, but the gradients are right."""
    a, b, adapter, scaling = (inputs[name] for name in ("lora_a", "lora_b", "adapter", "scaling"))
    first = (a, b) if adapter is None else (a[0], b[0])
    model, layer = peft_model(inputs["weight"], inputs["bias"], *first, scaling)
    if adapter is None:
        down, up = _parts(layer, "default")
        return Call(lambda: layer(inputs["x"]), {"x": inputs["x"], "lora_a": down.weight, "lora_b": up.weight})
    for g, values in enumerate(zip(a.unbind(), b.unbind(), strict=True)):
        model.add_adapter(str(g), _peft_config(a[0], scaling))
        for part, value in zip(_parts(layer, str(g)), values, strict=True):
            del part.weight  # a parameter, in whose place comes a part of one tensor, so that its gradient is one too
            part.weight = value
    names = [str(g) for g in adapter.tolist()]
    return Call(lambda: layer(inputs["x"], adapter_names=names), leaves(inputs))


def work(dims: Dims) -> Work:
    """``2 T C D`` FLOPs for the layer and ``2 T R (C + D)`` for the adapter forward; backward the first once more (the
    weight is frozen) and the second twice. Inputs are read once and results written once in each direction."""
    t, c, d, r = (dims[key] for key in ("T", "C", "D", "R"))
    layer, thin = 2 * t * c * d, 2 * t * r * (c + d)
    weights = c * d + max(dims["G"], 1) * r * (c + d)
    return Work(layer + thin, layer + 2 * thin, t * (c + d) + weights, t * (2 * c + d) + 2 * weights)


def _too_many(dims: Dims, device: str) -> str | None:
    return "it takes minutes to add so many adapters" if dims["G"] > 256 else None


def _no_loop(dims: Dims, device: str) -> str | None:
    return None if dims["G"] else "one adapter needs no loop"


OPERATION = Operation(
    "lora_linear", make, truth, plain, ours, work, work,
    (Form("loop", loop, work, refuses=_no_loop), Form("peft", peft, work, package="peft", refuses=_too_many)),
)  # fmt: skip
