"""PEFT's ``lora.Linear``, served by ``lora_linear``."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers._given import not_plain
from ..ops._checks import autocast_is_on
from ..ops.lora_linear import lora_linear
from ._foreign import loaded
from ._patched import Patched, say_once, subclass

WHAT = "linear layers with LoRA adapters of PEFT (lora.Linear)"
_PLACE = ("peft.tuners.lora.layer", "Linear")


class Served(Patched):
    em3_op = "lora_linear"

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., C]`` -> ``[..., D]``; ``adapter_names`` holds an adapter, or ``"__base__"``, for each ``x[i]``."""
        given = dict(kwargs)
        names = given.pop("adapter_names", None)
        rest = [*args, *(value for value in given.values() if value is not None)]
        used, known = self.active_adapters if names is None else names, self._modules["lora_A"]._modules
        used = [name for name in dict.fromkeys(used) if name in known]
        why = None
        if rest or not isinstance(x, Tensor):
            why = "it has arguments besides the input"
        elif names is not None and (len(names) != len(x) or x.dim() < 2):
            why = "adapter_names do not fit the input"
        elif used and not (self.disable_adapters or self.merged):
            why = _unserved(self, x, used, alone=names is None and len(used) == 1)
            if why is None:
                return _mixed(self, x, used, names) if names is not None else _same(self, x, used)
        if why is not None:
            say_once(f"a call of {self.em3_class.__name__}", why)
        own: Tensor = super().forward(x, *args, **kwargs)  # also where no adapter is in use
        return own


def serves(module: nn.Module, name: str) -> bool:
    return type(module) in loaded([_PLACE])


def refusal(module: Any) -> str | None:
    """Why no call of a module could be served as it is now."""
    why = not_plain(module.base_layer)
    if why is not None:
        return f"base_layer {why}"
    reasons = [_never(module, name) for name in module.lora_A]
    return None if None in reasons else "; ".join(str(reason) for reason in reasons)


def never_a_product(layer: Any) -> str | None:
    """Why :func:`weight_of` could not say in any call what a layer multiplies with."""
    return refusal(layer) if _adapted(layer) else not_plain(layer)


def _adapted(layer: object) -> bool:
    return isinstance(layer, loaded([_PLACE]))


def weight_of(layer: Any) -> tuple[Tensor, Tensor | None] | str:
    """The weight and bias with which a layer multiplies, gradients to adapters included; or why there are none."""
    if not _adapted(layer):
        why = not_plain(layer)
        return (layer.weight, layer.bias) if why is None else why
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "had hooks, which would not be called"
    why = not_plain(layer.base_layer)
    if why is not None:
        return f"base_layer {why}"
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if layer.disable_adapters:
        return "was to be unmerged" if layer.merged else (weight, bias)
    if layer.merged:
        return weight, bias
    for name in [name for name in layer.active_adapters if name in layer.lora_A]:
        why = _never(layer, name) or _drops(layer, name)
        if why is None and (weight.dtype != layer.lora_A[name].weight.dtype or weight.dtype not in (torch.float32, torch.float64)):
            why = f"adapter {name!r} would be rounded away in {weight.dtype}"
        if why is not None:
            return why
        weight = torch.addmm(weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
    return weight, bias


def _unserved(module: Any, x: Tensor, used: list[str], alone: bool) -> str | None:
    """Why this call cannot be served with the adapters that it uses."""
    base = module.base_layer
    why = not_plain(base)
    if why is not None:
        return f"base_layer {why}"
    for name in used:
        why = _never(module, name) or (None if alone else _drops(module, name))
        dtype, of_layer = _part(module, "lora_A", name).weight.dtype, base.weight.dtype
        if why is None and not (x.dtype == of_layer == dtype or autocast_is_on(x.device)):
            why = f"adapter {name!r} was {dtype}, must be {of_layer} like its layer and {x.dtype} input"
        if why is not None:
            return why
    return None


def _never(module: Any, name: str) -> str | None:
    """Why an adapter cannot be served in any call."""
    if name in module.lora_variant:
        return f"adapter {name!r} was of {type(module.lora_variant[name]).__name__}, must be plain LoRA"
    if module.lora_bias.get(name, False):
        return f"adapter {name!r} had a bias"
    for part in ("lora_A", "lora_B"):
        why = not_plain(_part(module, part, name))
        if why is not None:
            return f"{part} of adapter {name!r} {why}"
    dropout = _part(module, "lora_dropout", name)
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout of adapter {name!r} was {type(dropout).__name__}, must be torch.nn.Dropout"
    return None


def _part(module: Any, part: str, name: str) -> Any:
    """``module.part[name]``, past the look-up of two modules' attributes, which takes longer than a check made with it."""
    return module._modules[part]._modules[name]


def _probability(module: Any, name: str) -> float:
    """With which an adapter drops parts of its input now."""
    dropout = _part(module, "lora_dropout", name)
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _drops(module: Any, name: str) -> str | None:
    return f"adapter {name!r} drops parts of its input" if _probability(module, name) else None


def _same(module: Any, x: Tensor, used: list[str]) -> Tensor:
    """All rows use the same adapters: several side by side are one of their ranks' sum."""
    base, scalings = module.base_layer, module.scaling
    factors = [(_part(module, "lora_A", n).weight, _part(module, "lora_B", n).weight, scalings[n]) for n in used]
    if len(factors) == 1:
        a, b, scaling = factors[0]
        return lora_linear(x, base.weight, base.bias, a, b, scaling=scaling, dropout=_probability(module, used[0]))
    a, b = torch.cat([a for a, _, _ in factors]), torch.cat([scaling * b for _, b, scaling in factors], 1)
    return lora_linear(x, base.weight, base.bias, a, b)


def _mixed(module: Any, x: Tensor, used: list[str], names: list[str]) -> Tensor:
    base = module.base_layer
    number = {name: g for g, name in enumerate(used)}
    of_items = torch.tensor([number.get(name, -1) for name in names], device=x.device)
    adapter = of_items.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    each = [(module.lora_A[name].weight, module.lora_B[name].weight) for name in used]
    rank = max(len(a) for a, _ in each)
    a = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a, _ in each])  # [G, R, C]
    b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b in each])  # [G, D, R]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scaling = torch.tensor([module.scaling[name] for name in used], device=x.device, dtype=wide)
    return lora_linear(x, base.weight, base.bias, a, b, scaling=scaling, adapter=adapter)


def __getattr__(name: str) -> type:
    """The class of patched modules, for who unpickles one."""
    if name == f"Patched{_PLACE[1]}":
        return subclass(Served, getattr(importlib.import_module(_PLACE[0]), _PLACE[1]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
