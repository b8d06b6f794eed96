"""The report of a run: what was trained, what came out and what it cost, as one HTML file that needs nothing else."""

from .html import write_report
from .summary import EM3, ID_ONLY, PERFECT, TWO_STAGE, Alignment, Arm, Card, Cost, Curve, Neighbours, RunSummary

__all__ = [
    "EM3",
    "ID_ONLY",
    "PERFECT",
    "TWO_STAGE",
    "Alignment",
    "Arm",
    "Card",
    "Cost",
    "Curve",
    "Neighbours",
    "RunSummary",
    "write_report",
]
