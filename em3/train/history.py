"""What LoRA over the history buys: AUC, step time and memory of ``model.history`` = frozen, lora and full as histories grow.

A cell of the table is a run of its own, ``OUT/historyN/frozen`` and so on, that ``em3 train --resume`` can go on with and
report. They share one token store. What a step needs is estimated before a cell is trained, and a cell that does not fit
is left out with its reason in the table.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..files import atomic, locked
from ..models.em3 import HISTORIES
from . import arms, inspect
from .catalogue_tokens import STORE
from .config import Config, ConfigError
from .cost import peak_memory, step_costs
from .loop import Training
from .metrics import spread
from .run import Progress, Run

LENGTHS = (10, 50, 200, 1000)
JSON, TABLE, COSTS = "history.json", "history.md", "costs.json"
SHARE = 0.8  # of the memory that is free, where no limit is given
SAMPLED_ITEMS, SAMPLED_ROWS = 64, 64
MIB = 2**20


def measure(config: Config, folder: Path, lengths: Sequence[int], limit_mib: float | None, progress: Progress,
            command: str) -> Path:  # fmt: skip
    """Train and measure the cells that are not done yet; returns the path of the table, which grows cell by cell.

    Args:
        config: of every cell, but for ``history_length`` and ``model.history``. Its one arm is compared with itself.
        lengths: at most so many events a history, ascending.
        limit_mib: what a training step may need; by default a share of what is free.
        command: the command line that repeats it.

    Raises:
        ConfigError: for arms, encoders or lengths that cannot be compared, or a cell's folder of another configuration.
        LockedError: if another process is at work in the folder.
    """
    _check(config, lengths)
    with locked(folder):
        base = Run(replace(config, history_length=max(lengths)), folder, progress)
        if config.tokens is None:
            base.store.verify()  # makes it
            config = replace(config, tokens=str((folder / STORE).resolve()))
        rows: list[dict[str, Any]] = []
        for length in lengths:
            rows += _of_length(config, folder / f"history{length}", length, limit_mib or _free_mib(), progress)
            _write(folder, base, config, rows, command)
    return folder / TABLE


def _check(config: Config, lengths: Sequence[int]) -> None:
    if len(config.arms) != 1 or not arms.reads_tokens(config.arms[0]) or config.arms[0] == "em3_no_lora":
        raise ConfigError(f"arms: was {config.arms}, must be one arm that reads tokens and obeys model.history, as [em3]")
    if config.encoder.train != "frozen":
        raise ConfigError(f"encoder.train: was {config.encoder.train}, must be frozen: all cells read one token store")
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ConfigError(f"--lengths: was {list(lengths)}, must be one length or more, from 1, ascending")


def _of_length(config: Config, folder: Path, length: int, limit_mib: float | None, progress: Progress) -> list[dict[str, Any]]:
    """The rows of the table for histories of at most ``length`` events."""
    arm, rows, runs = config.arms[0], list[dict[str, Any]](), dict[str, Run]()
    for history in HISTORIES:
        of_cell = replace(config, history_length=length, model=replace(config.model, history=history))
        run = Run(of_cell, folder / history, _named(progress, f"history {length}, {history}"))
        training = run.training(arm, config.seeds[0])
        estimated = estimate_mib(training)
        row = {"length": length, "history": history, **_sizes(training), "estimated_mib": estimated}
        rows.append(row)
        if limit_mib is not None and estimated > limit_mib:
            row["skipped"] = f"a step needs about {estimated:,.0f} MiB, {limit_mib:,.0f} MiB may be used (--memory)"
            continue
        row["test"] = [result["test"] for result in run.results()[arm]]
        row["parameters"] = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
        runs[history] = run
    costs = _costs(folder / COSTS, runs, arm, lambda i, n: progress(f"history {length}, costs of a step", i, n, {}))
    return [row | costs.get(row["history"], {}) for row in rows]


def _named(progress: Progress, prefix: str) -> Progress:
    return lambda name, done, total, numbers: progress(f"{prefix}: {name}", done, total, numbers)


def _sizes(training: Training) -> dict[str, float]:
    """What a step works on: the first batch's events a row and the items whose content it computes."""
    batch = next(training.epoch(0))
    model: Any = training.model
    return {"events_per_row": len(batch.history.values()) / max(len(batch.item), 1), "items_per_step": len(model.items(batch))}


def _costs(path: Path, runs: dict[str, Run], arm: str, progress: Callable[[int, int], None]) -> dict[str, dict[str, Any]]:
    """Of each run: time of a step, all in turns; of a refresh of its bank; memory, in a process of its own."""
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    if kept.keys() != runs.keys():  # another limit: times compare only within one measurement
        trainings = {name: run.training(arm, run.config.seeds[0]) for name, run in runs.items()}
        kept = step_costs(trainings, progress) if trainings else {}
        for name, training in trainings.items():
            model: Any = training.model
            kept[name]["refresh_ms"] = _refresh_ms(model, training.read) if model.caches_history else None
            kept[name]["peak_memory_mib"] = peak_memory(runs[name].folder, arm)
        with atomic(path) as file:
            file.write(json.dumps(kept, indent=1).encode())
    return kept


