"""`em3 tune`: for each shape the answers that there are to every decision of the automatic choice, timed in turns.

An answer is timed only if what comes out agrees with float64, as in `em3 bench`. It replaces the cost model's where a
training step (for a decision about inference: its forward) is at least ``MARGIN`` faster in the median of the rounds, and
faster in at least four of five: times are compared within a round. What is kept is what differs from the cost model. Of
shapes that fall into one bucket the last one measured decides.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from em3 import tuning
from em3.ops import _dispatch
from em3.tuning import table

from . import measure, operations, shapes
from .forms import Call, Form, Inputs, Operation, leaves
from .operations import Effort
from .registry import OPERATIONS
from .shapes import Shape

log = logging.getLogger("em3")
MARGIN = 0.05
FULL = Effort(seconds=2.0, rounds=9, compiled=False)
QUICK = Effort(seconds=0.4, rounds=5, compiled=False)

_ABSORB, _PROJECT = "absorb", "project"
# The decisions of each operation in the order in which they are made here, and the strategy for which each one counts:
# strategies are compared last, each with the best of what lies below it.
PLAN: dict[str, tuple[tuple[str, str | None], ...]] = {
    "qformer_attention": (("backend", _ABSORB), ("chunk", _ABSORB), ("strategy", None)),
    "lora_linear": (("backend", None), ("form", None), ("shrink", None)),
    "lora_target_attention": (("backend", _ABSORB), ("chunk", _ABSORB), ("rows", _PROJECT), ("strategy", None)),
    "contrastive_loss": (("backend", None), ("tile", None)),
}


@dataclass(frozen=True)
class Found:
    """What was measured about one decision for one shape."""

    decision: str
    kind: str
    shape: str
    before: str  # what the automatic choice took
    winner: str
    ratio: float  # time of ``before`` over the winner's
    behind: float  # how much longer the cost model's answer takes than the fastest, 0 if it is that
    right: bool  # whether no other answer is faster beyond noise
    wrong: tuple[str, ...]  # why an answer was not timed


def run(ops: Sequence[str], table_of_shapes: Path, device: str, quick: bool,
        dtypes: Sequence[torch.dtype]) -> Iterator[list[Found]]:  # fmt: skip
    """Tunes one shape after the other; each one's winners are in the file when its measurements are handed out.

    Raises:
        ShapeError: the file of shapes is not right.
    """
    for dtype, shape in units(ops, table_of_shapes, quick, dtypes):
        try:
            found = _tuned(shape, device, dtype, QUICK if quick else FULL)
        except Exception as error:  # mostly of memory: the other shapes are tuned all the same
            log.warning("%s, %s: not tuned: %s", shape.op, shape.label, " ".join(str(error).split()))
            found = []
        yield found


def units(ops: Sequence[str], table_of_shapes: Path, quick: bool,
          dtypes: Sequence[torch.dtype]) -> list[tuple[torch.dtype, Shape]]:  # fmt: skip
    """What a run consists of."""
    chosen = [shape for shape in shapes.load(table_of_shapes) if shape.op in ops and (shape.quick or not quick)]
    return [(dtype, shape) for dtype in dtypes for shape in chosen]


def _tuned(shape: Shape, device: str, dtype: torch.dtype, effort: Effort) -> list[Found]:
    operation = OPERATIONS[shape.op]
    torch.manual_seed(zlib.crc32(f"{shape.op} {shape.dims} {dtype}".encode()))
    inputs = operation.make(shape.dims, device, dtype)
    grad = operations.gradient(operation.ours(inputs, "auto"))
    place = next(iter(leaves(inputs).values())).device  # with its index
    found: list[Found] = []
    try:
        for given in operation.laid_out(shape.dims, inputs):
            bench = _Bench(shape, operation, given, grad, dtype, device, effort)
            for what, strategy in PLAN[shape.op]:
                rows, changes = bench.settle(f"{shape.op}.{what}", strategy, place)
                table.update(place, changes)
                found += rows
    finally:
        tuning.try_out(None)
        tuning.forget()
    return found


class _Bench:
    """One shape of one operation, and the answers found for it so far."""

    def __init__(self, shape: Shape, operation: Operation, inputs: Inputs, grad: Tensor | None, dtype: torch.dtype,
                 device: str, effort: Effort) -> None:  # fmt: skip
        self.shape, self.operation, self.inputs, self.grad = shape, operation, inputs, grad
        self.device, self.effort = device, effort
        self.answers: dict[str, str] = {}
        self.want = measure.true_results(operation.truth, inputs, grad)
        self.limit = measure.limit(dtype)
        if dtype in (torch.bfloat16, torch.float16) and shape.op != "contrastive_loss":  # which computes in float32
            self.limit = operations.limit_beside(operation, inputs, grad, self.want, dtype)

    def settle(self, decision: str, strategy: str | None,
               place: torch.device) -> tuple[list[Found], dict[tuning.Key, table.Entry | None]]:  # fmt: skip
        """Measures a decision, if it is asked for, and keeps its answer for those that follow."""
        given = self.answers | ({} if strategy is None else {f"{self.shape.op}.strategy": strategy})
        asked = self._asked(decision, given)
        if not asked:
            return [], {}
        calls, wrong = self._candidates(decision, given)
        times = measure.alternate(calls, self.grad, self.device, self.effort.seconds * len(calls), self._rounds(calls))
        tuned = _tuned_before(place)
        found, changes = [], {}
        for key, model in asked.items():
            if model not in times:
                # Not left to the table, which has no line for it: this is what serves every call that was not tuned.
                log.warning("%s of %s: the cost model's answer cannot be compared with: %s", decision, self.shape.label,
                            "; ".join(wrong) or model)  # fmt: skip
                continue
            of = {name: t[:, 0] if key[3].startswith("inference") else t.sum(1) for name, t in times.items()}
            winner, before = best(of, model), tuned.get(key, model)
            medians = {name: float(np.median(t)) for name, t in of.items()}
            self.answers.setdefault(decision, winner)  # that of training, which is asked for first
            ratio = medians.get(before, medians[model]) / medians[winner]
            behind = max(float(np.median(of[model] / t)) for t in of.values()) - 1  # compared within a round too
            right = not any(measure.faster(t, of[model]) for t in of.values())
            found.append(Found(decision, key[3], self.shape.label, before, winner, ratio, behind, right, wrong))
            gain = medians[model] / medians[winner]
            changes[key] = None if winner == model else table.Entry(key, winner, self.shape.label, gain)
        return found, changes

    def _asked(self, decision: str, given: dict[str, str]) -> dict[tuning.Key, str]:
        """The keys that a training step and then an inference ask for, with the cost model's answers."""
        trial = tuning.Trial(given)
        tuning.try_out(trial)
        measure.results(Call(self._ours, leaves(self.inputs)), self.grad)
        with torch.no_grad():
            self._ours()
        return trial.asked.get(decision, {})

    def _candidates(self, decision: str, given: dict[str, str]) -> tuple[dict[str, Call], tuple[str, ...]]:
        """The answers that agree with float64, and why the others do not take part."""
        calls: dict[str, Call] = {}
        wrong = []
        for answer in table.decisions()[decision]:
            if decision.endswith(".backend") and not self._serves(answer):
                continue
            form = Form(answer, self._bind(given | {decision: answer}), self.operation.our_work)
            row = operations.same_function(form, self.inputs, self.grad, self.want, self.limit, calls)
            if "reason" in row:
                wrong.append(f"{answer}: {row['reason']}")
        return calls, tuple(wrong)

    def _bind(self, answers: dict[str, str]) -> Callable[[Inputs], Call]:
        def forward() -> Tensor:
            tuning.try_out(tuning.Trial(answers))  # also for the backward that follows
            return self._ours()

        return lambda inputs: Call(forward, leaves(inputs))

    def _ours(self) -> Tensor:
        return self.operation.ours(self.inputs, "auto")

    def _serves(self, backend: str) -> bool:
        try:
            with torch.no_grad():
                self.operation.ours(self.inputs, backend)
        except _dispatch.BackendError:
            return False
        return True

    def _rounds(self, calls: dict[str, Call]) -> int:
        start = time.perf_counter()
        for call in list(calls.values())[:1]:
            measure.step(call, self.grad, self.device)
        return 3 if time.perf_counter() - start > operations.SLOW else self.effort.rounds


