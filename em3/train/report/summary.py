"""What a report is made of: plain numbers and words, as the JSON files of a run folder hold them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ID_ONLY, TWO_STAGE, EM3, PERFECT = "ID-only", "two-stage", "EM3", "perfect ranker"

DRAWN_ITEMS = 400  # of an Alignment; more points hide each other


@dataclass(frozen=True)
class Curve:
    """The training of one arm with one seed."""

    steps: list[int]
    loss: list[float]  # at steps; the ranking loss without the contrastive one, so that the arms compare
    valid_steps: list[int]
    valid_auc: list[float]  # at valid_steps


@dataclass(frozen=True)
class Cost:
    """What a training step of an arm costs; milliseconds are wall time."""

    step_ms_p20: float
    step_ms: float  # median
    step_ms_p80: float
    samples_per_s: float
    peak_memory_mib: float | None = None  # None = not measured
    parts_ms: dict[str, float] = field(default_factory=dict)  # parts of a step in the order they run


@dataclass(frozen=True)
class Arm:
    """One way to train the ranker."""

    name: str  # ID_ONLY, TWO_STAGE, EM3, PERFECT or the name of an ablation
    metrics: list[dict[str, float | None]]  # test metrics as em3.train.metrics.evaluate gives them, one entry a seed
    curves: list[Curve] = field(default_factory=list)  # one a seed
    cost: Cost | None = None


@dataclass(frozen=True)
class Alignment:
    """Content and ID embeddings of the same ``m`` items in the plane, before and after training.

    The four lists are ``[m, 2]`` coordinates with axes in common. ``from_embeddings`` makes them.
    """

    content_before: list[list[float]]
    ids_before: list[list[float]]
    content_after: list[list[float]]
    ids_after: list[list[float]]
    groups: list[str]  # [m], what the points are coloured by
    numbers: dict[str, list[float]] = field(default_factory=dict)  # name: [before, after]

    @classmethod
    def from_embeddings(
        cls,
        before: tuple[np.ndarray, np.ndarray],
        after: tuple[np.ndarray, np.ndarray],
        texts: Sequence[str],
        groups: Sequence[str] | None = None,
        numbers: dict[str, list[float]] | None = None,
    ) -> Alignment:
        """Principal components of all four sets together, rows at unit length (the contrast compares cosines).

        Args:
            before, after: content and ID embeddings, ``[n, V]`` each, of the same items in the same order.
            texts: the items' words, ``[n]``.
            groups: ``[n]`` or None: a name for the colour of each item; by default the first word of its text.
            numbers: what is known about the alignment, each as ``[before, after]``.

        Of more than ``DRAWN_ITEMS`` items an evenly spaced part is kept.

        Raises:
            ValueError: arrays of different shapes, or texts or groups of another length.
        """
        sets = [np.asarray(rows, np.float64) for rows in (*before, *after)]
        names = list(groups) if groups is not None else [(text.split() or [""])[0] for text in texts]
        n = len(sets[0])
        if any(rows.ndim != 2 or rows.shape != sets[0].shape for rows in sets):
            raise ValueError(f"before, after: were {[list(rows.shape) for rows in sets]}, must be four times [n, V]")
        if len(texts) != n or len(names) != n:
            raise ValueError(f"texts, groups: were [{len(texts)}] and [{len(names)}], must be [{n}] as the embeddings")
        kept = np.unique(np.linspace(0, n - 1, min(n, DRAWN_ITEMS)).astype(np.int64))
        rows = np.concatenate([unit[kept] / np.maximum(np.linalg.norm(unit[kept], axis=1, keepdims=True), 1e-12)
                               for unit in sets])  # fmt: skip
        rows = rows - rows.mean(0)
        _, _, axes = np.linalg.svd(rows, full_matrices=False)
        a, b, c, d = (part.tolist() for part in np.split(np.round(rows @ axes[:2].T, 4), 4))
        return cls(a, b, c, d, [names[i] for i in kept], numbers or {})


@dataclass(frozen=True)
class Card:
    """An item as the report shows it."""

    title: str
    picture: str | None  # a path, absolute or relative to the run folder; None = the item has no picture
    similarity: float | None = None  # to the query, cosine


@dataclass(frozen=True)
class Neighbours:
    """An item and those whose content is nearest to it, nearest first."""

    query: Card
    nearest: list[Card]


@dataclass(frozen=True)
class RunSummary:
    """A whole run. ``to_dict`` gives what ``json.dump`` takes; ``from_dict`` reads it back and checks every type.

    Raises:
        ValueError: no seeds or arms, two arms of one name, or an arm whose metrics or curves are not one a seed
            (the perfect ranker, which nothing trains, may have a single entry of metrics).
    """

    data: str
    ranker: str
    date: str
    version: str  # of em3
    machine: str
    seeds: list[int]
    arms: list[Arm]
    facts: dict[str, str] = field(default_factory=dict)  # more lines for the head: sizes of the data and the like
    alignment: Alignment | None = None
    neighbours: list[Neighbours] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # what JSON can hold, nested as it likes
    environment: str = ""  # the text of `em3 env`
    command: str = ""  # the command line that repeats the run
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not self.seeds or not names or len(set(names)) < len(names):
            raise ValueError(f"seeds, arms: were {self.seeds}, {names}, must be one seed or more and different arms")
        for arm in self.arms:
            expected = {len(self.seeds)} | ({1} if arm.name == PERFECT else set())
            if len(arm.metrics) not in expected:
                raise ValueError(f"arms: {arm.name} had metrics of {len(arm.metrics)} seeds, must be {len(self.seeds)}")
            if arm.curves and len(arm.curves) != len(self.seeds):
                raise ValueError(f"arms: {arm.name} had curves of {len(arm.curves)} seeds, must be {len(self.seeds)}")

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunSummary:
        """The opposite of ``to_dict``.

        Raises:
            ValueError: a key that is missing or unknown, or a value of another type; the message says where.
        """
        summary: RunSummary = _read(cls, values, "run")
        return summary


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``, one of the few kinds of annotation used above."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:  # X | None
        return None if value is None else _read(inner[0], value, where)
    wanted: Any = dict if dataclasses.is_dataclass(kind) else (int, float) if kind is float else origin or kind
    if not isinstance(value, wanted) or isinstance(value, bool):
        names = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ValueError(f"{where}: was {type(value).__name__}, must be {names}")
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    if origin is list:
        return [_read(inner[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if origin is dict:
        return {key: _read(inner[1], entry, f"{where}.{key}") for key, entry in value.items()}
    return value


def _read_fields(kind: Any, values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )  # fmt: skip
    if unknown or missing:
        raise ValueError(f"{where}: unknown keys {unknown}, missing keys {missing}; the keys are {sorted(fields)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in values.items()})
