"""``contrastive_loss`` against the full matrix of logits with two cross entropies: time, and peak memory at 16,384."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import em3

from . import measure

V = 128

MEMORY = """
import em3
from benchmarks.contrastive_loss import {form}, inputs
content, ids, scale = inputs(16384)
small = inputs(64)
torch.autograd.grad({form}(*small), small)
# measure
torch.autograd.grad({form}(content, ids, scale), (content, ids, scale))
"""


def inputs(b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    content = torch.randn(b, V)
    return content.requires_grad_(), (content.detach() + torch.randn(b, V)).requires_grad_(), torch.tensor(14.0).requires_grad_()


def full_matrix(content: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * F.normalize(content, dim=-1) @ F.normalize(ids, dim=-1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def tiled(content: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return em3.ops.contrastive_loss(content, ids, logit_scale=scale, backend="torch")


def rows() -> Iterator[dict]:
    for b in (256, 1024, 2048, 8192, 16384):
        leaves = inputs(b)
        calls = {
            "full matrix": lambda a=leaves: torch.autograd.grad(full_matrix(*a), a),
            "torch": lambda a=leaves: torch.autograd.grad(tiled(*a), a),
        }
        measure.same_function({name: call() for name, call in calls.items()})
        note = ""
        if b == 16384:
            whole, ours = (measure.peak_memory(MEMORY.format(form=f)) for f in ("full_matrix", "tiled"))
            note = f"peak memory above the inputs: {ours:.0f} MiB against {whole:.0f} MiB"
        yield measure.row("contrastive_loss", f"B={b} V={V}", "full matrix", measure.medians(calls, least=3), note)
