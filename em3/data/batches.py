"""Batches of rows to rank, with each row's history cut out of the events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..jagged import Jagged
from .table import RankingData


@dataclass(frozen=True)
class Batch:
    """``B`` rows. Items come twice: as catalogue numbers, which content is read by, and as ID rows.

    An ID row is the number plus one, and 0 for a user or item that no training row reaches, see :class:`Batches`.
    """

    user_id: Tensor  # [B] int64, ID row
    item: Tensor  # [B] int64, catalogue number
    item_id: Tensor  # [B] int64, ID row
    history: Jagged  # catalogue numbers, oldest first
    history_id: Jagged  # ID rows, the same offsets
    label: Tensor  # [B] float32
    distinct: Tensor  # [U] int64, the catalogue numbers in `item`, each once, ascending
    inverse: Tensor  # [B] int64: item == distinct[inverse]
    history_age: Tensor | None = None  # [T] int64, seconds from each event of a history to its row; None unless asked for

    @classmethod
    def from_rows(cls, item: Tensor, history: Jagged, label: Tensor, *, user: Tensor | None = None,
                  history_age: Tensor | None = None) -> Batch:  # fmt: skip
        """Of catalogue numbers alone, where every item and user is known.

        Args:
            item, user: ``[B]`` int64, from 0; without ``user`` all are row 0's unseen one.
            history: catalogue numbers, oldest first, of ``B`` rows.
            label: ``[B]``.
        """
        distinct, inverse = item.unique(return_inverse=True)
        user_id = torch.zeros_like(item) if user is None else user + 1
        history_id = Jagged(history.values() + 1, history.offsets())
        return cls(user_id, item, item + 1, history, history_id, label.float(), distinct, inverse, history_age)

    def distinct_id(self) -> Tensor:
        """``[U]``: the ID rows of ``distinct``."""
        return torch.empty_like(self.distinct).scatter_(0, self.inverse, self.item_id)

    def part(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` up to ``stop``, among the same ``distinct`` items: some of those may be in none of the rows."""
        rows = slice(start, stop)
        bounds = self.history.offsets()[start : stop + 1]
        events = slice(int(bounds[0]), int(bounds[-1]))
        return Batch(
            user_id=self.user_id[rows], item=self.item[rows], item_id=self.item_id[rows],
            history=Jagged(self.history.values()[events], bounds - bounds[0]),
            history_id=Jagged(self.history_id.values()[events], bounds - bounds[0]),
            label=self.label[rows], distinct=self.distinct, inverse=self.inverse[rows],
            history_age=None if self.history_age is None else self.history_age[events],
        )  # fmt: skip


class Batches:
    """Makes batches of a catalogue's rows.

    Known are the users of training rows, and the items that are candidates in them or stand in their histories as they
    are cut: those whose ID embeddings training moves. All others have ID row 0, lest their embeddings be read as they were
    drawn. This is not ``rows.cold``: an item that was shown in training and never chosen is cold and known.

    Args:
        data: the catalogue, its events and rows.
        history_length: at most so many events a history, the latest ones.
        ages: whether batches hold ``history_age``.
    """

    def __init__(self, data: RankingData, history_length: int, *, ages: bool = False) -> None:
        events, rows = data.events, data.rows
        self.data, self.history_length = data, history_length
        # Events by user, in order of time within each; a row's history ends where the user's first event at or after
        # `before` stands.
        order = np.argsort(events.user, kind="stable")
        self._event_item = events.item[order]
        self._event_time = events.time[order] if ages else None
        total = len(order)
        place = events.user[order] * total + order  # ascending
        self._stop = np.searchsorted(place, rows.user * total + np.minimum(rows.before, total))
        start = np.searchsorted(place, rows.user * total)
        self._start = np.maximum(start, self._stop - history_length)
        train = data.of_split("train")
        # In how many training histories each event stands: they are intervals of the events by user.
        change = np.bincount(self._start[train], minlength=total + 1) - np.bincount(self._stop[train], minlength=total + 1)
        seen = self._event_item[np.cumsum(change[:-1]) > 0]
        self._user_id = _numbered(data.num_users, rows.user[train])
        self._item_id = _numbered(len(data.items.ids), np.concatenate([rows.item[train], seen]))

    @property
    def num_ids(self) -> tuple[int, int]:
        """Rows that ID tables of users and of items need."""
        return len(self._user_id) + 1, len(self._item_id) + 1

    def item_ids(self) -> Tensor:
        """``[n]`` int64: the ID row of each catalogue item."""
        return torch.from_numpy(self._item_id)

    def history_lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._stop[rows] - self._start[rows]

    def of(self, rows: np.ndarray) -> Batch:
        """The batch of the rows at these positions."""
        table = self.data.rows
        offsets = np.concatenate([[0], np.cumsum(self.history_lengths(rows))])
        # Where in the events by user each history entry stands: its number in the batch, shifted to its row's start.
        places = np.arange(offsets[-1]) + np.repeat(self._start[rows] - offsets[:-1], np.diff(offsets))
        item, history = table.item[rows], self._event_item[places]
        distinct, inverse = np.unique(item, return_inverse=True)
        bounds, age = torch.from_numpy(offsets), None
        if self._event_time is not None:
            age = torch.from_numpy(np.repeat(table.time[rows], np.diff(offsets)) - self._event_time[places])
        return Batch(
            user_id=torch.from_numpy(self._user_id[table.user[rows]]),
            item=torch.from_numpy(item),
            item_id=torch.from_numpy(self._item_id[item]),
            history=Jagged(torch.from_numpy(history), bounds),
            history_id=Jagged(torch.from_numpy(self._item_id[history]), bounds),
            label=torch.from_numpy(table.label[rows]),
            distinct=torch.from_numpy(distinct),
            inverse=torch.from_numpy(inverse),
            history_age=age,
        )

    def epoch(self, rows: np.ndarray, batch_size: int, seed: int, epoch: int, skip: int = 0,
              rows_per_item: int = 1) -> Iterator[Batch]:  # fmt: skip
        """The rows in an order that ``seed`` and ``epoch`` fix, in whole batches, without the first ``skip`` of them.

        Rows that fill no batch are left out of this epoch; if there is less than one batch, they are the batch. With
        ``rows_per_item`` above 1, rows of one item, drawn at random, stand together in groups of that many.
        """
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(rows)
        if rows_per_item > 1:
            order = self._grouped(order, rows_per_item, random)
        for start in range(skip * batch_size, max(len(order) - batch_size, 0) + 1, batch_size):
            yield self.of(order[start : start + batch_size])

    def _grouped(self, order: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
        """The rows of each item in groups of ``size`` as they follow in ``order``, the groups in random order."""
        order = order[np.argsort(self.data.rows.item[order], kind="stable")]
        item = self.data.rows.item[order]
        number = np.arange(len(order)) - np.searchsorted(item, item)  # of a row among its item's
        group = np.cumsum(number % size == 0) - 1
        return order[np.argsort(random.permutation(len(order))[group], kind="stable")]


def _numbered(count: int, known: np.ndarray) -> np.ndarray:
    """``[count]`` int64 ID rows: the number plus one of those in ``known``, 0 of the others."""
    found = np.zeros(count, np.int64)
    found[known] = known + 1
    return found
