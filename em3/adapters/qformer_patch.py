"""The cross-attention of transformers' Q-Formers, served by ``qformer_attention``."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.qformer_attention import qformer_attention
from ..ops.qformer_attention_weights import qformer_attention_weights
from ._foreign import QFORMERS, qformer_classes
from ._patched import Patched, say_once, subclass
from .lora_patch import never_a_product, weight_of

WHAT = "the cross-attention of a transformers Q-Former (BLIP-2, InstructBLIP)"
_Weights = tuple[Tensor, Tensor | None]
_ARGUMENTS = ["self", "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "kwargs"]


class Served(Patched):
    em3_op = "qformer_attention"

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None,
                encoder_attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The heads' outputs side by side ``[B, Q, D]``, which the next module projects, and the map ``[B, H, Q, N]`` or None."""
        why, seen = _seen(encoder_hidden_states, encoder_attention_mask)
        key, value = weight_of(self.key), weight_of(self.value)
        why = why or _first_reason(key, value)
        if why is not None or encoder_hidden_states is None:
            say_once(f"a call of {self.em3_class.__name__}", str(why))
            own: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask, **kwargs,
            )  # fmt: skip
            return own
        query, tokens = self.query(hidden_states), encoder_hidden_states  # [B or 1, Q, D], [B or 1, N, C]
        if len(tokens) == 1:
            tokens = tokens.expand(len(query), -1, -1)
        elif len(query) == 1:
            query = query[0]  # shared by all items
        (w_k, b_k), (w_v, b_v) = cast(_Weights, key), cast(_Weights, value)
        of = dict(num_heads=self.num_attention_heads, scale=self.scaling,
                  masks=[None if seen is None else seen.expand(len(tokens), -1)])  # fmt: skip
        out = qformer_attention(
            query, [tokens], None, [w_k], [w_v], None, None, [b_k], [b_v],
            dropout=self.attention_dropout if self.training else 0.0, **of,
        )  # fmt: skip
        if not kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            return out, None
        (found,) = qformer_attention_weights(query, [tokens], None, [w_k], None, [b_k], **of)
        return out, found  # type: ignore[return-value]  # of a padded stream


def serves(module: nn.Module, name: str) -> bool:
    """The attention among the queries has the same class; it is told by its place, ``layer.attention.attention``."""
    return type(module) in qformer_classes("MultiHeadAttention") and not f".{name}".endswith(".attention.attention")


def refusal(module: Any) -> str | None:
    """Why a module cannot be served as it is now."""
    takes = list(inspect.signature(type(module).forward).parameters)
    if takes != _ARGUMENTS:
        return f"its forward takes {', '.join(takes[1:])}, must take {', '.join(_ARGUMENTS[1:])}, as in transformers 5"
    return _first_reason(never_a_product(module.key), never_a_product(module.value))


def _first_reason(key: object, value: object) -> str | None:
    return next((f"{name} {of}" for name, of in (("key", key), ("value", value)) if isinstance(of, str)), None)


def _seen(tokens: Tensor | None, mask: Any) -> tuple[str | None, Tensor | None]:
    """Why this call cannot be served, or which tokens are real, ``[B or 1, N]``, None for all."""
    if tokens is None:
        return "it has no encoder_hidden_states", None
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        was = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return f"encoder_attention_mask was {was}, must be [B, N] or [B, 1, Q, N]", None
    if mask.dim() == 2:
        return None, mask.bool()
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"encoder_attention_mask [B, 1, Q, N] was {mask.dtype}, must be torch.bool or what is added to the scores", None
    first = mask[:, :1, :1]
    fine = (mask == first).all()
    if mask.dtype != torch.bool:  # what is added to the scores
        real = first == 0
        # An item without tokens reads all of them evenly there.
        fine = fine & (real | (first <= torch.finfo(mask.dtype).min)).all() & real.any(-1).all()
        first = real
    must = "encoder_attention_mask must be the same for all queries and heads, let each token in or not, and some in"
    if torch.compiler.is_compiling():
        torch._assert_async(fine, must)
    elif not bool(fine):
        return must, None
    return None, first[:, 0, 0]


def __getattr__(name: str) -> type:
    """The classes of patched modules, for who unpickles one."""
    for module, prefix in QFORMERS.items():
        if name == f"Patched{prefix}QFormerMultiHeadAttention":
            return subclass(Served, getattr(importlib.import_module(module), name.removeprefix("Patched")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
