"""What a training step costs: the arms in turns in one process for time, each in a process of its own for memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..jagged import Jagged

if TYPE_CHECKING:
    from .loop import Training
    from .run import Run

ROUNDS, WARM, MEMORY_STEPS = 15, 3, 8
REFRESHES = 3
CLEAR = Path("/proc/self/clear_refs")  # Linux's


def measure_costs(run: Run, progress: Callable[[int, int], None]) -> dict[str, dict[str, Any]]:
    """For each arm of the run the fields of :class:`em3.train.report.summary.Cost`."""
    trainings = {arm: run.training(arm, run.config.seeds[0]) for arm in run.config.arms}
    costs = step_costs(trainings, progress)
    for arm, training in trainings.items():
        costs[arm]["peak_memory_mib"] = peak_memory(run.folder, arm)
        costs[arm]["parts_ms"] = parts(training, run) if training.read is not None else {}
    return costs


def step_costs(trainings: dict[str, Training], progress: Callable[[int, int], None]) -> dict[str, dict[str, Any]]:
    """The time of a step of each training, all in turns in this process, with its share of the bank's refreshes."""
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(WARM + ROUNDS):
        for name, training in trainings.items():
            batch = next(training.epoch(turn))
            if turn == 0 and training.read is not None:
                training.model.refresh(training.read)  # type: ignore[operator]
            training.state.step = 1  # without a refresh of the bank, whose share is added below
            start = time.perf_counter()
            training.step(batch)
            if turn >= WARM:
                times[name].append(time.perf_counter() - start)
        progress(turn + 1, WARM + ROUNDS)
    costs: dict[str, dict[str, Any]] = {}
    for name, training in trainings.items():
        p20, p50, p80 = np.percentile(times[name], [20, 50, 80]) + refresh_share(training) * 1e-3
        costs[name] = {
            "step_ms_p20": p20 * 1e3, "step_ms": p50 * 1e3, "step_ms_p80": p80 * 1e3,
            # An epoch may have fewer rows than a batch.
            "samples_per_s": min(training.config.batch_size, len(training.rows["train"])) / p50,
        }  # fmt: skip
    return costs


def refresh_share(training: Training) -> float:
    """Milliseconds of a step that are its share of the bank's refreshes; 0 where there are none."""
    model: Any = training.model
    if training.read is None or not model.caches_history:
        return 0.0
    return _median_ms(lambda: model.refresh(training.read), warm=1, rounds=REFRESHES) / training.config.refresh_every


def parts(training: Training, run: Run) -> dict[str, float]:
    """Median milliseconds, forward and backward, of what an EM3 step is made of, each alone on one batch."""
    model: Any = getattr(training.model, "model", training.model)
    read: Any = training.read
    batch = next(training.epoch(0))
    # Each part alone: gradients end at the tokens, also where encoders that are trained made them.
    items = model.items(batch)
    streams = [Jagged(stream.values().detach(), stream.offsets()) for stream in read(items)]
    content = model.content(streams).detach().requires_grad_()
    distinct, history, bank = model.sources(batch, content)
    target = distinct.detach().index_select(0, batch.inverse).requires_grad_()
    extra = model.compare(target, history, bank, batch.history_age).detach().requires_grad_()

    def ranker() -> None:
        F.binary_cross_entropy_with_logits(model.ranker(batch, extra), batch.label).backward()

    def contrast() -> None:
        model.contrast_of(batch, model.sources(batch, content)[0]).backward()

    calls: dict[str, Callable[[], Any]] = {
        "tokens": lambda: read(items),
        "Fusion-Q-Former": lambda: model.content(streams).sum().backward(),
        "history": lambda: model.compare(target, history, bank, batch.history_age).sum().backward(),
        "ranker": ranker,
        **({"contrast": contrast} if model.contrast is not None else {}),
        "optimizer": training.optimizer.step,
        **({"bank": lambda: model.write_back(batch, content)} if model.caches_history else {}),
    }
    found = {name: _median_ms(call) for name, call in calls.items()}
    return found | ({"refresh": refresh_share(training)} if model.caches_history else {})


def _median_ms(call: Callable[[], Any], warm: int = WARM, rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(warm + rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warm:]) * 1e3)


def peak_memory(folder: Path, arm: str) -> float | None:
    """MiB by which a few steps of the arm raise the high-water mark of a fresh process; None where it cannot be reset."""
    if not CLEAR.exists():
        return None
    words = [sys.executable, "-m", "em3.train.cost", str(folder.resolve()), arm, str(torch.get_num_threads())]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {arm} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _mark(name: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _memory_of(folder: str, arm: str, threads: str) -> None:
    from . import config
    from .allocator import hand_back_freed_memory, keep_freed_memory
    from .run import CONFIG, Run

    keep_freed_memory()
    torch.set_num_threads(int(threads))
    run = Run(config.load([Path(folder) / CONFIG]), Path(folder), lambda *at: None)
    training = run.training(arm, run.config.seeds[0])
    # Setting up has a peak of its own: what it freed is given back, lest the steps have it for nothing, and the high-water
    # mark falls to what is there now.
    hand_back_freed_memory()
    CLEAR.write_text("5")
    before = _mark("VmRSS")
    training.state.step = 1
    for turn in range(MEMORY_STEPS):
        training.step(next(training.epoch(turn)))
    print(json.dumps(_mark("VmHWM") - before))


if __name__ == "__main__":
    _memory_of(*sys.argv[1:])
