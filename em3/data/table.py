"""What every reader returns: items with words and pictures, events that histories are made of, rows to rank.

Items and users are numbers from 0 everywhere behind the readers; ``Items.ids`` keeps what the files called them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "valid", "test")


class DataError(ValueError):
    """Input data that cannot be used; the message names the file, and the row or column, and what it must be."""


@dataclass(frozen=True)
class Items:
    """The catalogue, ``n`` items."""

    ids: list[str]  # [n] as the files call them, unique
    texts: list[str]  # [n] all words about the item, "" = none
    pictures: list[Path | None]  # [n] None = the item has no picture


@dataclass(frozen=True)
class Events:
    """What users did, in order of time (equal times in the order of the file); histories are cut out of it."""

    user: np.ndarray  # [e] int64
    item: np.ndarray  # [e] int64
    time: np.ndarray  # [e] int64, seconds


@dataclass(frozen=True)
class Rows:
    """What is ranked: one candidate item of one request a row."""

    request: np.ndarray  # [r] int64, candidates shown together share a number
    user: np.ndarray  # [r] int64
    item: np.ndarray  # [r] int64
    label: np.ndarray  # [r] float32, 0 or 1
    time: np.ndarray  # [r] int64, seconds
    split: np.ndarray  # [r] int8, index into SPLITS
    cold: np.ndarray  # [r] bool, nobody chose the item in the training period, as the reader's layout defines it
    before: np.ndarray  # [r] int64: the row's history is the user's events at positions < before of Events
    probability: np.ndarray | None = None  # [r] float32, the true click probability where it is known


@dataclass(frozen=True)
class RankingData:
    """A catalogue, its events and the ranking task on them."""

    name: str
    items: Items
    num_users: int
    events: Events
    rows: Rows

    def of_split(self, split: str) -> np.ndarray:
        """Positions of a split's rows, int64."""
        return np.flatnonzero(self.rows.split == SPLITS.index(split))