def _refresh_ms(model: Any, read: Any) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.refresh(read)
        times.append(time.perf_counter() - start)
    return sorted(times)[1] * 1e3


def estimate_mib(training: Training) -> float:
    """MiB that a step is expected to take at its highest, from what autograd keeps of a small sample of it.

    An item's content and a row's ranking are counted apart, each times how many the first batch has. While the backward
    pass runs, gradients as large as what is kept come to it; parameters have a gradient and two moments; where the history
    has a gradient, every event has one.
    """
    model: Any = training.model
    batch = next(training.epoch(0))
    items = model.items(batch)
    sample = items[_spread(len(items), SAMPLED_ITEMS)]
    per_item = _kept(model, lambda: model.content(training.read(sample))) / max(len(sample), 1)  # type: ignore[misc]
    rows, batches = training.rows["train"], training.batches
    by_length = rows[batches.history_lengths(rows).argsort(kind="stable")]
    part = batches.of(by_length[_spread(len(rows), SAMPLED_ROWS).numpy()])
    per_row = _kept(model, lambda: model.losses(part).total) / max(len(part.item), 1)
    need = 2 * (len(items) * per_item + len(batch.item) * per_row)
    need += 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not model.caches_history:
        need += 4 * len(batch.history.values()) * model.bank.shape[1]
    return need / MIB


def _spread(count: int, most: int) -> Tensor:
    """Evenly spaced numbers below ``count``, at most ``most`` of them."""
    return torch.arange(min(count, most)) * max(count, 1) // max(min(count, most), 1)


def _kept(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``forward``, the model's own tensors left out; no state is changed."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    random = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # held while counting: a storage that is freed may come again
    del out
    torch.set_rng_state(random)
    return sum(storages.values())


def _free_mib() -> float | None:
    """A share of what is free; None where the system does not tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    kib = next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return SHARE * kib / 1024


def _write(folder: Path, base: Run, config: Config, rows: list[dict[str, Any]], command: str) -> None:
    facts = {
        "data": base.data.name, "items": len(base.data.items.ids), "machine": inspect.machine(), "version": __version__,
        "date": datetime.date.today().isoformat(), "seeds": config.seeds, "command": command, "config": config.to_dict(),
    }  # fmt: skip
    with atomic(folder / JSON) as file:
        file.write(json.dumps(facts | {"rows": rows}, indent=1).encode())
    with atomic(folder / TABLE) as file:
        file.write(table(facts, rows).encode())


HEAD = ("history", "events a row", "items a step", "AUC", "cold items", "step, ms", "with refreshes, ms", "memory, MiB",
        "estimated")  # fmt: skip


def table(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    train = facts["config"]["train"]
    lines = [
        "# What LoRA over the history buys", "",
        f"`{facts['command']}`", "",
        f"{facts['data']}, {facts['items']:,} items, {facts['config']['model']['ranker']}, {train['batch_size']:,} rows a step, "
        f"{train['epochs']} epochs; test AUC over seeds {', '.join(map(str, facts['seeds']))}. "
        f"{facts['machine']}, em3 {facts['version']}, {facts['date']}.", "",
        "frozen: the projections over the history's cached content stay as they start. lora: adapters on them are trained. "
        "full: the adapters, and the Fusion-Q-Former through every history item, which is computed anew. Steps of one length "
        f"were measured in turns; the bank that frozen and lora read is refreshed every {train['refresh_every']} steps. Memory "
        "is the rise of a fresh process's high-water mark.", "",
        f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}",
    ]  # fmt: skip
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row, train['refresh_every']))} |" for row in rows)]) + "\n"


def _cells(row: dict[str, Any], refresh_every: int) -> list[str]:
    start = [f"{row['length']}, {row['history']}", f"{row['events_per_row']:.1f}", f"{row['items_per_step']:,}"]
    if "skipped" in row:
        return [*start, f"skipped: {row['skipped']}", *[""] * (len(HEAD) - len(start) - 2), f"{row['estimated_mib']:,.0f}"]
    step, peak = row["step_ms"], row["peak_memory_mib"]
    whole = step + (row["refresh_ms"] or 0.0) / refresh_every
    return [
        *start, *(_auc([test[key] for test in row["test"]]) for key in ("auc", "auc_cold")),
        f"{step:.1f} ({row['step_ms_p20']:.1f} to {row['step_ms_p80']:.1f})", f"{whole:.1f}",
        "" if peak is None else f"{peak:,.0f}", f"{row['estimated_mib']:,.0f}",
    ]  # fmt: skip


def _auc(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if len(known) < len(values):
        return "-"
    mean, error = spread(known)
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
