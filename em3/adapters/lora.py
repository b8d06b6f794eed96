"""Adapters of PEFT in :class:`em3.LoRALinear` and back: its folder, a configuration and a safetensors file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import atomic
from ..layers import LoRALinear
from ..layers._given import not_plain

DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
CONFIG, STATE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight$")
# What makes an adapter another formula, or reaches beyond the linear layers that it adapts.
_NOT_PLAIN = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "alora_invocation_tokens",
    "arrow_config", "velora_config", "monteclora_config", "kasa_config", "target_parameters", "trainable_token_indices",
    "layer_replication",
)  # fmt: skip
# Initialisations that change the weight under the adapter.
_MOVES_THE_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_lora(model: nn.Module, source: Any) -> dict[str, LoRALinear]:
    """Put PEFT's adapter around the linear layers of ``model`` that it was trained for, in place.

    Each becomes an :class:`em3.LoRALinear` with the adapter's factors; its weight and bias are taken over, and frozen.

    Args:
        model: the base model, without PEFT.
        source: PEFT's folder, or a pair of a ``LoraConfig`` (or a mapping of its fields) and a state dict as
            ``peft.get_peft_model_state_dict`` returns it; :func:`read_lora` makes such a pair of a folder.

    Returns:
        The new layers by their names in ``model``.

    Raises:
        ValueError: before anything is changed: for an adapter that is not plain LoRA on linear layers, whose dtype is not
            its layer's, or that does not fit the model.
    """
    config, state = source if isinstance(source, tuple) else read_lora(source)
    fields = _fields(config)
    _check_plain(fields)
    factors = _factors_of(state)
    made: dict[str, LoRALinear] = {}
    modules = dict(model.named_modules())
    for name, (a, b) in factors.items():
        linear = _linear(modules, name)
        _check_fit(name, linear, a, b, _of_layer(fields, "r", "rank_pattern", name))
        alpha = _of_layer(fields, "lora_alpha", "alpha_pattern", name)
        # An empty layer, lest what follows fails halfway: its weight is the model's and only taken over at the end.
        made[name] = LoRALinear(
            a.shape[1], len(b), len(a), alpha=alpha, bias=linear.bias is not None, use_rslora=fields.get("use_rslora", False),
            dropout=fields.get("lora_dropout", 0.0), device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
    for name, layer in made.items():
        linear = _linear(modules, name)
        layer.weight, layer.bias = linear.weight.requires_grad_(False), linear.bias
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
        for of_layer, given in zip(("lora_a", "lora_b"), factors[name], strict=True):
            setattr(layer, of_layer, nn.Parameter(given.detach().to(linear.weight.device, copy=True)))
        layer.train(linear.training)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return made


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of all :class:`em3.LoRALinear` of ``model`` under PEFT's names, as ``get_peft_model_state_dict`` has them.

    Raises:
        ValueError: if there are none, or one holds several adapters.
    """
    state = {}
    for name, layer in _layers(model).items():
        for factor, value in (("A", layer.lora_a), ("B", layer.lora_b)):
            state[f"base_model.model.{name}.lora_{factor}.weight"] = value.detach().contiguous()
    return state


