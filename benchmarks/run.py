"""A run of `em3 bench`: units of work in turn, each written as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import machine, operations, page, shapes, table
from .measure import name_of
from .operations import FULL, QUICK
from .registry import OPERATIONS
from .results_file import Results

SUITES = tuple(OPERATIONS)
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Unit:
    """A part of a run that is measured as a whole."""

    name: str
    measure: Callable[[], list[dict[str, Any]]]


def dtypes_of(device: str) -> tuple[torch.dtype, ...]:
    """What is measured: float32 on a CPU; on a GPU bfloat16, in which models are trained there, before it."""
    return (torch.bfloat16, torch.float32) if torch.device(device).type == "cuda" else (torch.float32,)


def units(suites: Sequence[str], table_of_shapes: Path, device: str, quick: bool) -> list[Unit]:
    """What a run consists of: the shapes of each operation, then those of the sweeps unless it must be quick."""
    chosen = [shape for shape in shapes.load(table_of_shapes) if shape.op in suites]
    if quick:
        chosen = [shape for shape in chosen if shape.quick]
    effort = QUICK if quick else FULL
    return [
        Unit(f"{shape.op}: {shape.name}, {name_of(dtype)}", partial(operations.measured, shape, device, dtype, effort))
        for dtype in dtypes_of(device) for shape in chosen
    ]  # fmt: skip


def run(suites: Sequence[str], table_of_shapes: Path, device: str, quick: bool, out: Path, resume: bool,
        progress: Progress) -> Path:  # fmt: skip
    """Measure what is not measured yet; returns the path of the report.

    Raises:
        ShapeError: the file of shapes is not right.
        ResultsError: the folder cannot be used.
    """
    todo = units(suites, table_of_shapes, device, quick)  # before the folder is made: the file of shapes may be wrong
    results = Results(out, machine.head(device, dtypes_of(device)), resume)
    for i, unit in enumerate(todo):
        if not results.has(unit.name):
            results.add(unit.name, unit.measure())
            table.write(out, results.head, results.rows)
        progress("benchmarks", i + 1, len(todo), {})
    return page.write(out, results.head, results.rows)
