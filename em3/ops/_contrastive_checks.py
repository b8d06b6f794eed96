"""Checks of what ``contrastive_loss`` and ``contrastive_metrics`` are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from . import _contrastive_terms as terms

DUPLICATES = ("mask", "positive", "keep")
REDUCTIONS = ("mean", "sum", "none")


ROUNDING = 1e-4  # that a probability of 1 may have before its logarithm is taken


def embeddings(content: Any, ids_embedding: Any, negatives: Any) -> None:
    """Before anything is asked of them."""
    for name, given in {"content": content, "ids_embedding": ids_embedding, "negatives": negatives}.items():
        if given is None and name == "negatives":
            continue
        _checks.tensor(given, name, " [K, V]" if name == "negatives" else " [B, V]")
        _checks.floating(given, name)
        if given.layout != torch.strided:
            raise ValueError(f"{name}: was of layout {given.layout}, must be torch.strided: make it so by .to_dense()")


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
    given: dict[str, Tensor | None] = {} if item_ids is None else {"item_ids": item_ids}
    for name, tensor in (("log_q", log_q), ("weight", weight)):
        if tensor is not None:
            _checks.shape(tensor, [b], name)
            given[name] = _floating(tensor, name)
    for name, number in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if isinstance(number, Tensor):
            if number.numel() != 1:
                raise ValueError(f"{name}: was {list(number.shape)}, must be a number or a tensor with one element")
            given[name] = _floating(number, name)
        elif not _checks.is_number(number) and not (number is None and name == "logit_bias"):
            raise ValueError(f"{name}: was {type(number).__name__}, must be a number or a tensor with one element")
    _checks.same_device("content", content, given)


def _floating(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: was {tensor.dtype}, must be of a floating-point dtype")
    return tensor


def log_probabilities(offset: Tensor | None) -> None:
    """Whether offsets, which are ``-log_q``, come from logarithms of probabilities, and not from probabilities or from one of
    0: on the CPU, and elsewhere under ``em3.debug_checks()``, for looking waits for the device."""
    if offset is None or not _checks.looks(offset):
        return
    least, most = (float(-end) for end in torch.aminmax(offset.detach())[::-1])
    if not most <= ROUNDING or least == -float("inf"):
        raise ValueError(
            f"log_q: held {least if least == -float('inf') else most:.4g}, must be at most 0 and finite, the logarithm of a "
            "probability above 0 (q.log() of probabilities q)"
        )


def weights(weight: Tensor | None) -> None:
    """Where they may be looked at, as above, and no graph is traced."""
    if weight is None or torch.compiler.is_compiling() or not _checks.looks(weight):
        return
    least, most = (float(end) for end in torch.aminmax(weight.detach()))
    if not 0 <= least <= most < float("inf"):
        raise ValueError(f"weight: held {least if not least >= 0 else most:.4g}, must be at least 0 and finite")


def refused(offset: Tensor | None, weight: Tensor | None) -> ValueError | None:
    """Why the content of ``-log_q`` or of the weights is refused, to be told to the other ranks before it is raised."""
    if torch.compiler.is_compiling():
        return None
    try:
        log_probabilities(offset)
        weights(weight)
    except ValueError as error:
        return error
    return None


def process_group(group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"group: was {type(group).__name__}, must be a torch.distributed.ProcessGroup that this process belongs to, such as "
            "torch.distributed.group.WORLD after init_process_group"
        )


def kind_options(kind: str, logit_bias: float | Tensor | None, label_smoothing: float) -> None:
    _checks.one_of(kind, terms.KINDS, "kind")
    if not _checks.is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
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


def options(has_ids: bool, has_negatives: bool, duplicates: str, direction: str, normalize: bool) -> None:
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize: was {normalize!r}, must be True or False")
    _checks.one_of(duplicates, DUPLICATES, "duplicates")
    _checks.one_of(direction, terms.DIRECTIONS, "direction")
    if duplicates == "positive" and not has_ids:
        raise ValueError("item_ids: was None, must be given for duplicates='positive', which asks which rows are one item")
    if has_negatives and direction == "id_to_content":
        raise ValueError(
            "negatives: were given with direction='id_to_content', which contrasts with content rows and would ignore "
            "these ID embeddings; must be None, or use direction='both' or 'content_to_id'"
        )
