"""Rows of results as tables, the same ones for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .registry import OPERATIONS

MIB = 2**20
Head = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Plain text in rows; the first cell of a line names it."""

    title: str
    note: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


def tables(head: Head, rows: Sequence[Row]) -> list[Table]:
    """One table an operation and dtype."""
    made = []
    for op in OPERATIONS:
        of_op = [row for row in rows if row.get("op") == op and not row["sweep"]]
        made += [_of_operation(op, dtype, head, of_op) for dtype in dict.fromkeys(row["dtype"] for row in of_op)]
    return made


def _of_operation(op: str, dtype: str, head: Head, rows: Sequence[Row]) -> Table:
    columns = ("shape", "form", "forward, ms", "backward, ms", "both, ms", "em3 is faster by", "of the limit",
               "peak memory, MiB", "error")  # fmt: skip
    lines: list[Sequence[str]] = []
    for _, forms in by_shape(row for row in rows if row["dtype"] == dtype):
        ours = next(row for row in forms if row["form"] == "em3")
        for i, row in enumerate(forms):
            name = f"{row['shape']}: {row['label']}" if i == 0 else ""
            if "seconds" not in row:
                lines.append((name, row["form"], f"{row['status']}{_because(row)}", *[""] * 6))
                continue
            times = [_milliseconds(row["seconds"][part]) for part in ("forward", "backward", "both")]
            lines.append((name, row["form"], *times, _ratio(row, ours), f"{share(row, head):.0%}", _memory(row),
                          f"{row['error']:.0e}"))  # fmt: skip
    return Table(f"{op}, {dtype}", " ".join((OPERATIONS[op].our_work.__doc__ or "").split()), columns, lines)


def by_shape(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each shape, in the order in which shapes first appear."""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        shapes.setdefault(row["shape"], []).append(row)
    return list(shapes.items())


def least_seconds(row: Row, head: Head) -> float:
    """What forward and backward would take at the machine's own limits: products at the rate of a large product, or
    elements at the rate of a large copy, whichever takes longer."""
    work = row["work"]
    flops = work["forward_flops"] + work["backward_flops"]
    elements = work["forward_elements"] + work["backward_elements"]
    size = torch.empty((), dtype=getattr(torch, row["dtype"])).element_size()
    return max(flops / head["ceilings"]["products"][row["dtype"]], elements * size / head["ceilings"]["copy"])


def share(row: Row, head: Head) -> float:
    """Of the machine's limit for the form's own arithmetic."""
    return least_seconds(row, head) / row["seconds"]["both"][1]


def _because(row: Row) -> str:
    return "" if row["reason"] == row["status"] else f": {row['reason']}"


def _milliseconds(quantiles: Sequence[float]) -> str:
    p20, p50, p80 = (1e3 * value for value in quantiles)
    digits = 0 if p50 >= 100 else 1 if p50 >= 10 else 2
    return f"{p50:,.{digits}f} ({p20:,.{digits}f} to {p80:,.{digits}f})"


def _ratio(row: Row, ours: Row) -> str:
    if row is ours or "seconds" not in ours:
        return ""
    return f"{row['seconds']['both'][1] / ours['seconds']['both'][1]:.2f}x"


def _memory(row: Row) -> str:
    return "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:,.0f}"


def machine(head: Head) -> str:
    """The machine and its own limits in a sentence."""
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in head["ceilings"]["products"].items())
    return (
        f"{head['device']}; {head['threads']} threads, {head['instruction_set']}; torch {head['torch']}, em3 {head['em3']}; "
        f"{head['date']}. Its own limits, measured first: {head['ceilings']['copy'] / 1e9:,.1f} GB/s copying (read and "
        f"written together), products {products}."
    )


HOW = (
    "Medians of alternating calls in one process, 20th to 80th percentile in brackets; forward as in training, its graph "
    "recorded. em3 is what a call without further words gets, em3 NAME one backend; plain is PyTorch as a user would "
    "write it, compile torch.compile of that; the others are packages. Of the limit: the least time that the form's own "
    "arithmetic could take here, as a share of its median. Peak memory of one forward and backward in a process of its "
    "own, above the inputs. Error: the largest relative one, of the output and all gradients, against float64; a form "
    "that computes something else gets no time."
)
