"""EM3 against the other arms, seed by seed, and the words for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..metrics import spread
from .summary import EM3, ID_ONLY, TWO_STAGE, RunSummary

SIGNIFICANT = 0.05  # two-sided


@dataclass(frozen=True)
class Difference:
    """EM3 minus another arm in one metric, paired over the seeds."""

    mean: float
    error: float | None  # standard error; None with one seed
    seeds: int

    @property
    def standard_errors(self) -> float | None:
        """How many standard errors the mean lies from 0."""
        if self.error is None:
            return None
        if self.error == 0:
            return math.copysign(math.inf, self.mean) if self.mean else 0.0
        return self.mean / self.error

    @property
    def p(self) -> float | None:
        """Two-sided p-value of Student's t: with three seeds, two standard errors are still chance (p = 0.18)."""
        from scipy.special import stdtr  # scipy comes with scikit-learn

        distance = self.standard_errors
        return None if distance is None else float(2 * stdtr(self.seeds - 1, -abs(distance)))

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANT


def difference(run: RunSummary, other: str, metric: str) -> Difference | None:
    """EM3 minus ``other``, or None where an arm or the metric of a seed is missing."""
    ours, theirs = run.arm(EM3), run.arm(other)
    if ours is None or theirs is None:
        return None
    pairs = [(a.get(metric), b.get(metric)) for a, b in zip(ours.metrics, theirs.metrics, strict=True)]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    return Difference(*spread(values), len(values)) if len(values) == len(pairs) else None


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    """Fixed digits, a true minus, and no sign before a zero."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def error_text(error: float | None) -> str:
    return "" if error is None else f"± {error:.4f}"


def distance_text(found: Difference) -> str:
    """The distance from zero in standard errors, "" with one seed."""
    distance = found.standard_errors
    if distance is None:
        return ""
    return "no spread" if math.isinf(distance) else f"{number(abs(distance), 1)} s.e."


def headline(run: RunSummary) -> list[str]:
    """The result in words: first the sentence about EM3 against ID-only, then cold items and the two-stage arm."""
    first = difference(run, ID_ONLY, "auc")
    if first is None:
        missing = [name for name in (EM3, ID_ONLY) if run.arm(name) is None]
        why = f"{' and '.join(missing)} did not take part" if missing else "the test rows are of one class only"
        return [f"EM3 was not compared with ID-only: {why}."]
    sentences = [_sentence("EM3", "ID-only", "", first)]
    for other, metric, place in ((ID_ONLY, "auc_cold", " on cold items"), (TWO_STAGE, "auc", "")):
        found = difference(run, other, metric)
        if found is not None:
            sentences.append(_sentence("EM3", other, place, found))
    return sentences


def _sentence(ours: str, theirs: str, place: str, found: Difference) -> str:
    change = f"{number(found.mean, sign=True)} {error_text(found.error)}".strip()
    if found.p is None:
        return (
            f"{ours} minus {theirs}{place}: {change} in test AUC with one seed. One seed has no standard error, so"
            " this may be chance; run several seeds."
        )
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    evidence = f"{change} in test AUC, {distance_text(found)} over {found.seeds} paired seeds ({p})"
    if not found.significant:
        return f"No difference shown between {ours} and {theirs}{place}: {evidence}."
    return f"{ours} ranks {'better' if found.mean > 0 else 'worse'} than {theirs}{place}: {evidence}."
