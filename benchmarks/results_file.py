"""The results of a run as JSON lines: a first line about the machine, then a row for each form of each shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from em3.files import atomic

FILE = "results.jsonl"
# What must be the same for a run to be gone on with.
SAME = ("device", "threads", "instruction_set", "torch", "em3", "sources", "dtypes", "quick")


class ResultsError(ValueError):
    """A results folder that cannot be used as asked; the message says what to do."""


class Results:
    """A results folder. Every addition rewrites its file whole, so that a killed run leaves no half of a line.

    Args:
        folder: made if needed.
        head: about the machine and the run; see ``SAME``.
        resume: whether to go on with what the folder holds.

    Raises:
        ResultsError: the folder holds results and ``resume`` is not set, they were measured otherwise, or are damaged.
    """

    def __init__(self, folder: Path, head: dict[str, Any], resume: bool) -> None:
        self.path = folder / FILE
        self.head = head
        self.rows: list[dict[str, Any]] = []
        if not self.path.exists():
            self._write()
            return
        if not resume:
            raise ResultsError(f"--out: {folder} holds results; go on with them by --resume, or name another folder")
        before, self.rows = read(self.path)
        for key in SAME:
            if before.get(key) != head[key]:
                raise ResultsError(f"--resume: {self.path} was measured with {key} {before.get(key)}, and this is {head[key]}; "
                                   "name another folder")  # fmt: skip
        self.head = before

    def must_be_of(self, labels: dict[str, str]) -> None:
        """Raises ResultsError if a unit was measured at another shape of the same name than the labels give it."""
        for row in self.rows:
            label = labels.get(row["unit"], row.get("label"))
            if row.get("label") != label:
                raise ResultsError(f"--resume: {self.path} holds {row['unit']!r} measured at {row['label']}, and that shape is now "
                                   f"{label}; give it another name, or name another folder")  # fmt: skip

    def has(self, unit: str) -> bool:
        return any(row["unit"] == unit for row in self.rows)

    def add(self, unit: str, rows: list[dict[str, Any]]) -> None:
        self.rows += [{"unit": unit} | row for row in rows]
        self._write()

    def _write(self) -> None:
        with atomic(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in (self.head, *self.rows)).encode())


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head and the rows of a file of results.

    Raises:
        ResultsError: it holds something else.
    """
    found: list[dict[str, Any]] = []
    number = 1
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found.append(json.loads(line))
            if not isinstance(found[-1], dict) or ("unit" if number > 1 else "ceilings") not in found[-1]:
                raise ValueError("it is of another kind")
        head, *rows = found
    except ValueError as error:
        raise ResultsError(f"{path}: does not hold results of `em3 bench`, or is damaged (line {number}: {error}); take out the "
                           "damaged line with all rows of its unit, or name another folder") from None  # fmt: skip
    return head, rows
