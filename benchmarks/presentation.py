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
    """One table an operation and dtype, then those of the other suites that were measured."""
    made = []
    for op in OPERATIONS:
        of_op = [row for row in of_suite(rows, "operations") if row["op"] == op and not row["sweep"]]
        made += [_of_operation(op, dtype, head, of_op) for dtype in dict.fromkeys(row["dtype"] for row in of_op)]
    others = {"strategies": _strategies, "overhead": _overhead, "end_to_end": _training, "latency": _latency, "patched": _patched}
    return made + [make(of_suite(rows, suite)) for suite, make in others.items() if of_suite(rows, suite)]


def of_suite(rows: Iterable[Row], suite: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite]


def _of_operation(op: str, dtype: str, head: Head, rows: Sequence[Row]) -> Table:
    columns = ("shape", "form", "forward, ms", "backward, ms", "both, ms", "em3 is faster by", "GFLOP, MB", "of the limit",
               "peak memory, MiB", "error")  # fmt: skip
    lines: list[Sequence[str]] = []
    for _, forms in by_shape(row for row in rows if row["dtype"] == dtype):
        ours = next(row for row in forms if row["form"] == "em3")
        for i, row in enumerate(forms):
            name = f"{row['shape']}: {row['label']}" if i == 0 else ""
            without = row.get("without")
            form = f"{row['form']}, without the gradient of {' and '.join(without)}" if without else row["form"]
            if "seconds" not in row:
                lines.append((name, form, f"{row['status']}{_because(row)}", *[""] * 7))
                continue
            times = [_milliseconds(row["seconds"][part]) for part in ("forward", "backward", "both")]
            flops, size = work(row)
            lines.append((name, form, *times, _ratio(row, ours), f"{_short(flops / 1e9)}, {_short(size / 1e6)}",
                          f"{share(row, head):.0%}", _memory(row), f"{row['error']:.0e}"))  # fmt: skip
    return Table(f"{op}, {dtype}", " ".join((OPERATIONS[op].our_work.__doc__ or "").split()), columns, lines)


