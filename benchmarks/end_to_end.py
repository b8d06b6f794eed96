"""A training step of EM3 around DIN against DIN with IDs alone, and the latency of one request of 500 candidates.

Batches are drawn at random: 20,000 items and users, popularity as 1 / rank, histories of log-normal lengths. Widths are
the defaults of `em3 train`. Tokens are at hand: where they come from is not measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em3 import EM3, FusionQFormer, Jagged
from em3.data.batches import Batch
from em3.models import DIN
from em3.train.config import ModelConfig

from . import memory
from .forms import lengths, offsets
from .measure import Clock

ITEMS = USERS = 20_000
CANDIDATES = 500
# Mean tokens and width of each modality: picture patches and words as the small encoders make them, then sound.
MODALITIES = ((24, 128), (8, 128), (50, 128))
ROUNDS, WARM, REQUESTS = 15, 3, 200
ARMS = ("EM3", "ID-only")


@dataclass(frozen=True)
class Setting:
    """What a step is measured at; each sweep varies one of them from here."""

    history: int = 200  # N
    batch: int = 2048  # B
    modalities: int = 2


SWEEPS: dict[str, tuple[int, ...]] = {"history": (50, 200, 1000), "batch": (512, 2048, 8192), "modalities": (1, 2, 3)}


def draw(setting: Setting, rows: int) -> Batch:
    """A batch of ``rows`` rows."""
    weight = 1 / torch.arange(1, ITEMS + 1, dtype=torch.float64)
    of = lengths(rows, setting.history, skewed=True).clamp(max=setting.history)  # as `history_length` cuts them
    item = torch.multinomial(weight, rows, replacement=True)
    seen = torch.multinomial(weight, int(of.sum()), replacement=True)
    return Batch.from_rows(item, Jagged(seen, offsets(of)), torch.randint(2, (rows,)), user=torch.randint(USERS, (rows,)))


def tokens(items: int, setting: Setting) -> list[Jagged]:
    """Streams of that many items: patches all of one number, the others of skewed lengths."""
    streams = []
    for i, (mean, width) in enumerate(MODALITIES[: setting.modalities]):
        of = lengths(items, mean, skewed=i > 0)
        streams.append(Jagged(torch.randn(int(of.sum()), width), offsets(of)))
    return streams


def moved(value: Any, device: str) -> Any:
    """A batch, a stream or a tensor on the device."""
    if isinstance(value, Batch):
        return replace(value, **{of.name: moved(getattr(value, of.name), device) for of in fields(value)})
    if isinstance(value, Jagged):
        return Jagged(value.values().to(device), value.offsets().to(device))
    return None if value is None else value.to(device)


def build(arm: str, setting: Setting) -> nn.Module:
    """The untrained model of an arm, with the defaults of `em3 train`."""
    of = ModelConfig()
    content = arm == "EM3"
    ranker = DIN(USERS + 1, ITEMS + 1, dim=of.id_dim, extra_dim=EM3.extra_dim(of.content_dim) if content else 0,
                 hidden=tuple(of.hidden), dropout=of.dropout,
                 id_dropout=of.content_id_dropout if content else of.id_dropout)  # fmt: skip
    if not content:
        return ranker
    fusion = FusionQFormer([width for _, width in MODALITIES[: setting.modalities]], of.dim, num_queries=of.num_queries,
                           num_layers=of.num_layers, num_heads=of.num_heads, out_dim=of.content_dim,
                           ffn_dim=of.ffn_dim, mean_residual=True)  # fmt: skip
    return EM3(ranker, fusion, num_items=ITEMS, content_dim=of.content_dim, num_heads=of.num_heads, rank=of.rank,
               id_dim=of.id_dim, contrast_weight=of.contrast_weight, contrast_gradient=of.contrast_gradient)  # fmt: skip


class Step:
    """One arm and what it is trained on, which lies on the device already."""

    def __init__(self, arm: str, setting: Setting, device: str) -> None:
        torch.manual_seed(0)
        self.model: Any = build(arm, setting).to(device)
        self.batch: Batch = moved(draw(setting, setting.batch), device)
        streams = tokens(len(self.batch.distinct), setting) if arm == "EM3" else None
        self.streams = streams and [moved(stream, device) for stream in streams]
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if self.streams is None:
            F.binary_cross_entropy_with_logits(self.model(self.batch), self.batch.label).backward()
            self.optimizer.step()
            return
        losses = self.model.losses(self.batch, self.streams)
        losses.total.backward()
        self.optimizer.step()
        self.model.write_back(self.batch, losses.content)

    def parts(self) -> dict[str, Callable[[], object]]:
        """What a step of EM3 is made of, each part alone, forward and backward."""
        model, batch, streams = self.model, self.batch, self.streams
        content = model.content(streams).detach().requires_grad_()
        target = content.detach().index_select(0, batch.inverse).requires_grad_()
        extra = model.compare(target, batch.history).detach().requires_grad_()
        return {
            "Fusion-Q-Former": lambda: model.content(streams).sum().backward(),
            "history": lambda: model.compare(target, batch.history).sum().backward(),
            "ranker": lambda: F.binary_cross_entropy_with_logits(model.ranker(batch, extra), batch.label).backward(),
            "contrast": lambda: model.contrast_of(batch, content).backward(),
            "optimizer": self.optimizer.step,
            "bank": lambda: model.write_back(batch, content),
        }


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int, warm: int, device: str) -> dict[str, np.ndarray]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + rounds):
        for name, call in calls.items():
            clock = Clock(device)
            clock.mark()
            call()
            clock.mark()
            (seconds,) = clock.seconds()
            if turn >= warm:
                times[name].append(seconds)
    return {name: np.array(of) for name, of in times.items()}


def training(over: str, at: int, device: str) -> list[dict[str, Any]]:
    """A row for each arm: its step with one of the setting's numbers changed."""
    setting = Setting(**{over: at})
    steps = {arm: Step(arm, setting, device) for arm in ARMS}
    times = _in_turns(dict(steps), ROUNDS, WARM, device)
    parts = _in_turns(steps["EM3"].parts(), ROUNDS, WARM, device)
    rows = []
    for arm, of_arm in times.items():
        p20, p50, p80 = np.percentile(of_arm, [20, 50, 80]).tolist()
        rows.append({
            "suite": "end_to_end", "over": over, "at": at, "arm": arm, "setting": asdict(setting),
            "seconds": [p20, p50, p80], "samples_per_second": setting.batch / p50, "peak_bytes": _peak(arm, setting, device),
            "parts": {name: float(np.median(of)) for name, of in parts.items()} if arm == "EM3" else {},
        })  # fmt: skip
    return rows


