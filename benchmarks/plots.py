"""How time and memory grow: a drawing a sweep, of em3, of what a user would have instead, and of the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from em3.train.report import figures

from .presentation import MIB, Head, Row, least_seconds, of_suite

# What is drawn dashed: of time, and of memory.
LIMIT = "the limit: em3's arithmetic at this machine's best; the gradients' own memory"


def sweeps(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """The rows of each sweep by operation, dtype, the shape that is varied, and the dimension that varies."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in of_suite(rows, "operations"):
        if row["sweep"]:
            found.setdefault((row["op"], row["dtype"], row["sweep"]["of"], row["sweep"]["over"]), []).append(row)
    return found


def forms(rows: Sequence[Row]) -> list[str]:
    """The forms that have a number in the sweep, in the order of their colours."""
    return list(dict.fromkeys(row["form"] for row in rows if "seconds" in row))


def time_of(rows: Sequence[Row], head: Head) -> str:
    """Milliseconds of forward and backward; the dashed line is the limit."""
    ours = [row for row in rows if row["form"] == "em3"]
    limit = [(row["sweep"]["at"], 1e3 * least_seconds(row, head)) for row in ours]
    return _drawn(rows, lambda row: 1e3 * row["seconds"]["both"][1], "ms", limit)


def memory_of(rows: Sequence[Row]) -> str | None:
    """MiB above the inputs at the peak; None where it could not be measured. The dashed line is what the gradients take."""
    if any(row["peak_bytes"] is None for row in rows if "seconds" in row):
        return None
    limit = [(row["sweep"]["at"], row["results_bytes"] / MIB) for row in rows if row["form"] == "em3" and "seconds" in row]
    return _drawn(rows, lambda row: row["peak_bytes"] / MIB, "MiB", limit)


def _drawn(rows: Sequence[Row], value: Callable[[Row], float], unit: str, limit: Sequence[tuple[int, float]]) -> str:
    figure, axes = figures.blank(figures.SIZE)
    for i, form in enumerate(forms(rows)):
        points = [(row["sweep"]["at"], value(row)) for row in rows if row["form"] == form and "seconds" in row]
        axes.plot(*zip(*points, strict=True), color=figures.COLOURS[i % figures.SERIES], marker="o", markersize=3, linewidth=1.8)
    if limit:
        axes.plot(*zip(*limit, strict=True), color=figures.INK, linestyle="--", linewidth=1.2)
    over, name = rows[0]["sweep"]["over"], f"{rows[0]['op']} {rows[0]['sweep']['of']} {unit}"
    axes.set(xscale="log", yscale="log")
    at = sorted({row["sweep"]["at"] for row in rows})
    axes.set_xticks(at, labels=[f"{x:,}" for x in at])
    axes.minorticks_off()
    axes.grid(True, color=figures.LINE, linewidth=0.8)
    axes.set_xlabel(over, color=figures.INK, fontsize=9)
    axes.set_ylabel(unit, color=figures.INK, fontsize=9)
    return figures.svg(figure, f"{name} over {over}")