def _strategies(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        name = f"{row['op']}, {row['shape']}: {row['label']}, {row['dtype']}"
        if "seconds" not in row:
            lines.append((name, row["reason"], "", "", ""))
            continue
        behind = "" if row["right"] else f"{row['behind']:.0%} behind"
        lines.append((name, *(_milliseconds(row["seconds"][of]) for of in ("absorb", "project")), row["chosen"], behind))
    measured = [row for row in rows if "seconds" in row]
    right, worst = sum(row["right"] for row in measured), max((row["behind"] for row in measured if not row["right"]), default=0.0)
    note = ("Forward and backward in turns, and what a call without further words takes: what `em3 tune` measured on this machine, "
            f"else the cost model's answer. It takes the faster one for {right} of {len(measured)} shapes, and is at most "
            f"{worst:.0%} behind; slower is what is slower in the median and in four rounds of five.")  # fmt: skip
    return Table("The choice of strategy", note, ("", "absorb, ms", "project, ms", "chosen", ""), lines)


def _overhead(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        cells = [_spread(row["microseconds"][part], 1) if part in row["microseconds"] else "" for part in ("inference", "both")]
        lines.append((row["label"], row["form"], *cells))
    note = "Microseconds a call where the arithmetic takes none: what Python, dispatch and autograd cost."
    return Table("Interpreter overhead", note, ("", "form", "forward without gradient, µs", "forward and backward, µs"), lines)


def _training(rows: Sequence[Row]) -> Table:
    columns = ("", "arm", "step, ms", "against ID-only", "samples/s", "peak memory, MiB", "against ID-only", "parts of the step")
    lines = []
    for row in rows:
        base = next(other for other in rows if other["unit"] == row["unit"] and other["arm"] == "ID-only")
        total = sum(row["parts"].values())
        parts = ", ".join(f"{name} {1e3 * seconds:.1f} ms ({seconds / total:.0%})" for name, seconds in row["parts"].items())
        known = row["peak_bytes"] is not None and base["peak_bytes"]
        lines.append((
            f"{row['over']} {row['at']:,}", row["arm"], _milliseconds(row["seconds"]),
            f"{row['seconds'][1] / base['seconds'][1]:.2f} times", f"{row['samples_per_second']:,.0f}", _memory(row),
            f"{row['peak_bytes'] / base['peak_bytes']:.2f} times" if known else "", parts,
        ))  # fmt: skip
    note = ("DIN with IDs alone, and with EM3 around it, in turns; from a history of 200, a batch of 2,048 and two modalities "
            "one is varied at a time. Parts are each measured alone.")  # fmt: skip
    return Table("A training step end to end", note, columns, lines)


def _latency(rows: Sequence[Row]) -> Table:
    lines = [(row["arm"], *(f"{1e3 * value:.1f}" for value in row["seconds"])) for row in rows]
    note = f"One user's history of {rows[0]['history']} and {rows[0]['candidates']} candidates, whose content is in the bank."
    return Table("A request end to end", note, ("", "p50, ms", "p99, ms"), lines)


def _patched(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append((row["label"], row["arm"], row["reason"], ""))
            continue
        (base,) = (other for other in rows if other["label"] == row["label"] and other["arm"] == "transformers")
        lines.append((row["label"], row["arm"], _milliseconds(row["seconds"]), f"{base['seconds'][1] / row['seconds'][1]:.2f}x"))
    note = (f"Forward and backward of {rows[0]['layers']} layers of BLIP-2's Q-Former in training, as transformers has it and "
            "after `em3.patch`, in turns. The tokens take no gradient; every other layer reads them.")  # fmt: skip
    return Table("A patched Q-Former end to end", note, ("", "arm", "step, ms", "against transformers"), lines)


def by_shape(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each shape, in the order in which shapes first appear."""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        shapes.setdefault(row["shape"], []).append(row)
    return list(shapes.items())


def work(row: Row) -> tuple[float, float]:
    """FLOPs, and bytes read or written, of forward and backward by the form's formulas."""
    of = row["work"]
    size = torch.empty((), dtype=getattr(torch, row["dtype"])).element_size()
    return of["forward_flops"] + of["backward_flops"], size * (of["forward_elements"] + of["backward_elements"])


def least_seconds(row: Row, head: Head) -> float:
    """What forward and backward would take at the machine's own limits: products at the rate of a large product, or
    bytes at the rate of a large copy, whichever takes longer."""
    flops, size = work(row)
    return max(flops / head["ceilings"]["products"][row["dtype"]], size / head["ceilings"]["copy"])


def share(row: Row, head: Head) -> float:
    """Of the machine's limit for the form's own arithmetic."""
    return least_seconds(row, head) / row["seconds"]["both"][1]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _because(row: Row) -> str:
    return "" if row["reason"] == row["status"] else f": {row['reason']}"


def _milliseconds(quantiles: Sequence[float]) -> str:
    return _spread([1e3 * value for value in quantiles], 0 if quantiles[1] >= 0.1 else 1 if quantiles[1] >= 0.01 else 2)


def _spread(quantiles: Sequence[float], digits: int) -> str:
    p20, p50, p80 = quantiles
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


def unrest(rows: Iterable[Row]) -> str:
    """A sentence where other work moved the times too much for a factor to be believed, else nothing."""
    spreads = [row["seconds"]["both"] for row in of_suite(rows, "operations") if "seconds" in row]
    wild = sum(p80 > 2 * p20 for p20, _, p80 in spreads)
    if 5 * wild <= len(spreads):
        return ""
    return (f"The machine was busy: of {len(spreads)} times {wild} are more than twice as long at the 80th percentile as at the "
            "20th. Measure again while nothing else runs before you believe a factor.")  # fmt: skip


HOW = (
    "Medians of alternating calls in one process, 20th to 80th percentile in brackets; forward as in training, its graph "
    "recorded. em3 is what a call without further words gets, em3 NAME one backend; plain is PyTorch as a user would "
    "write it, compile torch.compile of that; flex and varlen are PyTorch's FlexAttention and varlen attention, loop and "
    "blocks what a user would write to save memory, the others packages. GFLOP, MB: what forward and backward must compute, "
    "and read or write, in that form (the formulas stand with each operation in em3/benchmarks), for the tokens that there "
    "are, not for padding. Of the limit: the least "
    "time that this could take here, as a share of its median. Peak memory of one forward and backward in a process of its "
    "own, above the inputs. Error: the largest relative one, of the output and all gradients, against float64; a form "
    "that computes something else gets no time."
)
