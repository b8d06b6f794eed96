"""Batches: histories that never see the present, IDs of what training knows, epochs that can be resumed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from em3.data.batches import Batch, Batches
from em3.data.table import Events, Items, RankingData, Rows
from em3.jagged import Jagged
from em3.models import DIN, DCNv2


def catalogue(rng: np.random.Generator, num_users: int, n: int, num_events: int, num_rows: int) -> RankingData:
    events = Events(
        rng.integers(num_users, size=num_events), rng.integers(n, size=num_events), np.sort(rng.integers(99, size=num_events))
    )
    rows = Rows(
        request=np.arange(num_rows) // 3, user=rng.integers(num_users, size=num_rows), item=rng.integers(n, size=num_rows),
        label=rng.integers(2, size=num_rows).astype(np.float32), time=np.zeros(num_rows, np.int64),
        split=rng.integers(3, size=num_rows).astype(np.int8), cold=np.zeros(num_rows, bool),
        before=rng.integers(num_events + 1, size=num_rows),
    )  # fmt: skip
    nothing: list[Path | None] = [None] * n
    return RankingData("made up", Items([f"i{i}" for i in range(n)], [""] * n, nothing), num_users, events, rows)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6), st.integers(0, 30), st.integers(0, 20), st.integers(1, 8))
def test_batches_against_loops(seed, num_users, n, num_events, num_rows, length):
    data = catalogue(np.random.default_rng(seed), num_users, n, num_events, num_rows)
    batches = Batches(data, length)
    train = data.of_split("train")
    known_items, known_users = set(data.rows.item[train]), set(data.rows.user[train])
    for row in train:
        before = zip(data.events.user[: data.rows.before[row]], data.events.item, strict=False)
        known_items |= set([item for user, item in before if user == data.rows.user[row]][-length:])
    rows = np.arange(num_rows)[::-1].copy()
    batch = batches.of(rows)
    offsets = batch.history.offsets().tolist()
    assert offsets[0] == 0
    assert len(offsets) == num_rows + 1
    assert torch.equal(batch.history_id.offsets(), batch.history.offsets())
    for b, row in enumerate(rows):
        user, item = data.rows.user[row], data.rows.item[row]
        past = [i for e, i in enumerate(data.events.item) if data.events.user[e] == user and e < data.rows.before[row]]
        start, stop = offsets[b], offsets[b + 1]
        assert batch.history.values()[start:stop].tolist() == past[-length:]
        assert batch.history_id.values()[start:stop].tolist() == [i + 1 if i in known_items else 0 for i in past[-length:]]
        assert batch.user_id[b] == (user + 1 if user in known_users else 0)
        assert batch.item[b] == item
        assert batch.item_id[b] == (item + 1 if item in known_items else 0)
        assert batch.label[b] == data.rows.label[row]
    assert torch.equal(batch.distinct[batch.inverse], batch.item)
    assert batch.distinct.tolist() == sorted(set(data.rows.item[rows]))
    assert torch.equal(batch.distinct_id()[batch.inverse], batch.item_id)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4))
def test_an_epoch_is_a_permutation_that_can_be_resumed(seed, num_rows, batch_size, together):
    data = catalogue(np.random.default_rng(seed), 3, 50, 10, num_rows)
    batches, rows = Batches(data, 5), np.arange(num_rows)
    whole = list(batches.epoch(rows, batch_size, seed, 1, 0, together))
    assert len(whole) == max(1, num_rows // batch_size)
    items = sorted(torch.cat([b.item for b in whole]).tolist())
    rest = sorted(data.rows.item.tolist())
    for item in items:
        rest.remove(item)  # each row at most once
    assert len(rest) == (num_rows % batch_size if num_rows >= batch_size else 0)
    for skip in range(len(whole) + 1):
        again = list(batches.epoch(rows, batch_size, seed, 1, skip, together))
        assert [b.item.tolist() for b in again] == [b.item.tolist() for b in whole[skip:]]
    if num_rows > 30:
        other = list(batches.epoch(rows, batch_size, seed, 2, 0, together))
        assert [b.item.tolist() for b in other] != [b.item.tolist() for b in whole]


def test_rows_of_an_item_stand_together(seed):
    data = catalogue(np.random.default_rng(seed), 50, 60, 400, 1000)
    batches, rows = Batches(data, 5), np.arange(1000)
    item = next(batches.epoch(rows, 1000, seed, 1, 0, 4)).item.tolist()
    runs = [len(list(run)) for _, run in itertools.groupby(item)]
    # Groups of 4, two of one item at times side by side; what is left of an item's rows is one group more.
    assert sum(length % 4 > 0 for length in runs) <= 60
    assert sorted(item) == sorted(data.rows.item.tolist())
    alone = [len(set(b.item.tolist())) for b in batches.epoch(rows, 100, seed, 1)]
    grouped = [len(set(b.item.tolist())) for b in batches.epoch(rows, 100, seed, 1, 0, 4)]
    assert max(grouped) < min(alone)


def test_known_is_what_training_moves(seed):
    """Every ID embedding that some training row gives a gradient has a row of its own, and no other."""
    data = catalogue(np.random.default_rng(seed), 60, 200, 400, 60)
    batches = Batches(data, 1)
    for ranker in (DIN, DCNv2):
        model = ranker(*batches.num_ids, dim=4, hidden=(64,), dropout=0.0)
        model(batches.of(data.of_split("train"))).square().sum().backward()
        own = batches.item_ids()
        moved = model.items.weight.grad[1:].any(1)
        assert torch.equal(moved, own > 0)
        assert torch.equal(own[moved], torch.arange(1, 201)[moved])
        users = batches.of(np.arange(60)).user_id.unique()
        assert torch.equal(model.users.weight.grad[1:].any(1).nonzero()[:, 0] + 1, users[users > 0])
    # There are events of users without a training row, and events that a longer history would hold.
    assert len(set(data.events.item)) > int(moved.sum())
    assert int((Batches(data, 9).item_ids() > 0).sum()) > int(moved.sum())


def test_a_batch_of_catalogue_numbers():
    item, user, age = torch.tensor([4, 2, 4]), torch.tensor([0, 7, 1]), torch.tensor([5, 60, 7])
    history = Jagged(torch.tensor([3, 0, 2]), torch.tensor([0, 2, 2, 3]))
    batch = Batch.from_rows(item, history, torch.tensor([1, 0, 1]), user=user, history_age=age)
    assert torch.equal(batch.distinct[batch.inverse], item)
    assert batch.distinct_id().tolist() == [3, 5]
    assert (batch.user_id.tolist(), batch.item_id.tolist()) == ([1, 8, 2], [5, 3, 5])
    assert (batch.history_id.values().tolist(), batch.history_id.offsets().tolist()) == ([4, 1, 3], [0, 2, 2, 3])
    assert batch.history_age is age
    assert batch.label.dtype == torch.float32
    assert not Batch.from_rows(item, history, torch.zeros(3)).user_id.any()
