"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from em3.files import atomic

from .presentation import HOW, Head, Row, Table, machine, tables, unrest

FILE = "results.md"


def write(folder: Path, head: Head, rows: Sequence[Row]) -> Path:
    """Writes ``results.md`` into the folder, complete or not at all, and returns its path."""
    parts = ["# Measured by `em3 bench`", machine(head), HOW, unrest(rows), *map(_markdown, tables(head, rows)),
             f"```text\n{head['environment']}\n```"]  # fmt: skip
    path = folder / FILE
    with atomic(path) as file:
        file.write("\n\n".join(filter(None, parts)).encode() + b"\n")
    return path


def _markdown(table: Table) -> str:
    lines = [_line(table.columns), _line(["---"] * len(table.columns)), *map(_line, table.lines)]
    return "\n".join([f"## {table.title}", "", table.note, "", *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
