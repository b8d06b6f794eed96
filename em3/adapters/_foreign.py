"""Classes of packages that may not be there, and what can be read off their layers."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor, nn

from ..layers._given import not_plain

QFORMERS = {
    "transformers.models.blip_2.modeling_blip_2": "Blip2",
    "transformers.models.instructblip.modeling_instructblip": "InstructBlip",
    "transformers.models.instructblipvideo.modeling_instructblipvideo": "InstructBlipVideo",
}


def loaded(names: Iterable[tuple[str, str]]) -> tuple[type, ...]:
    """The classes ``(module, name)`` whose modules are imported: nothing can be an instance of the others."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return tuple(cls for cls in found if cls is not None)


def qformer_classes(suffix: str) -> tuple[type, ...]:
    """``Blip2QFormer{suffix}`` and its like, where transformers has been asked for them."""
    return loaded((module, f"{prefix}QFormer{suffix}") for module, prefix in QFORMERS.items())


def plain_parameters(layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer.

    Raises:
        ValueError: if it is not just that, as one that PEFT has wrapped.
    """
    why = not_plain(layer)
    if why is not None:
        raise ValueError(f"{name}: {why}; merge or remove what was added to it")
    return layer.weight, layer.bias  # type: ignore[return-value]
