"""What a ranker is judged by: AUC, AUC within groups, log loss; each of all rows and of parts of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("auc", "gauc", "log_loss")


def auc(label: Any, score: Any) -> float | None:
    """Probability that a row of label 1 scores above a row of label 0, ties counting half. None with one class only.

    Args:
        label: ``[r]``, 0 or 1.
        score: ``[r]``, finite.

    Raises:
        ValueError: another label, a score that is not finite, or arrays of different lengths.
    """
    from sklearn.metrics import roc_auc_score

    label, score = _checked(label, score, "score")
    return float(roc_auc_score(label, score)) if _both_classes(label) else None


def gauc(label: Any, score: Any, group: Any) -> float | None:
    """AUC within groups: the mean of the groups' AUC, weighted by their rows (impressions).

    A group with one class only has no AUC and takes no part, neither in the mean nor in the weights; None where no
    group has both. Ties count half. With a request as the group this says how well the candidates of one request are
    ordered, which a ranker that only tells eager users from others does not improve.

    Args:
        label: ``[r]``, 0 or 1.
        score: ``[r]``, finite.
        group: ``[r]``, integers in any order.

    Raises:
        ValueError: another label, a score that is not finite, or arrays of different lengths.
    """
    label, score = _checked(label, score, "score")
    group = _of_length(group, len(label), "group")
    if not len(label):
        return None
    order = np.lexsort((score, group))
    label, score, group = label[order].astype(np.float64), score[order], group[order]
    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    new_value = new_group | np.concatenate([[True], score[1:] != score[:-1]])

    start, tie = np.flatnonzero(new_group), np.flatnonzero(new_value)  # first row of each group, of each run of ties
    rows, ties = np.diff(start, append=len(label)), np.diff(tie, append=len(label))
    rank = np.repeat(tie + (ties + 1) / 2, ties) - np.repeat(start, rows)  # from 1 within the group, ties share the mean
    positives = np.add.reduceat(label, start)
    pairs = positives * (rows - positives)
    wins = np.add.reduceat(label * rank, start) - positives * (positives + 1) / 2  # Mann and Whitney's U
    both = pairs > 0
    return float(np.average(wins[both] / pairs[both], weights=rows[both])) if both.any() else None


def log_loss(label: Any, probability: Any) -> float:
    """Mean negative log likelihood in nats; probabilities are clipped to ``[eps, 1 - eps]`` of their dtype.

    Args:
        label: ``[r]``, 0 or 1, at least one row.
        probability: ``[r]``, within 0..1.

    Raises:
        ValueError: no rows, another label, a probability outside 0..1, or arrays of different lengths.
    """
    from sklearn.metrics import log_loss as mean_loss

    label, probability = _checked(label, probability, "probability")
    if not len(label):
        raise ValueError("label: was empty, must hold at least one row")
    if probability.min() < 0 or probability.max() > 1:
        raise ValueError(f"probability: was {probability.min()} to {probability.max()}, must lie within 0..1")
    return float(mean_loss(label, probability, labels=[0, 1]))


def evaluate(label: Any, probability: Any, group: Any, cold: Any, new_user: Any = None) -> dict[str, float | None]:
    """The three metrics of all rows and of parts of them, None where a part has one class only.

    Args:
        label: ``[r]``, 0 or 1.
        probability: ``[r]``, the ranker's click probabilities.
        group: ``[r]``, integers; ``gauc`` is taken within equal ones.
        cold: ``[r]`` bool, nobody chose the row's item in the training period.
        new_user: ``[r]`` bool or None: the row's user was not.

    Returns:
        ``auc``, ``gauc``, ``log_loss`` of all rows; each with ``_warm`` and ``_cold`` of the rows whose item is; with
        ``new_user`` also with ``_new_user`` of those users' rows.

    Raises:
        ValueError: as the single metrics do.
    """
    label, probability = _checked(label, probability, "probability")
    group, cold = _of_length(group, len(label), "group"), _mask(cold, len(label), "cold")
    parts = {"": np.ones(len(label), bool), "_warm": ~cold, "_cold": cold}
    if new_user is not None:
        parts["_new_user"] = _mask(new_user, len(label), "new_user")
    found: dict[str, float | None] = {}
    for part, rows in parts.items():
        values: tuple[float | None, ...] = (None, None, None)
        if _both_classes(label[rows]):
            of_part = label[rows], probability[rows]
            values = auc(*of_part), gauc(*of_part, group[rows]), log_loss(*of_part)
        found |= {metric + part: value for metric, value in zip(METRICS, values, strict=True)}
    return found


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the values (one a seed, say) and its standard error; of a single value the error is unknown: None.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("values: was empty, must hold at least one number")
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _both_classes(label: np.ndarray) -> bool:
    return bool(len(label) and label.min() != label.max())


def _checked(label: Any, score: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    label, score = np.asarray(label), np.asarray(score)
    if label.ndim != 1:
        raise ValueError(f"label: was {list(label.shape)}, must be [r]")
    score = _of_length(score, len(label), name)
    wrong = label[(label != 0) & (label != 1)]
    if len(wrong):
        raise ValueError(f"label: was {wrong[0]} in one of {len(wrong)} rows, must be 0 or 1")
    if not np.isfinite(score).all():
        raise ValueError(f"{name}: was not finite in {int((~np.isfinite(score)).sum())} of {len(score)} rows, must be finite")
    return label, score


def _of_length(values: Any, r: int, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (r,):
        raise ValueError(f"{name}: was {list(values.shape)}, must be [{r}] as label is")
    return values


def _mask(values: Any, r: int, name: str) -> np.ndarray:
    values = _of_length(values, r, name)
    if values.dtype != bool:
        raise ValueError(f"{name}: was {values.dtype}, must be bool")
    return values
