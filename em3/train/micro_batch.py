"""A step's gradients part by part: the contrast is that of the whole batch, memory holds the activations of one part.

Content embeddings are few numbers an item; what made them is many. So they are computed once without a graph, the losses
are differentiated to them, and then computed once more, part by part, each with its share of that gradient. The gradients are
exact: those of the step in one piece, but for the order of sums. The price is a second forward of the content.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batch
from ..models import EM3
from ..models.em3 import Losses


def backward(model: nn.Module, batch: Batch, read: Callable[[Tensor], Any] | None, size: int) -> Losses:
    """Add the gradients of a step to the parameters' ``grad``; the losses that come back have no graph.

    Dropout draws a part's masks once: they are the same when its content is computed again. They are other masks than
    those of a step in one piece.

    Args:
        model: an :class:`em3.EM3`, a module that holds one as ``model``, or an ``IDOnly``.
        read: item numbers -> streams of their tokens, as the training's; None for a model that reads none.
        size: rows of the batch, and distinct items, whose activations are there at a time.
    """
    inner: Any = getattr(model, "model", model)
    if read is None and isinstance(inner, EM3) and not inner.caches_history:
        raise ValueError("read: was None, must give the tokens of items for a model with history='full'")
    content = torch.empty(0, 0)
    contrast: Tensor | None = None
    parts: list[Tensor] = []
    states = []

    def computed(items: Tensor) -> Tensor:
        made: Tensor = inner.content_of(items, None if read is None else read(items))
        return made

    if isinstance(inner, EM3):
        parts = list((batch.distinct if read is None else inner.items(batch)).split(size))
        with torch.no_grad():
            made = []
            for items in parts:
                states.append(_random_state(inner.bank.device))
                made.append(computed(items))
        content = torch.cat(made).requires_grad_()
        if inner.contrast is not None:
            loss = inner.contrast_of(batch, inner.sources(batch, content)[0])
            (inner.contrast_weight * loss).backward()
            contrast = loss.detach()
    total, each = len(batch.label), []
    for start in range(0, total, size):
        rows = batch.part(start, min(start + size, total))
        logits = inner.logits(rows, content, batch)
        loss = F.binary_cross_entropy_with_logits(logits, rows.label.to(logits.dtype), reduction="sum") / total
        loss.backward()
        each.append(loss.detach())
    ranking = torch.stack(each).sum()
    if isinstance(inner, EM3) and content.grad is not None:
        for items, state, gradient in zip(parts, states, content.grad.split(size), strict=True):
            device = inner.bank.device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.set_rng_state(state[0])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(state[1], device)
                again = computed(items)
                if again.requires_grad:  # frozen features may have nothing to train
                    again.backward(gradient)
    if contrast is None:
        return Losses(ranking, ranking, ranking.new_zeros(()), content.detach())
    return Losses(ranking + inner.contrast_weight * contrast, ranking, contrast, content.detach())


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU, and of the GPU that the model is on."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
