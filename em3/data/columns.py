"""Columns out of CSV and Parquet files as numpy arrays, with every complaint naming file, row and column."""

from __future__ import annotations

import datetime
import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .table import SPLITS, DataError, Events

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet
except ImportError as error:
    raise ImportError("reading data sets needs pyarrow, which is not installed: pip install 'em3[train]'") from error

log = logging.getLogger("em3.data")
STRING = pa.string()


class Table:
    """A file's columns. Methods take a column's name and raise DataError with the file, the row and the column.

    Rows are counted from 1, the line of the column names left out.
    """

    def __init__(self, path: Path, table: pa.Table) -> None:
        self.path, self.table = path, table
        self.names: list[str] = table.column_names
        self.rows: int = table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]!r} to be it?" if near else ""
            raise DataError(f"{self.path}: column {name!r} is missing, there are {', '.join(self.names)}{hint}")
        if self.names.count(name) > 1:
            raise DataError(f"{self.path}: column {name!r} is there {self.names.count(name)} times, must be there once")
        found = self.table.column(name)
        return found.cast(found.type.value_type) if pa.types.is_dictionary(found.type) else found

    def wrong(self, name: str, bad: np.ndarray, must: str) -> None:
        """Raise for the first true element of ``bad`` ``[rows]``, if there is one."""
        if bad.any():
            row = int(bad.argmax())
            was = self.table.column(name)[row].as_py()
            more = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
            raise DataError(f"{self.path}: row {row + 1}, column {name!r}: was {was!r}, must be {must}{more}")

    def strings(self, name: str, *, empty: bool = False) -> pa.ChunkedArray:
        """Strings; integers as they are written. ``empty``: whether nothing at all will do."""
        found = self._of_type(name, "strings or integers", pa.types.is_integer)
        found = pc.fill_null(found.cast(STRING), "")
        if not empty:
            self.wrong(name, pc.equal(found, "").to_numpy(), "a name or a number, not empty")
        return found

    def integers(self, name: str) -> np.ndarray:
        """``[rows]`` int64."""
        found = self._of_type(name, "integers", pa.types.is_integer)
        if is_string(found.type):  # what the reader of CSV makes of a column where not everything is a number
            self._unlike(name, found, r"^[+-]?\d{1,18}$", "an integer")
        return found.cast(pa.int64()).to_numpy()

    def fractions(self, name: str) -> np.ndarray:
        """``[rows]`` float32, each from 0 to 1."""
        must = "a number from 0 to 1"
        found = self._of_type(name, "numbers from 0 to 1", pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
        if is_string(found.type):
            self._unlike(name, found, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$", must)
        values = found.cast(pa.float64()).to_numpy()
        self.wrong(name, ~((values >= 0) & (values <= 1)), must)
        return values.astype(np.float32)

    def labels(self, name: str) -> np.ndarray:
        """``[rows]`` float32, 0 or 1."""
        values = self.fractions(name)
        self.wrong(name, (values != 0) & (values != 1), "0 or 1")
        return values

    def splits(self, name: str) -> np.ndarray:
        """``[rows]`` int8, index into SPLITS."""
        found = number(self.strings(name), SPLITS)
        self.wrong(name, found < 0, f"one of {', '.join(SPLITS)}")
        return found.astype(np.int8)

    def times(self, name: str) -> np.ndarray:
        """``[rows]`` int64: integers as they are, dates and ISO 8601 times in seconds since 1970 (UTC if no zone is given)."""
        must = "an integer (seconds since 1970) or a time in ISO 8601"
        kinds = pa.types.is_integer, pa.types.is_timestamp, pa.types.is_date
        found = self._of_type(name, "integers or ISO 8601 times", *kinds)
        if is_string(found.type):
            parsed = [_seconds(text) for text in found.to_pylist()]
            self.wrong(name, np.array([seconds is None for seconds in parsed], bool), must)
            return np.array(parsed, np.int64)
        if not pa.types.is_integer(found.type):
            found = found.cast(pa.timestamp("s", getattr(found.type, "tz", None)), safe=False)
        return found.cast(pa.int64()).to_numpy()

    def words(self, name: str) -> list[str] | None:
        """``[rows]`` strings, lists of them joined; "" where there is nothing, None if the column holds something else."""
        found = self.column(name)
        if (pa.types.is_list(found.type) or pa.types.is_large_list(found.type)) and is_string(found.type.value_type):
            return [" ".join(word for word in row or () if word) for row in found.to_pylist()]
        return [word or "" for word in found.to_pylist()] if is_string(found.type) else None

    def _of_type(self, name: str, must: str, *kinds: Any) -> pa.ChunkedArray:
        """The column if it is of strings or of one of these kinds; only strings may be null, for they may be optional."""
        found = self.column(name)
        if is_string(found.type):
            return found
        self.wrong(name, found.is_null().to_numpy(), f"one of {must}")
        if self.rows and not any(kind(found.type) for kind in kinds):
            raise DataError(f"{self.path}: column {name!r}: was of type {found.type}, must be {must}")
        return found

    def _unlike(self, name: str, found: pa.ChunkedArray, pattern: str, must: str) -> None:
        fits = pc.fill_null(pc.match_substring_regex(found, pattern), False)
        self.wrong(name, pc.invert(fits).to_numpy(), must)


def _seconds(text: str | None) -> int | None:
    """A time in ISO 8601 as seconds since 1970, rounded down; None = it is none."""
    try:
        time = datetime.datetime.fromisoformat(text or "")
    except ValueError:
        return None
    zoned = time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
    return (zoned - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(seconds=1)


def is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_csv(path: Path, types: dict[str, pa.DataType], *, names: Sequence[str] | None = None,
             delimiter: str = ",", encoding: str = "utf8") -> Table:  # fmt: skip
    """A CSV file; ``types`` of columns that must not be guessed, ``names`` where the file has no line of names."""
    _must_exist(path)
    uneven: list[Any] = []

    def refuse(row: Any) -> str:
        uneven.append(row)
        return "error"

    quote, first = ('"', 1) if names is None else (False, 0)  # the line of names is a row to pyarrow
    try:
        table = pyarrow.csv.read_csv(
            path,
            # With threads rows are not counted, and messages could not name one.
            read_options=pyarrow.csv.ReadOptions(column_names=names, encoding=encoding, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=quote, newlines_in_values=bool(quote),
                                                   invalid_row_handler=refuse),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""]),
        )  # fmt: skip
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if not uneven:
            raise DataError(f"{path}: is not a table in CSV: {error}") from None
        row = uneven[0]
        was, must = f"{row.actual_columns} columns", f"{row.expected_columns}: {row.text!r}"
        raise DataError(f"{path}: row {row.number - first}: had {was}, must have {must}") from None
    return Table(path, table)


def read_parquet(path: Path) -> Table:
    _must_exist(path)
    try:
        return Table(path, pyarrow.parquet.read_table(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file that can be read: {error}") from None


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: is missing")


def number(strings: pa.ChunkedArray, among: Any) -> np.ndarray:
    """The position of each string in ``among`` (distinct strings), -1 = not there; int64."""
    found = pc.index_in(strings, value_set=pa.array(among, STRING))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def numbered(*columns: pa.ChunkedArray) -> tuple[list[np.ndarray], int]:
    """Columns of names as numbers in the order in which the names first occur, and how many names there are."""
    names = pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], STRING))
    return [number(column, names) for column in columns], len(names)


def unique_items(table: Table, name: str) -> list[str]:
    """The names of a catalogue's items, each there once."""
    ids = table.strings(name)
    (first,), _ = numbered(ids)
    twice = np.ones(table.rows, bool)
    twice[np.unique(first, return_index=True)[1]] = False
    table.wrong(name, twice, "an item that no earlier row names")
    return ids.to_pylist()


def known_events(path: Path, user: np.ndarray, item: np.ndarray, time: np.ndarray, ids: pa.ChunkedArray) -> Events:
    """Events whose item is in the catalogue (``item`` is not -1); one warning counts the others."""
    kept = item >= 0
    if not kept.all():
        names = pc.unique(ids.filter(pa.array(~kept)))
        log.warning(
            "%s: %d of %d events are of %d items that the table of items lacks, and are left out of histories: %s",
            path, (~kept).sum(), len(kept), len(names), some(names.to_pylist()),
        )  # fmt: skip
    return Events(user[kept], item[kept], time[kept])


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def with_decade(title: str) -> str:
    """``... (1994) 1990s`` of ``... (1994)``: to an encoder of words 1994 and 1995 are as far apart as any two words."""
    year = re.search(r"\((\d{3})\d\)$", title)
    return f"{title} {year[1]}0s" if year else title
