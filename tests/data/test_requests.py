"""Requests made out of a log: what each candidate must be, at what rate, and that nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from em3.data.requests import WEEK, make_requests, split_by_time
from em3.data.table import DataError, Events, Rows


def log(users: int, items: int, events: int, span: int, seed: int) -> Events:
    generator = np.random.default_rng(seed)
    time = np.sort(generator.integers(0, span, events))
    return Events(generator.integers(0, users, events), np.minimum(generator.zipf(1.5, events), items) - 1, time)


def check(rows: Rows, events: Events, candidates: int, window: int) -> None:
    """Every promise, by brute force."""
    at = rows.request.reshape(-1, candidates)
    assert (at == at[:, :1]).all()
    assert (np.diff(at[:, 0]) > 0).all()
    assert np.array_equal(rows.before, rows.request)
    assert np.array_equal(rows.user, events.user[rows.request])
    assert np.array_equal(rows.time, events.time[rows.request])
    label, item = rows.label.reshape(-1, candidates), rows.item.reshape(-1, candidates)
    assert np.array_equal(label, np.eye(1, candidates).repeat(len(at), 0))
    assert np.array_equal(item[:, 0], events.item[at[:, 0]])
    for (event, *_), (_, *negatives) in zip(at, item, strict=True):
        assert len(set(negatives)) == candidates - 1
        assert not set(negatives) & set(events.item[events.user == events.user[event]])
        near = np.abs(events.time - events.time[event]) <= window
        assert set(negatives) <= set(events.item[near])


@given(st.integers(0, 2**32), st.integers(2, 4), st.sampled_from([1, 50, 10**6]), st.integers(1, 12))
def test_candidates(seed: int, candidates: int, window: int, users: int) -> None:
    events = log(users, items=8, events=60, span=300, seed=seed)
    possible = []
    for user, time in zip(events.user, events.time, strict=True):
        near = events.item[np.abs(events.time - time) <= window]
        possible.append(len(set(near) - set(events.item[events.user == user])) >= candidates - 1)
    arguments = dict(candidates=candidates, window=window, train=1.0, valid=0.0, seed=seed)
    if len(set(events.time[possible])) < 2:  # none to ask, or none left for training
        with pytest.raises(DataError, match=r"none of 60 had|too few distinct times"):
            make_requests(events, **arguments)
        return
    rows = make_requests(events, **arguments)
    check(rows, events, candidates, window)
    assert np.array_equal(np.unique(rows.request), np.flatnonzero(possible))


def test_drawn_by_popularity_in_the_window(seed: int) -> None:
    """Users of two films each; the negatives of one user's events have the rates of the others' interactions near them."""
    generator = np.random.default_rng(seed)
    weight = np.array([0.5, 0.3, 0.15, 0.05])
    m = 4000
    item = generator.choice(4, m, p=weight)
    user, time = np.arange(m), np.sort(generator.integers(0, 10**6, m))
    rows = make_requests(Events(user, item, time), candidates=2, window=10**6, seed=seed)
    for own in range(4):
        drawn = rows.item[1::2][rows.item[::2] == own]
        share = np.bincount(drawn, minlength=4) / len(drawn)
        rest = np.where(np.arange(4) == own, 0, np.bincount(item, minlength=4))
        rest = rest / rest.sum()
        assert np.abs(share - rest).max() < 6 * np.sqrt(0.25 / len(drawn)), seed


def test_rare_items_are_found_too(seed: int) -> None:
    """User 0 knows the item of nearly every event: thrown away draws alone would not find the two that are left."""
    item = np.concatenate([np.zeros(5000, np.int64), [1, 2, 0]])
    user = np.concatenate([np.arange(1, 5001), [1, 2, 0]])
    rows = make_requests(Events(user, item, np.arange(5003)), candidates=3, window=10**5, seed=seed)
    assert set(rows.item[rows.user == 0]) == {0, 1, 2}


def test_rare_items_are_drawn_by_popularity_too(seed: int) -> None:
    """User 0 chose the film of all but ten interactions 400 times; nine of the ten are of item 1."""
    item = np.concatenate([np.zeros(4400, np.int64), [1] * 9, [2]])
    user = np.concatenate([np.zeros(400, np.int64), np.arange(1, 4011)])
    rows = make_requests(Events(user, item, np.arange(4410)), candidates=2, window=10**5, seed=seed)
    drawn = rows.item[(rows.user == 0) & (rows.label == 0)]
    assert len(drawn) == 400
    assert (drawn == 1).mean() == pytest.approx(0.9, abs=0.1)


def test_window_is_in_time_on_both_sides() -> None:
    time = np.array([0, 9, 10, 20, 30, 31])
    events = Events(np.arange(6), np.arange(6), time)
    seen: dict[int, set[int]] = {}
    for seed in range(60):
        rows = make_requests(events, candidates=2, window=10, seed=seed)
        for positive, negative in rows.item.reshape(-1, 2).tolist():
            seen.setdefault(positive, set()).add(negative)
    assert seen == {0: {1, 2}, 1: {0, 2}, 2: {0, 1, 3}, 3: {2, 4}, 4: {3, 5}, 5: {4}}


def test_split_cold_and_shares(seed: int) -> None:
    events = log(200, items=300, events=5000, span=20 * WEEK, seed=seed)
    rows = make_requests(events, seed=seed)
    last = events.time[rows.request[rows.split == 0]].max()
    assert (rows.time[rows.split > 0] > last).all()
    assert rows.time[rows.split == 1].max() < rows.time[rows.split == 2].min()
    assert np.bincount(rows.split) / len(rows.split) == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert np.array_equal(rows.cold, ~np.isin(rows.item, events.item[events.time <= last]))
    assert rows.cold.any()


def test_per_user(seed: int) -> None:
    events = log(20, items=100, events=800, span=WEEK, seed=seed)
    rows = make_requests(events, per_user=3, seed=seed)
    check(rows, events, 5, WEEK)
    asked = np.bincount(events.user[np.unique(rows.request)], minlength=20)
    assert np.array_equal(asked, np.minimum(np.bincount(events.user, minlength=20), 3))


def test_the_seed_decides(seed: int) -> None:
    events = log(50, items=100, events=500, span=WEEK, seed=seed)
    one, again, other = (make_requests(events, seed=s) for s in (seed, seed, seed + 1))
    assert np.array_equal(one.item, again.item)
    assert not np.array_equal(one.item, other.item)


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(candidates=1), "candidates: was 1"), (dict(window=0), "window: was 0"), (dict(per_user=0), "per_user: was 0")],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_requests(log(5, 9, 50, WEEK, 0), **change)


def test_wrong_events() -> None:
    number = np.array([0, 1])
    with pytest.raises(DataError, match="not in order of time"):
        make_requests(Events(number, number, np.array([5, 4])))
    with pytest.raises(DataError, match="none of 0 had"):
        make_requests(Events(number[:0], number[:0], number[:0]))


def test_split_by_time_keeps_equal_times_together() -> None:
    assert split_by_time(np.array([3, 1, 2, 9, 5, 4, 6, 8, 7, 10])).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert split_by_time(np.array([1, 1, 1, 1, 1, 1, 1, 2, 2, 2])).tolist() == [0] * 7 + [2] * 3
    with pytest.raises(DataError, match="too few distinct times"):
        split_by_time(np.array([4, 4, 4]))
