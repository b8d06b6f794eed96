"""What a report shows of a trained EM3: content against ID embeddings, nearest neighbours by content, the machine."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .report.summary import Alignment, Card, Neighbours

if TYPE_CHECKING:
    from .run import Run

QUERIES, NEAREST = 8, 5


def machine() -> str:
    """Processor, cores and threads in words."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or an architecture whose file has no such line: the platform's own word stands
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@torch.no_grad()
def of_training(run: Run, arm: str, seed: int) -> dict[str, Any]:
    """``alignment`` and ``neighbours`` of a finished training."""
    training = run.training(arm, seed)
    before = _embeddings(training.model, training.read, run)
    training = run.trained(arm, seed)
    after = _embeddings(training.model, None, run)
    seen = torch.nonzero(run.batches.item_ids())[:, 0]
    texts = [run.data.items.texts[i] for i in seen.tolist()]
    found: dict[str, Any] = {"neighbours": _neighbours(run, training.model)}
    if before is not None and after is not None:
        drawn = [(sides[0][seen].numpy(), sides[1][seen].numpy()) for sides in (before, after)]
        numbers = {
            "mean cosine of an item's content and ID": [_cosine(*(side[seen] for side in sides)) for sides in (before, after)],
            "the same, content and another item's ID": [
                _cosine(sides[0][seen], sides[1][seen].roll(1, 0)) for sides in (before, after)
            ],
        }
        found["alignment"] = Alignment.from_embeddings(drawn[0], drawn[1], texts, numbers=numbers)
    return found


def _embeddings(model: Any, read: Any, run: Run) -> tuple[Tensor, Tensor] | None:
    """Content in the contrast's space and ID embeddings of all items, ``[n, V]`` each; None without a contrast."""
    em3 = getattr(model, "model", model)
    if em3.to_id is None:
        return None
    if read is not None:
        model.refresh(read)
    return em3.to_id(em3.bank), em3.ranker.item_embedding(run.batches.item_ids())


def _cosine(content: Tensor, ids: Tensor) -> float:
    return float(F.cosine_similarity(content, ids, dim=1).mean())


def _neighbours(run: Run, model: Any) -> list[Neighbours]:
    """Items with pictures, evenly spaced over the catalogue, and what is nearest to each by cosine in the bank."""
    items = run.data.items
    bank = F.normalize(getattr(model, "model", model).bank - getattr(model, "model", model).bank.mean(0), dim=1)
    pictured = [i for i, path in enumerate(items.pictures) if path is not None] or list(range(len(items.ids)))
    queries = [pictured[i * len(pictured) // QUERIES] for i in range(min(QUERIES, len(pictured)))]
    found = []
    for query in queries:
        similarity = bank @ bank[query]
        similarity[query] = -torch.inf
        nearest = similarity.topk(min(NEAREST, len(items.ids) - 1))
        cards = [_card(run, i, float(s)) for s, i in zip(nearest.values, nearest.indices.tolist(), strict=True)]
        found.append(Neighbours(_card(run, query, None), cards))
    return found


def _card(run: Run, item: int, similarity: float | None) -> Card:
    path = run.data.items.pictures[item]
    return Card(run.data.items.texts[item] or run.data.items.ids[item], None if path is None else str(path.resolve()), similarity)