def save_lora(model: nn.Module, folder: str | Path, config: Any = None) -> None:
    """Write the adapters of all :class:`em3.LoRALinear` of ``model`` as a folder that PEFT loads.

    Args:
        model: which held ``torch.nn.Linear`` in their place.
        folder: made if needed.
        config: the ``LoraConfig`` that they came with, written as it is; by default one is made that names these layers.

    Raises:
        ValueError: if there are none, if one holds several adapters, or is not what ``config`` says.
    """
    layers = _layers(model)
    fields = _made_config(layers) if config is None else _fields(config)
    _check_plain(fields)
    _check_targets(fields, layers)
    for name, layer in layers.items():
        for attribute, field, pattern in (("rank", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
            says, has = _of_layer(fields, field, pattern, name), getattr(layer, attribute)
            if says != has:
                raise ValueError(f"config.{field}: was {says} for {name}, must be {has}, the layer's {attribute}")
        for field, has in (("use_rslora", layer.use_rslora), ("lora_dropout", layer.dropout)):
            if fields.get(field, type(has)()) != has:
                raise ValueError(f"config.{field}: was {fields.get(field)}, must be {has} as in {name}")
    from safetensors.torch import save

    with atomic(Path(folder) / STATE) as file:
        file.write(save(lora_state(model), metadata={"format": "pt"}))
    with atomic(Path(folder) / CONFIG) as file:
        file.write(json.dumps(fields, indent=2, sort_keys=True).encode())


def read_lora(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of PEFT's configuration and its state dict, as a folder of PEFT's holds them."""
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text())
    return config, load_file(Path(folder) / STATE)


def _fields(config: Any) -> dict[str, Any]:
    """Of a ``LoraConfig`` or a mapping, as JSON has them."""
    if not isinstance(config, Mapping):
        if not callable(getattr(config, "to_dict", None)):
            raise ValueError(f"config: was {type(config).__name__}, must be a peft.LoraConfig or a mapping of its fields")
        config = config.to_dict()
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in config.items()}


def _check_plain(fields: Mapping[str, Any]) -> None:
    kind = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"config.peft_type: was {kind!r}, must be 'LORA'")
    for name in _NOT_PLAIN:
        if fields.get(name):
            raise ValueError(f"config.{name}: was {fields[name]!r}, must be unset: LoRALinear is plain LoRA")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"config.bias: was {fields['bias']!r}, must be 'none': LoRALinear trains no bias beside its adapter")
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_MOVES_THE_WEIGHT):
        raise ValueError(
            f"config.init_lora_weights: was {start!r}, which changes the weight under the adapter; convert it with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _check_targets(fields: Mapping[str, Any], layers: Mapping[str, LoRALinear]) -> None:
    """A folder whose configuration names other layers loads as another model."""
    for name in layers:
        for field, must in (("target_modules", True), ("exclude_modules", False)):
            if fields.get(field) and _names(fields[field], name) != must:
                raise ValueError(f"config.{field}: was {fields[field]!r}, must {'name' if must else 'not name'} {name}, "
                                 "which the model has an adapter for")  # fmt: skip


def _names(given: str | Sequence[str], layer: str) -> bool:
    """Whether a field of names names a layer, as PEFT reads it: a pattern of whole names, or names' ends."""
    if isinstance(given, str):
        return given == "all-linear" or re.fullmatch(given, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in given)


def _factors_of(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """``A [R, C]`` and ``B [D, R]`` of each layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _KEY.match(key)
        if match is None:
            raise ValueError(f"state: held {key!r}, must hold base_model.model.LAYER.lora_A.weight and lora_B.weight only")
        found.setdefault(match["layer"], {})[match["factor"]] = value
    for name, factors in found.items():
        if factors.keys() != {"A", "B"}:
            raise ValueError(f"state: held lora_{'A' if 'A' in factors else 'B'} of {name} alone, must hold both factors")
    if not found:
        raise ValueError("state: was empty, must hold the factors of at least one layer")
    return {name: (factors["A"], factors["B"]) for name, factors in found.items()}


def _linear(modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    module = modules.get(name)
    why = "is missing" if module is None else not_plain(module)
    if why is not None:
        raise ValueError(f"model.{name}: {why}, which the adapter was trained for")
    assert isinstance(module, nn.Linear)
    return module


def _check_fit(name: str, linear: nn.Linear, a: Tensor, b: Tensor, rank: int) -> None:
    d, c = linear.weight.shape
    for factor, value, must in (("A", a, [rank, c]), ("B", b, [d, rank])):
        if list(value.shape) != must:
            raise ValueError(f"{name}.lora_{factor}: was {list(value.shape)}, must be {must}")
        if value.dtype != linear.weight.dtype:
            raise ValueError(
                f"{name}.lora_{factor}: was {value.dtype}, must be {linear.weight.dtype} like its layer: convert one of them"
            )


def _of_layer(fields: Mapping[str, Any], field: str, pattern: str, name: str) -> Any:
    """A field of the configuration for a layer, found as PEFT finds it."""
    for key, value in (fields.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return fields.get(field, DEFAULTS[field])


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(f"model: was {type(model).__name__} without an em3.LoRALinear, must hold one")
    for name, layer in layers.items():
        if layer.num_adapters is not None:
            raise ValueError(f"{name}.num_adapters: was {layer.num_adapters}, must be None: a folder of PEFT's holds one adapter")
    return layers


def _made_config(layers: Mapping[str, LoRALinear]) -> dict[str, Any]:
    first = next(iter(layers.values()))
    for name in ("use_rslora", "dropout"):
        if len({getattr(layer, name) for layer in layers.values()}) > 1:
            raise ValueError(f"{name}: differed between layers, must be the same: PEFT has one for all")
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none", "inference_mode": True,
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout, "use_rslora": first.use_rslora,
        # Patterns of whole names, for PEFT would take any that ends like one.
        "target_modules": "|".join(re.escape(name) for name in layers),
        "rank_pattern": {f"^{re.escape(name)}": layer.rank for name, layer in layers.items()},
        "alpha_pattern": {f"^{re.escape(name)}": layer.alpha for name, layer in layers.items()},
    }  # fmt: skip
