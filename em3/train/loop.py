"""One training: a model, a seed, a folder. Killed at any point, it goes on from its last checkpoint to the same numbers."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..files import atomic, whole_lines
from . import checkpoint, micro_batch
from .average import Average
from .config import TrainConfig, differences
from .metrics import evaluate

log = logging.getLogger("em3.train")
LAST, BEST, RESULT, METRICS = "last.safetensors", "best.safetensors", "result.json", "metrics.jsonl"
PREDICTED_EVENTS = 8192 * 200
Read = Callable[[Tensor], Sequence[Any]]


class TrainingError(RuntimeError):
    """A training that must not go on; the message says where it was and what is safe."""


@dataclass
class State:
    """Where a training is, apart from tensors; travels in its checkpoint."""

    step: int = 0
    best_step: int = -1
    best_auc: float = -1.0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])  # ranking and contrast loss since the last log line


class Training:
    """Trains ``model`` and keeps the state of its best epoch by AUC on the validation rows.

    Args:
        model: an :class:`em3.EM3` or anything with its ``losses``, ``forward`` and, if it reads tokens, ``items``,
            ``caches_history``, ``refresh`` and ``write_back``.
        read: item numbers -> streams of their tokens; None for a model that reads none.
        folder: of this training: checkpoints, metrics.jsonl, result.json.
        about: what must agree for a checkpoint to be gone on with (the configuration).
        progress: called with the step, the number of steps and a few numbers to show.
    """

    def __init__(self, model: nn.Module, batches: Batches, read: Read | None, config: TrainConfig, seed: int, folder: Path,
                 about: dict[str, Any], progress: Callable[[int, int, dict[str, float]], None] | None = None) -> None:  # fmt: skip
        self.model, self.batches, self.read, self.config, self.seed = model, batches, read, config, seed
        self.folder, self.about, self.progress = folder, about, progress
        self.rows = {split: batches.data.of_split(split) for split in ("train", "valid", "test")}
        self.per_epoch = max(1, len(self.rows["train"]) // config.batch_size)
        self.steps = config.epochs * self.per_epoch
        self.optimizer = torch.optim.Adam(parameter_groups(model, config), fused=True)
        self.average = Average(self.optimizer, config.average) if config.average else None
        self.state = State()

    def run(self) -> dict[str, Any]:
        """Train to the end, test the best epoch, write result.json; a training that has one is not repeated."""
        done = self.folder / RESULT
        if done.exists():
            self._agrees(self.folder / BEST, checkpoint.read(self.folder / BEST)[1])
            result: dict[str, Any] = json.loads(done.read_text())
            return result
        self._check_rows()
        self._resume()
        while self.state.step < self.steps:
            self._epoch(*divmod(self.state.step, self.per_epoch))
        checkpoint.load(self.folder / BEST, self.model)
        result = {
            "best_step": self.state.best_step,
            "valid": self.evaluate("valid"),
            "test": self.evaluate("test"),
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        with atomic(done) as file:
            file.write(json.dumps(result, indent=1).encode())
        return result

    def evaluate(self, split: str) -> dict[str, float | None]:
        rows, table = self.rows[split], self.batches.data.rows
        return evaluate(table.label[rows], self.predict(rows), table.request[rows], table.cold[rows])

    @torch.no_grad()
    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Click probabilities of the rows, float64; the bank is taken as it is."""
        self.model.eval()
        # Few enough rows at a time for their histories not to need more memory than those of a training step.
        chunk = max(1, min(8192, PREDICTED_EVENTS // self.batches.history_length))
        parts = [self.model(self.batches.of(rows[i : i + chunk]))[0] for i in range(0, len(rows), chunk)]
        self.model.train()
        found = torch.cat([torch.empty(0), *parts]).double().sigmoid()
        if found.isnan().any():  # the last step before a validation may have broken the weights
            where = f"{self.folder}: the scores were not finite at step {self.state.step}"
            raise TrainingError(f"{where}; lower train.lr or look at the data")
        return found.numpy()

    def _epoch(self, epoch: int, skip: int) -> None:
        for batch in self.epoch(epoch, skip):
            self.step(batch)
            if self.state.step % self.per_epoch == 0:
                self._validate()
            if self.state.step % self.config.log_every == 0 or self.state.step == self.steps:
                self._log()
            if self.state.step % self.config.checkpoint_every == 0 or self.state.step % self.per_epoch == 0:
                self._checkpoint(LAST)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch. Where a step computes content, rows of an item come together: it is computed once."""
        together = 1 if self.read is None else self.config.rows_per_item
        return self.batches.epoch(self.rows["train"], self.config.batch_size, self.seed, epoch, skip, together)

    def step(self, batch: Batch) -> None:
        """One training step."""
        model: Any = self.model
        step = self.state.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, self.steps, self.config)
        if self.read is not None and model.caches_history and step % self.config.refresh_every == 0:
            model.refresh(self.read)
        self.optimizer.zero_grad()
        if self.config.micro_batch is not None:
            losses = micro_batch.backward(model, batch, self.read, self.config.micro_batch)
        else:
            losses = model.losses(batch, None if self.read is None else self.read(model.items(batch)))
        ranking, contrast = losses.ranking.item(), losses.contrast.item()
        if not math.isfinite(ranking + contrast):
            raise self._broken(f"the loss was not finite at step {step} (ranking {ranking}, contrast {contrast})")
        if self.config.micro_batch is None:
            losses.total.backward()
        self.optimizer.step()
        self._check_parameters()
        if self.average is not None:
            self.average.update(step)
        if self.read is not None and self.config.write_back and model.caches_history:
            model.write_back(batch, losses.content)
        self.state.step += 1
        self.state.sums[0] += ranking
        self.state.sums[1] += contrast

    @torch.no_grad()
    def _check_parameters(self) -> None:
        """A loss may be finite and its gradient not; a checkpoint of the step after that would be beyond repair."""
        sums = [p.sum() for group in self.optimizer.param_groups for p in group["params"]]  # 25 times as fast as isfinite
        if torch.stack(sums).isfinite().all():
            return
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                gradient = "the gradient of " if p.grad is not None and not p.grad.isfinite().all() else ""
                raise self._broken(f"{gradient}{name} was not finite at step {self.state.step}")

    def _broken(self, what: str) -> TrainingError:
        return TrainingError(f"{self.folder}: {what}; lower train.lr or look at the data. What was written before is whole; "
                             f"{LAST} is from an earlier step")  # fmt: skip

    def _check_rows(self) -> None:
        label = self.batches.data.rows.label[self.rows["valid"]]
        if not len(self.rows["train"]):
            raise TrainingError(f"{self.batches.data.name}: has no training rows")
        if len(np.unique(label)) < 2:
            raise TrainingError(f"{self.batches.data.name}: the validation rows ({len(label)}) hold one class only or none, "
                                "no epoch can be chosen by them")  # fmt: skip
        if self.per_epoch == 1:
            log.warning("%s: an epoch of %d training rows is a single step with train.batch_size=%d; a smaller one makes more",
                        self.batches.data.name, len(self.rows["train"]), self.config.batch_size)  # fmt: skip

    def _validate(self) -> None:
        """Scores of the weights, or of their average, and the checkpoint of the best so far."""
        with nullcontext() if self.average is None else self.average.instead():
            if self.read is not None:
                self.model.refresh(self.read)  # type: ignore[operator]
            self._score()
        if self.average is not None and self.read is not None:
            self.model.refresh(self.read)  # type: ignore[operator]

    def _score(self) -> None:
        scores = self.evaluate("valid")
        self._write({"step": self.state.step, "valid": scores})
        found = scores["auc"]
        assert found is not None  # both classes are there, see _check_rows
        if found > self.state.best_auc:
            self.state.best_auc, self.state.best_step = found, self.state.step
            self._checkpoint(BEST)

    def _log(self) -> None:
        since = self.state.step % self.config.log_every or self.config.log_every  # fewer before the last step of all
        ranking, contrast = (total / since for total in self.state.sums)
        self.state.sums = [0.0, 0.0]
        self._write({"step": self.state.step, "loss": ranking, "contrast": contrast})
        if self.progress is not None:
            validated = {"valid_auc": self.state.best_auc} if self.state.best_step > 0 else {}
            self.progress(self.state.step, self.steps, {"loss": ranking} | validated)

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(line | {"time": round(time.time(), 3)}) + "\n")

    def _checkpoint(self, name: str) -> None:
        state = vars(self.state) | {"about": self.about, "seed": self.seed}
        checkpoint.save(self.folder / name, self.model, self.optimizer if name == LAST else None, state)

    def _resume(self) -> None:
        """Start, or go on from the last checkpoint: lines of metrics that are newer than it will be written again."""
        torch.manual_seed(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LAST
        if path.exists():
            state = checkpoint.load(path, self.model, self.optimizer)
            self._agrees(path, state)
            self.state = State(**{f.name: state[f.name] for f in fields(State)})
            log.info("%s: goes on at step %d of %d", self.folder, self.state.step, self.steps)
        lines = whole_lines(self.folder / METRICS)
        with atomic(self.folder / METRICS) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines if line["step"] <= self.state.step)

    def _agrees(self, path: Path, state: dict[str, Any]) -> None:
        changed = differences(state["about"] | {"seed": state["seed"]}, self.about | {"seed": self.seed})
        if changed:
            raise checkpoint.CheckpointError(
                f"{path}: is of another configuration ({', '.join(changed)} differ); go on with the one that it was trained "
                "with, or choose another folder with --out"
            )


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a training's metrics.jsonl."""
    return whole_lines(Path(folder) / METRICS)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear down to a fiftieth."""
    return config.lr * min((step + 1) / max(config.warmup_steps, 1), max(1 - step / steps, 0.02))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """ID tables (no weight decay, their own learning rate) and everything else that is trained."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        dict(params=[p for p in trained if id(p) in tables], factor=config.id_lr_factor, weight_decay=0.0),
        dict(params=[p for p in trained if id(p) not in tables], factor=1.0, weight_decay=config.weight_decay),
    ]
