"""Users, what they are shown and when, and what they click: the numbers whose truth is known.

The logit of a click is ``taste . attributes + item quirk + low-rank user-item quirk + bias``. A user's taste is that of one
of a few personas plus something of their own. The quirks belong to IDs: no picture and no title tells of them.

The numbers are the same on every machine: sums run in float64 in a fixed order (no BLAS), and the click probability is
rounded to a whole number of millionths before an integer draw decides the label.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..table import SPLITS
from .attributes import ATTRIBUTES, STYLE_TASTE, STYLES, Content

PERSONAS = 5
PERSONA_SHARE = 0.95  # of the variance of the tastes
ITEM_QUIRK, PAIR_QUIRK, PAIR_RANK = 0.35, 0.4, 4  # standard deviations in logits
BIAS = -1.3
SPREAD_OF_POPULARITY = 0.7  # standard deviation of the logarithm of how often an item is shown
FROM_THE_START, COLD = 0.55, 0.15  # shares of the items; COLD ones appear in the last fifth of the requests only
TRAIN, VALID = 0.8, 0.1  # shares of the requests, in order of time
START, DAYS = 1_704_067_200, 120  # 1 January 2024, 00:00 UTC


@dataclass(frozen=True)
class Clicks:
    """Rows ``r = requests * candidates``, a request's rows together, in order of time."""

    request: np.ndarray  # [r] int64
    user: np.ndarray  # [r] int64
    item: np.ndarray  # [r] int64
    time: np.ndarray  # [r] int64, seconds since 1970
    split: np.ndarray  # [r] int8, index into SPLITS
    millionths: np.ndarray  # [r] int64, the click probability in millionths
    label: np.ndarray  # [r] int8

    @property
    def probability(self) -> np.ndarray:
        """``[r]`` float32."""
        return (self.millionths / 1e6).astype(np.float32)

    @property
    def cold(self) -> np.ndarray:
        """``[r]`` bool: nobody clicked the row's item in the training period."""
        clicked = self.item[(self.split == SPLITS.index("train")) & (self.label == 1)]
        return ~np.isin(self.item, clicked)

    def sha256(self) -> str:
        """Of all numbers, as little-endian bytes, column after column."""
        digest = hashlib.sha256()
        for column in (self.request, self.user, self.item, self.time, self.split, self.millionths, self.label):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()


def draw_clicks(
    streams: list[np.random.Generator], content: Content, *, num_users: int, num_requests: int, candidates: int
) -> Clicks:
    """``streams``: three generators, for tastes and quirks, for requests and for labels."""
    truth, shown, clicked = streams
    num_items = len(content.values)
    quirk = truth.standard_normal(num_items)
    pair_item = truth.standard_normal((PAIR_RANK, num_items))
    pair_user = truth.standard_normal((PAIR_RANK, num_users))
    persona = truth.integers(PERSONAS, size=num_users)

    user, item = _requests(shown, quirk, num_users, num_requests, candidates)
    request = np.repeat(np.arange(num_requests), candidates)
    user, item = np.repeat(user, candidates), item.reshape(-1)

    logit = BIAS + ITEM_QUIRK * quirk[item]
    for left, right in zip(pair_user, pair_item, strict=True):
        logit += PAIR_QUIRK / np.sqrt(PAIR_RANK) * left[user] * right[item]
    for column, attribute in enumerate(ATTRIBUTES):
        taste = attribute.taste * _tastes(truth, persona, len(attribute.values))  # [users, values]
        logit += taste[user, content.values[item, column]]
    for column in range(len(STYLES)):
        taste = STYLE_TASTE * _tastes(truth, persona, 2)[:, 0]  # [users], for the upper end against the lower
        logit += taste[user] * (content.styles[item, column] - 0.5) * np.sqrt(12)  # a uniform number of unit variance

    millionths = np.rint(1e6 / (1 + np.exp(-logit))).astype(np.int64)
    label = (clicked.integers(1_000_000, size=len(logit)) < millionths).astype(np.int8)
    gaps = shown.integers(1, max(1, 2 * DAYS * 86_400 // num_requests), size=num_requests, endpoint=True)
    time = START + np.cumsum(gaps)  # no two requests at the same second: earlier clicks are never in doubt
    bounds = [int(TRAIN * num_requests), int((TRAIN + VALID) * num_requests)]
    split = np.searchsorted(bounds, request, side="right").astype(np.int8)
    return Clicks(request, user, item, time[request], split, millionths, label)


def _tastes(rng: np.random.Generator, persona: np.ndarray, num_values: int) -> np.ndarray:
    """``[users, values]``: the persona's taste and the user's own, each of mean 0 and variance 1 over the values.

    So nobody clicks more than others by taste, and a user's habit of clicking tells nothing of which item they like.
    """
    common = _standard(rng.standard_normal((PERSONAS, num_values)))
    own = _standard(rng.standard_normal((len(persona), num_values)))
    return np.sqrt(PERSONA_SHARE) * common[persona] + np.sqrt(1 - PERSONA_SHARE) * own


def _standard(taste: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and variance 1."""
    centred = taste - taste.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True))


def _requests(
    rng: np.random.Generator, quirk: np.ndarray, num_users: int, num_requests: int, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """The user ``[requests]`` and the different items ``[requests, candidates]`` of each request, in order of time.

    Both are drawn in proportion to whole numbers, so rounding cannot change a draw. Items come out one after another:
    ordered by that, the ones that can be shown at a time are a prefix.
    """
    activity = _weights(rng.standard_normal(num_users), 0.5)
    totals = np.cumsum(activity)
    user = np.searchsorted(totals, rng.integers(totals[-1], size=num_requests), side="right")

    num_items = len(quirk)
    popularity = _weights(0.5 * quirk + np.sqrt(0.75) * rng.standard_normal(num_items), SPREAD_OF_POPULARITY)
    order = rng.permutation(num_items)
    release = _releases(rng, num_items, num_requests)  # [n], ascending
    totals = np.cumsum(popularity[order])
    available = totals[np.searchsorted(release, np.arange(num_requests), side="right") - 1]  # [requests]
    places = np.empty((num_requests, candidates), np.int64)
    for column in range(candidates):
        again = np.arange(num_requests)
        while len(again):
            places[again, column] = np.searchsorted(totals, rng.integers(available[again]), side="right")
            repeated = (places[again, :column] == places[again, column : column + 1]).any(axis=1)
            again = again[repeated]
    return user, order[places]


def _weights(normal: np.ndarray, spread: float) -> np.ndarray:
    return np.rint(1000 * np.exp(spread * normal)).astype(np.int64) + 1


def _releases(rng: np.random.Generator, num_items: int, num_requests: int) -> np.ndarray:
    """The first request that can show each item ``[n]``, ascending."""
    first, cold = int(FROM_THE_START * num_items), int(COLD * num_items)
    thousandths = np.concatenate(
        [
            np.zeros(first, np.int64),
            rng.integers(700, size=num_items - first - cold),
            rng.integers(int(1000 * TRAIN), 950, size=cold),
        ]
    )
    return np.sort(thousandths) * num_requests // 1000
