"""A training step of BLIP-2's Q-Former as transformers has it, and of the same one after ``em3.patch``.

Random weights from the model's own configuration, 257 tokens of width 1408 an image as its vision encoder makes them, frozen
as there. All of a Q-Former's layers come in pairs of which one reads the tokens, so a few pairs say what twelve layers would.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import em3

from .measure import Clock, trim

ROUNDS = 8
ARMS = ("transformers", "patched")


class Setting(NamedTuple):
    """What a step is measured at. BLIP-2 has 32 queries, and drops a tenth of the attention weights and of each block."""

    queries: int = 32  # Q
    dropout: float = 0.1
    batch: int = 8  # B
    layers: int = 4
    width: int = 768  # D
    heads: int = 12  # H
    tokens: int = 257  # N
    token_width: int = 1408  # C


SETTINGS = tuple(Setting(q, p) for q in (8, 16, 32) for p in (0.1, 0.0))


class Step:
    """Forward and backward of one Q-Former, patched or not: it is the same one, so that both arms have the same weights."""

    def __init__(self, of: Setting, device: str) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=of.width, num_hidden_layers=of.layers, num_attention_heads=of.heads, intermediate_size=4 * of.width,
            encoder_hidden_size=of.token_width, hidden_dropout_prob=of.dropout, attention_probs_dropout_prob=of.dropout,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model: Any = Blip2QFormerModel(config).train().to(device)
        self.query = torch.randn(1, of.queries, of.width).to(device).requires_grad_()
        self.tokens = torch.randn(of.batch, of.tokens, of.token_width).to(device)
        self.grad = torch.randn(of.batch, of.queries, of.width).to(device)

    def become(self, arm: str) -> None:
        (em3.patch if arm == "patched" else em3.unpatch)(self.model)

    def __call__(self) -> None:
        self.model.zero_grad()
        query = self.query.expand(len(self.tokens), -1, -1)  # as Blip2Model does
        out = self.model(query, encoder_hidden_states=self.tokens).last_hidden_state
        out.backward(self.grad)

    def results(self) -> list[Tensor]:
        """The gradients of all parameters, without dropout."""
        self.model.eval()
        self()
        self.model.train()
        return [p.grad.clone() for p in self.model.parameters()]


def training(of: Setting, device: str) -> list[dict[str, Any]]:
    """A row for each arm; they take turns. No time is given for arms that disagree, and none without transformers."""
    label = f"Q={of.queries}, dropout {of.dropout}, B={of.batch}, N={of.tokens}, C={of.token_width}, D={of.width}, H={of.heads}"
    row = {"suite": "patched", "label": label, "layers": of.layers}
    try:
        step = Step(of, device)
    except ImportError as error:
        return [row | {"arm": arm, "reason": f"not measured: {error}"} for arm in ARMS]
    grads = {}
    for arm in ARMS:
        step.become(arm)
        grads[arm] = step.results()
    off = _error(*(grads[arm] for arm in ARMS))
    if not off < 1e-4:
        return [row | {"arm": arm, "reason": f"not timed: the gradients are off by {off:.0e}"} for arm in ARMS]
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(ROUNDS):
        for arm in ARMS:
            step.become(arm)
            trim()
            step()  # finds its own heap, see measure.alternate
            clock = Clock(device)
            clock.mark()
            step()
            clock.mark()
            times[arm] += clock.seconds()
    return [row | {"arm": arm, "seconds": np.percentile(times[arm], [20, 50, 80]).tolist()} for arm in ARMS]


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """Of all gradients together: those of key biases are zero by mathematics."""
    off = sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
    return float((off / sum(float(b.square().sum()) for b in want)) ** 0.5)
