"""A ranking task out of a log of interactions: each event against items that others chose at about the same time."""

from __future__ import annotations

import logging

import numpy as np

from .table import DataError, Events, Rows

log = logging.getLogger("em3.data")

WEEK = 7 * 24 * 3600
_ROUNDS = 24  # of drawing and throwing away, before what is left is drawn from the exact list


def make_requests(events: Events, *, candidates: int = 5, window: int = WEEK, train: float = 0.8, valid: float = 0.1,
                  per_user: int | None = None, seed: int = 0) -> Rows:  # fmt: skip
    """One request for each event: its item with label 1, and ``candidates - 1`` items with label 0.

    Those are items of interactions within ``window`` seconds before or after the event, drawn interaction by
    interaction (so by popularity at that time), distinct, and of no interaction of this user at any time. Popularity
    alone then tells nothing about the label. Where a window holds too few such items, there is no request, and one line
    in the log counts them.

    Args:
        events: in order of time.
        candidates: items of a request, 2 or more.
        train, valid: shares of the requests in order of time, the rest is test; equal times are never split.
        per_user: at most so many requests a user, drawn at random; None = one for each event.
        seed: of all draws.

    Returns:
        Rows in order of time, each request's positive first. ``request`` and ``before`` are the event's position.

    Raises:
        ValueError: if ``candidates`` is less than 2, or ``per_user`` or ``window`` less than 1.
        DataError: if events are not in order of time, or there is no request, or none left for training.
    """
    most = len(events.time) + 1 if per_user is None else per_user
    for name, value, least in (("candidates", candidates, 2), ("window", window, 1), ("per_user", most, 1)):
        if value < least:
            raise ValueError(f"{name}: was {value}, must be {least} or more")
    if (np.diff(events.time) < 0).any():
        raise DataError("events: were not in order of time, must be sorted by it")
    generator = np.random.default_rng(seed)
    asked = np.arange(len(events.time)) if per_user is None else _some_of_each(events.user, per_user, generator)
    negatives = _negatives(events, asked, candidates - 1, window, generator)  # [m, candidates - 1]
    full = negatives[:, 0] >= 0  # all or none of a request's places are filled
    if not full.all():
        log.info("%d of %d events had fewer than %d items of others around them and make no request",
                 (~full).sum(), len(full), candidates - 1)  # fmt: skip
    event, negatives = asked[full], negatives[full]
    if not len(event):
        raise DataError(f"events: none of {len(asked)} had {candidates - 1} items of other users within {window} s")

    item = np.concatenate([events.item[event, None], negatives], 1).ravel()
    time = events.time[event]
    split = split_by_time(time, train, valid)
    label = np.zeros((len(event), candidates), np.float32)
    label[:, 0] = 1
    return Rows(
        request=event.repeat(candidates),
        user=events.user[event].repeat(candidates),
        item=item,
        label=label.ravel(),
        time=time.repeat(candidates),
        split=split.repeat(candidates),
        cold=cold(item, events.item[events.time <= time[split == 0].max()]),
        before=event.repeat(candidates),
    )


def split_by_time(time: np.ndarray, train: float = 0.8, valid: float = 0.1) -> np.ndarray:
    """``[r]`` int8: 0, 1, 2 = train, valid, test by shares in order of time; equal times go together to the later split.

    Raises:
        DataError: if there is nothing to train on then.
    """
    order = np.sort(time)
    cuts = [order[min(round(share * len(time)), len(time) - 1)] for share in (train, train + valid)]
    split = np.searchsorted(cuts, time, side="right").astype(np.int8)
    if not (split == 0).any():
        raise DataError(f"timestamps: {len(time)} rows have too few distinct times to be split by time into train and test")
    return split


def cold(item: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Whether each item is none of those with an event in the training period."""
    warm = np.zeros(max(item.max(initial=-1), trained.max(initial=-1)) + 1, bool)
    warm[trained] = True
    return ~warm[item]


def _some_of_each(user: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of at most so many events a user, at random, in order."""
    order = np.lexsort((generator.random(len(user)), user))
    place = np.arange(len(user)) - np.searchsorted(user[order], user[order])  # within the user
    return np.sort(order[place < most])


def _negatives(events: Events, asked: np.ndarray, count: int, window: int, generator: np.random.Generator) -> np.ndarray:
    """``[m, count]`` items for each event asked, all of -1 or none where fewer can be found."""
    user, time = events.user[asked], events.time[asked]
    low = np.searchsorted(events.time, time - window, "left")
    high = np.searchsorted(events.time, time + window, "right")
    width = int(events.item.max(initial=0)) + 1
    touched = np.unique(events.user * width + events.item)
    found = np.full((count, len(asked)), -1, np.int64)
    left = np.argsort(user, kind="stable")  # requests with an empty place; by user, so that look-ups in touched are near
    for _ in range(_ROUNDS):
        for place in range(count):
            empty = left[found[place, left] < 0]
            drawn = events.item[generator.integers(low[empty], high[empty])]
            key = user[empty] * width + drawn
            at = np.minimum(np.searchsorted(touched, key), len(touched) - 1)
            good = (touched[at] != key) & (found[:, empty] != drawn).all(0)
            found[place, empty[good]] = drawn[good]
        left = left[(found[:, left] < 0).any(0)]
    for row in left:
        items, times = np.unique(events.item[low[row] : high[row]], return_counts=True)
        mine = touched[np.searchsorted(touched, user[row] * width) : np.searchsorted(touched, (user[row] + 1) * width)]
        others = ~np.isin(items, mine - user[row] * width)
        items, times = items[others], times[others]
        if len(items) < count:
            found[:, row] = -1
        else:
            found[:, row] = generator.choice(items, count, replace=False, p=times / times.sum())
    return found.T
