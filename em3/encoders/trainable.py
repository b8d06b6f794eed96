"""Which parameters of an encoder the ranking loss may change."""

from __future__ import annotations

import torch
from torch import nn

from .base import Encoder, EncoderError

MODES = ("frozen", "lora", "last_n")


def set_trainable(encoder: Encoder, mode: str, *, last_n: int = 2, rank: int = 8, seed: int = 0) -> None:
    """Choose what is trained of ``encoder``, in place.

    - ``"frozen"``: nothing; the encoder stays in evaluation mode whatever is called on the model around it.
    - ``"last_n"``: the last ``last_n`` layers and the norm behind them. The layers are the longest ``nn.ModuleList``.
    - ``"lora"``: PEFT's LoRA of ``rank`` and scaling 1 on the linear projections of the layers' attention, which starts
      as the identity. An encoder with LoRA is saved with it, and cannot be changed to another mode.

    Raises:
        EncoderError: for an unknown mode, numbers out of range, an encoder whose layers or projections are not found,
            one that has LoRA already, or if peft is missing.
    """
    if mode not in MODES:
        raise EncoderError(f"mode: was {mode!r}, must be one of {', '.join(MODES)}")
    if encoder.trained is not None and encoder.trained["mode"] == "lora":
        raise EncoderError("encoder: has LoRA already, must be loaded again without it to be changed")
    if mode == "frozen":
        chosen: set[str] = set()
        encoder.trained = {"mode": mode}
    elif mode == "last_n":
        chosen = _last(encoder, last_n)
        encoder.trained = {"mode": mode, "last_n": last_n}
    else:
        _add_lora(encoder, rank, seed)
        chosen = {name for name, _ in encoder.named_parameters() if ".lora_" in name}
        encoder.trained = {"mode": mode, "rank": rank}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in chosen)
    encoder.train(encoder.training)


def _layers(encoder: Encoder) -> tuple[str, nn.ModuleList]:
    """The transformer layers and their name: the longest list of modules."""
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise EncoderError(f"{type(encoder).__name__}: has no nn.ModuleList, so its layers cannot be told apart")
    return max(lists, key=lambda found: len(found[1]))


def _last(encoder: Encoder, last_n: int) -> set[str]:
    """Names of the parameters of the last layers and of every norm that comes after them."""
    name, layers = _layers(encoder)
    if not 1 <= last_n <= len(layers):
        raise EncoderError(f"last_n: was {last_n}, must be 1 to {len(layers)}, the number of layers")
    modules = [f"{name}.{index}" for index in range(len(layers) - last_n, len(layers))]
    behind = False
    for path, module in encoder.named_modules():
        inside = path == name or path.startswith(f"{name}.")
        behind = behind or inside
        if behind and not inside and "norm" in type(module).__name__.lower():
            modules.append(path)
    return {p for p, _ in encoder.named_parameters() if p.startswith(tuple(f"{module}." for module in modules))}


def _add_lora(encoder: Encoder, rank: int, seed: int) -> None:
    try:
        import peft
    except ImportError as error:
        raise EncoderError(f"mode 'lora' needs peft: pip install 'em3[hf]' ({error})") from error
    if rank < 1:
        raise EncoderError(f"rank: was {rank}, must be at least 1")
    name, layers = _layers(encoder)
    projections = [
        f"{name}.{path}"
        for path, module in layers.named_modules()
        if isinstance(module, nn.Linear) and "att" in path.rpartition(".")[0].lower()
    ]
    if not projections:
        raise EncoderError(f"{type(encoder).__name__}: no nn.Linear inside an attention module of {name} to adapt")
    with torch.random.fork_rng(devices=[encoder.device] if encoder.device.type == "cuda" else []):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=projections), encoder, adapter_name="em3"
        )
