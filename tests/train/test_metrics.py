"""Metrics against scikit-learn, group by group."""

from __future__ import annotations

import math

import numpy as np
import pytest

from em3.train.metrics import auc, evaluate, gauc, log_loss, spread

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


def rows(seed, r=400, groups=60, ties=True):
    """Scores with ties, groups of 1 to about 20 rows in no order, some of one class only."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, r) * 7 - 50
    score = rng.random(r).astype(np.float32)
    if ties:
        score = np.round(score, 1)
    label = (rng.random(r) < 0.2 + 0.5 * score).astype(np.float32)
    return label, score, group


def gauc_by_loop(label, score, group):
    total = weight = 0.0
    for name in np.unique(group):
        of_group = group == name
        if 0 < label[of_group].sum() < of_group.sum():
            total += of_group.sum() * sklearn_metrics.roc_auc_score(label[of_group], score[of_group])
            weight += of_group.sum()
    return total / weight


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("groups", [1, 5, 60, 300])
def test_gauc_is_the_weighted_mean_over_groups(groups, ties, seed):
    label, score, group = rows(seed, groups=groups, ties=ties)
    assert gauc(label, score, group) == pytest.approx(gauc_by_loop(label, score, group), abs=1e-12)


def test_gauc_by_hand():
    label = [1, 0, 0, 1, 1, 1, 0]
    score = [3, 1, 2, 0, 5, 5, 5]
    group = [4, 4, 4, 9, 2, 2, 2]  # 1 with 3 rows; one class only; all tied: 0.5 with 3 rows
    assert gauc(label, score, group) == 0.75
    assert gauc(label, np.negative(score), group) == 0.25


def test_gauc_sees_no_differences_between_groups(seed):
    label, score, group = rows(seed, ties=False)
    shifted = score.astype(np.float64) + 100 * (group % 5)
    assert gauc(label, shifted, group) == pytest.approx(gauc(label, score, group), abs=1e-12)
    assert auc(label, shifted) != pytest.approx(auc(label, score), abs=1e-6)


def test_auc_and_log_loss(seed):
    label, score, _ = rows(seed)
    assert auc(label, score) == pytest.approx(sklearn_metrics.roc_auc_score(label, score))
    p = np.clip(score.astype(np.float64), 0.01, 0.99)
    assert log_loss(label, p) == pytest.approx(-np.mean(np.where(label == 1, np.log(p), np.log(1 - p))))
    assert math.isfinite(log_loss([1, 0], np.array([0.0, 1.0], np.float32)))
    assert log_loss([1, 1], [0.5, 0.25]) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_one_class_has_no_auc():
    assert auc([1, 1], [0.2, 0.3]) is None
    assert auc([], []) is None
    assert gauc([1, 0, 1], [0.1, 0.2, 0.3], [1, 2, 3]) is None
    assert gauc([], [], []) is None


def test_evaluate_takes_the_parts_apart(seed):
    label, score, group = rows(seed)
    rng = np.random.default_rng(seed + 1)
    cold, new = rng.random(len(label)) < 0.3, rng.random(len(label)) < 0.4
    found = evaluate(label, score, group, cold, new)
    assert list(found) == [m + p for p in ("", "_warm", "_cold", "_new_user") for m in ("auc", "gauc", "log_loss")]
    for part, of_part in (("", cold | ~cold), ("_warm", ~cold), ("_cold", cold), ("_new_user", new)):
        assert found["auc" + part] == auc(label[of_part], score[of_part])
        assert found["gauc" + part] == gauc(label[of_part], score[of_part], group[of_part])
        assert found["log_loss" + part] == log_loss(label[of_part], score[of_part])
    assert "auc_new_user" not in evaluate(label, score, group, cold)


def test_evaluate_without_cold_rows(seed):
    label, score, group = rows(seed)
    found = evaluate(label, score, group, np.zeros(len(label), bool))
    assert found["auc_cold"] is found["gauc_cold"] is found["log_loss_cold"] is None
    assert found["auc_warm"] == found["auc"] is not None


def test_spread():
    mean, error = spread([0.70, 0.72, 0.77])
    assert mean == pytest.approx(0.73)
    assert error == pytest.approx(np.std([0.70, 0.72, 0.77], ddof=1) / math.sqrt(3))
    assert spread([0.7]) == (0.7, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0, 2], [0.1, 0.2]), "label: was 2 in one of 1 rows, must be 0 or 1"),
        (lambda: auc([0, 1], [0.1, math.nan]), "score: was not finite in 1 of 2 rows"),
        (lambda: auc([0, 1], [0.1]), r"score: was \[1\], must be \[2\]"),
        (lambda: auc([[0, 1]], [[0.1, 0.2]]), r"label: was \[1, 2\], must be \[r\]"),
        (lambda: gauc([0, 1], [0.1, 0.2], [1]), r"group: was \[1\]"),
        (lambda: log_loss([0, 1], [0.1, 1.2]), "probability: was 0.1 to 1.2, must lie within 0..1"),
        (lambda: log_loss([], []), "label: was empty"),
        (lambda: evaluate([0, 1], [0.1, 0.2], [1, 1], [0, 1]), "cold: was int64, must be bool"),
        (lambda: spread([]), "values: was empty"),
    ],
)
def test_what_cannot_be_measured_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()
