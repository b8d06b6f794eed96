"""Results as a page that needs nothing else: tables, and a drawing a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from em3.files import atomic
from em3.train.report import figures, frame

from . import plots
from .presentation import HOW, Head, Row, Table, machine, tables, unrest

FILE = "report.html"


def write(folder: Path, head: Head, rows: Sequence[Row]) -> Path:
    """Writes ``report.html`` into the folder, complete or not at all, and returns its path."""
    body = [
        f'<header><p class="over">{escape(head["date"])}</p><h1>em3 on {escape(head["device"])}</h1>'
        f'<div class="result"><p>{escape(machine(head))}</p></div></header>',
        *(f'<p class="note">{escape(text)}</p>' for text in (HOW, unrest(rows)) if text),
        *map(_table, tables(head, rows)),
        _sweeps(head, rows),
        f"<details><summary>Environment</summary>{frame.pre(head['environment'], 'environment')}</details>",
    ]
    path = folder / FILE
    with atomic(path) as file:
        file.write(frame.whole(f"em3 on {head['device']}", "\n".join(body), head["em3"]).encode())
    return path


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(frame.row(name, _cells(cells), "ours" if cells[0] == "em3" else "") for name, *cells in table.lines)
    content = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    note = re.sub("(`+)([^`]+)\\1", r"<code>\2</code>", escape(table.note))
    return f'{frame.title(escape(table.title))}<p class="note">{note}</p>{frame.table(content, escape(table.title))}'


def _cells(cells: Sequence[str]) -> list[str]:
    """Of a line, the last text over all that is empty behind it, which is why there is no number."""
    last = max(i for i, cell in enumerate(cells) if cell) if any(cells) else 0
    behind = len(cells) - 1 - last
    if behind < 2:
        return [f"<td>{escape(cell)}</td>" for cell in cells]
    return [*(f"<td>{escape(cell)}</td>" for cell in cells[:last]), f'<td colspan="{behind + 1}">{escape(cells[last])}</td>']


def _sweeps(head: Head, rows: Sequence[Row]) -> str:
    parts = []
    for (op, dtype, of, over), points in plots.sweeps(rows).items():
        names = plots.forms(points)
        if not names:
            continue
        entries = [(form, f"--s{i % figures.SERIES}") for i, form in enumerate(names)]
        drawings = {"Time of forward and backward": plots.time_of(points, head),
                    "Peak memory above the inputs": plots.memory_of(points)}  # fmt: skip
        shown = "".join(f"<figure><h3>{title}</h3>{svg}</figure>" for title, svg in drawings.items() if svg)
        label = escape(f"{op}, {of}, over {over} in {dtype}")
        parts.append(f'<h3>{label}</h3>{frame.legend([*entries, (plots.LIMIT, "--muted")])}<div class="figures">{shown}</div>')
    return frame.title("How it grows") + "".join(parts) if parts else ""