def _tuned_before(place: torch.device) -> dict[tuning.Key, str]:
    try:
        return {entry.key: entry.choice for entry in table.read(table.path(place), place)[0]}
    except table.TableError:
        return {}


def best(times: dict[str, np.ndarray], model: str) -> str:
    """The answer with the lowest median among those that are faster than the model's by the margin; else the model's."""
    faster = [name for name, t in times.items() if measure.faster(t, times[model], MARGIN)]
    return min(faster, key=lambda name: float(np.median(times[name])), default=model)


def text(found: Sequence[Found]) -> str:
    """What was measured as a table, and how right the cost models were."""
    rows = [("operation and decision", "shape", "before", "winner", "gain")]
    rows += [(f"{f.decision} {f.kind}".strip(), f.shape, f.before, f.winner, "" if f.before == f.winner else f"{f.ratio:.2f}x")
             for f in found]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"not timed, {decision} of {shape}: {why}"
              for decision, shape, why in dict.fromkeys((f.decision, f.shape, why) for f in found for why in f.wrong)]  # fmt: skip
    for decision in dict.fromkeys(f.decision for f in found):
        of = [f for f in found if f.decision == decision]
        lines.append(f"{decision}: the cost model was right {sum(f.right for f in of)} of {len(of)} times, at worst "
                     f"{max(f.behind for f in of):.0%} behind")  # fmt: skip
    return "\n".join(lines)