def inference(device: str) -> list[dict[str, Any]]:
    """p50 and p99 of scoring one user's candidates, content read from the bank."""
    setting = Setting()
    request = moved(_request(setting), device)
    calls: dict[str, Callable[[], object]] = {
        arm: partial(_scores, build(arm, setting).to(device).eval(), request) for arm in ARMS
    }
    times = _in_turns(calls, REQUESTS, WARM, device)
    return [{"suite": "latency", "arm": arm, "candidates": CANDIDATES, "history": setting.history,
             "seconds": np.percentile(of, [50, 99]).tolist()} for arm, of in times.items()]  # fmt: skip


@torch.no_grad()
def _scores(model: nn.Module, request: Batch) -> Tensor:
    scores = model(request)
    return scores[0] if isinstance(scores, tuple) else scores


def _request(setting: Setting) -> Batch:
    """One user, as many rows as candidates, and the same history in each: as rankers take a request."""
    item = torch.randperm(ITEMS)[:CANDIDATES]
    seen = torch.randint(ITEMS, (setting.history,)).repeat(CANDIDATES)
    history = Jagged(seen, offsets(torch.full((CANDIDATES,), setting.history)))
    return Batch.from_rows(item, history, torch.zeros(CANDIDATES), user=torch.zeros_like(item))


def _peak(arm: str, setting: Setting, device: str) -> int | None:
    """Bytes by which a few steps raise the high-water mark of a process of their own; on a GPU that of the allocator, above
    the model, its optimizer and the batch."""
    if torch.device(device).type == "cuda":
        step = Step(arm, setting, device)
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    about = {"arm": arm, "threads": torch.get_num_threads(), **asdict(setting)}
    words = [sys.executable, "-m", "em3.benchmarks.end_to_end", json.dumps(about)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: int | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_here(about: dict[str, Any]) -> int | None:
    torch.set_num_threads(about.pop("threads"))
    arm = about.pop("arm")
    Step(arm, Setting(history=5, batch=8), "cpu")()  # libraries set themselves up
    step = Step(arm, Setting(**about), "cpu")

    def steps() -> None:
        for _ in range(WARM):
            step()

    return memory.raised_by(steps)


if __name__ == "__main__":
    print(json.dumps(_peak_here(json.loads(sys.argv[1]))))
