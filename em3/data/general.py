"""Anybody's data: interactions.{parquet,csv} and items.{parquet,csv} in one folder.

interactions: ``user``, ``item``, ``label`` (0 or 1), ``timestamp`` (integer, or ISO 8601), and if wanted ``request``
(candidates shown together), ``split`` (train, valid, test), ``probability`` (the true click probability).
items: ``item``, and if wanted ``picture`` (a path relative to the folder) and columns of words, strings or lists of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .columns import STRING, Table, log, number, numbered, read_csv, read_parquet, some, unique_items
from .requests import cold, split_by_time
from .table import SPLITS, DataError, Events, Items, RankingData, Rows


def read(folder: Path) -> RankingData:
    """Rows as they are in the file; those with label 1 are the events that histories are made of, in order of time.

    Without ``request``, a user's rows make one request. Without ``split``, rows are split 80 : 10 : 10 by time, equal
    times together. An item is cold if no training row with label 1 has it.

    Raises:
        DataError: naming file, row (from 1, the line of names left out) and column.
    """
    table = _read(folder, "interactions", {"user": STRING, "item": STRING, "request": STRING})
    items = read_items(folder)
    item = number(table.strings("item"), items.ids)
    table.wrong("item", item < 0, "an item of the table of items")
    (user,), num_users = numbered(table.strings("user"))
    label, time = table.labels("label"), table.times("timestamp")
    if not table.rows:
        raise DataError(f"{table.path}: has no rows")
    request = user
    if "request" in table:
        (request,), requests = numbered(table.strings("request"))
        first = np.full(requests, -1)
        first[request[::-1]] = user[::-1]
        table.wrong("request", user != first[request], "a request of one user, and earlier rows of it are another user's")
    split = table.splits("split") if "split" in table else split_by_time(time)
    if not (split == 0).any():
        raise DataError(f"{table.path}: column 'split': must be {SPLITS[0]!r} in some rows")

    liked = np.flatnonzero(label == 1)
    liked = liked[np.argsort(time[liked], kind="stable")]
    events = Events(user[liked], item[liked], time[liked])
    rows = Rows(
        request=request,
        user=user,
        item=item,
        label=label,
        time=time,
        split=split,
        cold=cold(item, item[(split == 0) & (label == 1)]),
        before=np.searchsorted(events.time, time, "left"),
        probability=table.fractions("probability") if "probability" in table else None,
    )
    return RankingData(folder.resolve().name, items, num_users, events, rows)


def tables(folder: Path, name: str) -> list[Path]:
    """The files that may hold a table and are there."""
    return [path for path in (folder / f"{name}.parquet", folder / f"{name}.csv") if path.is_file()]


def _read(folder: Path, name: str, types: dict[str, Any]) -> Table:
    found = tables(folder, name)
    if len(found) != 1:
        raise DataError(f"{folder}: must hold one of {name}.parquet and {name}.csv, has {'both' if found else 'neither'}")
    return read_csv(found[0], types) if found[0].suffix == ".csv" else read_parquet(found[0])


def read_items(folder: Path) -> Items:
    table = _read(folder, "items", {"item": STRING, "picture": STRING})
    ids = unique_items(table, "item")
    others = [name for name in table.names if name not in ("item", "picture")]
    words = {name: table.words(name) for name in others}
    unused = [name for name, found in words.items() if found is None]
    if unused:
        log.info("%s: not words, so not used: %s", table.path, ", ".join(unused))
    columns = [found for found in words.values() if found is not None]
    texts = [" ".join(word for word in row if word) for row in zip(*columns, strict=True)] if columns else [""] * len(ids)
    pictures: list[Path | None] = [None] * len(ids)
    if "picture" in table:
        names = table.strings("picture", empty=True).to_pylist()
        pictures = [folder / name if name else None for name in names]
        missing = [row for row, path in enumerate(pictures) if path is not None and not path.is_file()]
        for row in missing:
            pictures[row] = None
        if missing:
            log.warning("%s: %d of %d pictures named are not there, their items count as without a picture: %s",
                        table.path, len(missing), sum(map(bool, names)), some([names[row] for row in missing]))  # fmt: skip
    return Items(ids, texts, pictures)
