"""A run of `em3 bench`: units of work in turn, each written as soon as it is there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from em3.files import written_by_us

from . import end_to_end, machine, memory, operations, overhead, page, patched, shapes, strategies, table
from .measure import name_of
from .operations import FULL, QUICK
from .registry import OPERATIONS
from .results_file import FILE, Results

log = logging.getLogger("em3")
SUITES = (*OPERATIONS, "strategies", "overhead", "end_to_end")
Progress = Callable[[str, int, int, dict[str, float]], None]


class RunError(RuntimeError):
    """Parts of a run could not be measured; the others were."""


@dataclass(frozen=True)
class Unit:
    """A part of a run that is measured as a whole."""

    name: str
    measure: Callable[[], list[dict[str, Any]]]
    label: str | None = None  # of its shape


def dtypes_of(device: str) -> tuple[torch.dtype, ...]:
    """What is measured: float32 on a CPU; on a GPU bfloat16, in which models are trained there, before it."""
    return (torch.bfloat16, torch.float32) if torch.device(device).type == "cuda" else (torch.float32,)


def units(suites: Sequence[str], table_of_shapes: Path, device: str, quick: bool) -> list[Unit]:
    """What a run consists of: the shapes of each operation, then, unless it must be quick, those of the sweeps; both strategies
    of all of them; interpreter overhead; training and inference end to end, and a patched model."""
    every = [shape for shape in shapes.load(table_of_shapes) if shape.quick or not quick]
    chosen = [shape for shape in every if shape.op in suites]
    effort = QUICK if quick else FULL
    found = [
        Unit(f"{shape.op}: {shape.name}, {name_of(dtype)}", partial(operations.measured, shape, device, dtype, effort),
             shape.label)
        for dtype in dtypes_of(device) for shape in chosen
    ]  # fmt: skip
    if "strategies" in suites:
        found += [
            Unit(f"strategies: {shape.op}, {shape.name}, {name_of(dtype)}",
                 partial(strategies.measured, shape, device, dtype, effort), shape.label)
            for dtype in dtypes_of(device) for shape in every if OPERATIONS[shape.op].by is not None
        ]  # fmt: skip
    if "overhead" in suites:
        found += [Unit(f"overhead: {op}", partial(overhead.of_operation, op, device)) for op in OPERATIONS]
        found.append(Unit("overhead: import", overhead.of_import))
    if "end_to_end" in suites:
        sweeps = {"history": (end_to_end.Setting().history,)} if quick else end_to_end.SWEEPS
        found += [Unit(f"end to end: {over}={at}", partial(end_to_end.training, over, at, device))
                  for over, values in sweeps.items() for at in values]  # fmt: skip
        found.append(Unit("end to end: inference", partial(end_to_end.inference, device)))
        settings = [patched.Setting()] if quick else patched.SETTINGS
        found += [Unit(f"end to end: patched, Q={of.queries}, dropout {of.dropout}", partial(patched.training, of, device))
                  for of in settings]  # fmt: skip
    return found


def run(suites: Sequence[str], table_of_shapes: Path, device: str, quick: bool, out: Path, resume: bool,
        progress: Progress) -> Path:  # fmt: skip
    """Measure what is not measured yet; returns the path of the report.

    Raises:
        ShapeError: the file of shapes is not right, or holds nothing that was asked for.
        ResultsError: the folder cannot be used.
        LockedError: another run is at work in it.
        RunError: at the end, if parts could not be measured; ``resume`` tries them again.
    """
    todo = units(suites, table_of_shapes, device, quick)  # before the folder is made: the file of shapes may be wrong
    shapes.there_must_be(todo, table_of_shapes, suites, quick)
    with written_by_us(out / FILE):  # else two runs would each write the file without the other's rows
        return _run(todo, Results(out, machine.head(device, dtypes_of(device)) | {"quick": quick}, resume), device, out, progress)


def _run(todo: Sequence[Unit], results: Results, device: str, out: Path, progress: Progress) -> Path:
    on_cpu = torch.device(device).type == "cpu"
    results.must_be_of({unit.name: unit.label for unit in todo if unit.label is not None})
    failed = []
    left = [unit for unit in todo if not results.has(unit.name)]
    done = len(todo) - len(left)
    progress("benchmarks", done, len(todo), {})
    try:
        table.write(out, results.head, results.rows)
        for unit in left:
            try:
                with memory.bounded() if on_cpu else contextlib.nullcontext():
                    rows = unit.measure()
                results.add(unit.name, rows)
            except Exception as error:  # mostly of memory, for the inputs or the truth; also of a process of its own
                failed.append(unit.name)
                log.warning("%s: not measured: %s", unit.name, " ".join(str(error).split()))
            table.write(out, results.head, results.rows)
            done += 1
            progress("benchmarks", done, len(todo), {})
    finally:  # a run that is cut off has its page too
        report = page.write(out, results.head, results.rows)
    if failed:
        raise RunError(f"{len(failed)} of {len(todo)} parts could not be measured, the others are in {report}: {'; '.join(failed)}")
    return report
