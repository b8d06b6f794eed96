"""Checks of what ``contrastive_loss`` and ``contrastive_metrics`` are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from . import _contrastive_terms as terms

DUPLICATES = ("mask", "positive", "keep")
REDUCTIONS = ("mean", "sum", "none")


def tensors(content: Tensor, ids_embedding: Tensor, item_ids: Tensor | None, logit_scale: float | Tensor,
            logit_bias: float | Tensor | None, log_q: Tensor | None, weight: Tensor | None,
            negatives: Tensor | None) -> None:  # fmt: skip
    _checks.shape(content, ["B", "V"], "content")
    b, v = content.shape
    _checks.shape(ids_embedding, [b, v], "ids_embedding")
    if negatives is not None:
        _checks.shape(negatives, ["K", v], "negatives")
    _checks.same_device_and_dtype("content", content, {"ids_embedding": ids_embedding, "negatives": negatives})
    if item_ids is not None:
        _checks.shape(item_ids, [b], "item_ids")
        if item_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"item_ids: was {item_ids.dtype}, must be torch.int64 or torch.int32")
    numbers = {"log_q": log_q, "weight": weight}
    for name, tensor in numbers.items():
        if tensor is not None:
            _checks.shape(tensor, [b], name)
    for name, number in {"logit_scale": logit_scale, "logit_bias": logit_bias}.items():
        if isinstance(number, Tensor):
            if number.numel() != 1:
                raise ValueError(f"{name}: was {list(number.shape)}, must be a number or a tensor with one element")
            numbers[name] = number
        elif not isinstance(number, (int, float)) and not (number is None and name == "logit_bias"):
            raise ValueError(f"{name}: was {type(number).__name__}, must be a number or a tensor with one element")
    for name, tensor in numbers.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: was {tensor.dtype}, must be of a floating-point dtype")
    _checks.same_device("content", content, numbers | {"item_ids": item_ids})


def process_group(group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"group: was {type(group).__name__}, must be a torch.distributed.ProcessGroup that this process belongs to, such as "
            "torch.distributed.group.WORLD after init_process_group"
        )


def kind_options(kind: str, logit_bias: float | Tensor | None, label_smoothing: float) -> None:
    _checks.one_of(kind, terms.KINDS, "kind")
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: was {label_smoothing!r}, must be from 0 to 1")
    if kind == "sigmoid" and label_smoothing:
        raise ValueError(
            f"label_smoothing: was {label_smoothing} with kind='sigmoid', whose pairs have no other classes to share with; "
            "must be 0, or use kind='infonce'"
        )
    if kind == "sigmoid" and logit_bias is None:
        raise ValueError(
            "logit_bias: was None, must be a number or a tensor with one element for kind='sigmoid' (SigLIP starts at -10)"
        )
    if kind == "infonce" and logit_bias is not None:
        raise ValueError("logit_bias: was given with kind='infonce', where it cancels out; must be None, or use kind='sigmoid'")


def options(has_ids: bool, has_negatives: bool, duplicates: str, direction: str) -> None:
    _checks.one_of(duplicates, DUPLICATES, "duplicates")
    _checks.one_of(direction, terms.DIRECTIONS, "direction")
    if duplicates == "positive" and not has_ids:
        raise ValueError("item_ids: was None, must be given for duplicates='positive', which asks which rows are one item")
    if has_negatives and direction == "id_to_content":
        raise ValueError(
            "negatives: were given with direction='id_to_content', which contrasts with content rows and would ignore "
            "these ID embeddings; must be None, or use direction='both' or 'content_to_id'"
        )
