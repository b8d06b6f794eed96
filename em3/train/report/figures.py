"""Drawings as SVG to stand inside the page. Their colours are the page's CSS variables, so dark and light both fit."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .summary import EM3, ID_ONLY, TWO_STAGE, Alignment, Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8  # colours --s0 .. --s7 of the style sheet
POINTS = 150  # of a curve, neighbours are averaged
SIZE = (4.2, 2.7)  # inches of 100 pixels: legible when a phone shows it 350 pixels wide

# matplotlib writes colours as numbers; these stand for CSS variables and are replaced at the end.
INK, LINE, _OTHER = "#000001", "#000002", "#000003"
COLOURS = [f"#0001{i:02x}" for i in range(SERIES)]
_VARIABLES = {INK: "--muted", LINE: "--line", _OTHER: "--other"} | {c: f"--s{i}" for i, c in enumerate(COLOURS)}


def arm_colours(arms: Sequence[Arm]) -> dict[str, int]:
    """The number of each arm's colour: fixed for the three usual ones, then in turn."""
    usual = [ID_ONLY, TWO_STAGE, EM3]
    others = [arm.name for arm in arms if arm.name not in usual]
    return {name: i % SERIES for i, name in enumerate(usual + others)}


def curves(arms: Sequence[Arm], what: str) -> str | None:
    """``what`` ("loss" or "valid_auc") of the arms against the step, or None where no arm has it.

    A line is the mean over the seeds at the steps that all of them reached; its band goes from the lowest seed to the
    highest.
    """
    colours = arm_colours(arms)
    figure, axes = blank(SIZE)
    for arm in arms:
        steps, values = _common([(c.steps, c.loss) if what == "loss" else (c.valid_steps, c.valid_auc)
                                 for c in arm.curves])  # fmt: skip
        if not len(steps):
            continue
        colour = COLOURS[colours[arm.name]]
        mean = values.mean(0)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=1.8, marker="o" if len(steps) < 3 else None, markersize=3)
    if not axes.lines:
        return None
    axes.grid(True, color=LINE, linewidth=0.8)
    axes.set_xlabel("step", color=INK, fontsize=9)
    return svg(figure, what)


def _common(series: list[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all seeds have, and the values there ``[seeds, steps]``, thinned to at most ``POINTS``."""
    if not series:
        return np.empty(0), np.empty((0, 0))
    steps = np.array(sorted(set.intersection(*(set(steps) for steps, _ in series))), dtype=np.float64)
    at = [dict(zip(steps_of_seed, values, strict=True)) for steps_of_seed, values in series]
    values = np.array([[of_seed[step] for step in steps] for of_seed in at])
    if len(steps) <= POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), POINTS)
    return np.array([steps[p].mean() for p in parts]), np.stack([values[:, p].mean(1) for p in parts], axis=1)


def largest_groups(groups: Sequence[str]) -> list[str]:
    """The groups that get a colour of their own, largest first; the others share one."""
    return [name for name, _ in Counter(groups).most_common(SERIES)]


def embeddings(alignment: Alignment) -> tuple[str, str]:
    """Content (dots) and ID (rings) embeddings before and after training; a thin line joins the two of an item."""
    every = np.array([*alignment.content_before, *alignment.ids_before, *alignment.content_after, *alignment.ids_after])
    middle = (every.max(0) + every.min(0)) / 2
    half = 0.53 * float((every.max(0) - every.min(0)).max()) or 1.0  # of a square with both drawings' points
    named = largest_groups(alignment.groups)
    colours = [COLOURS[named.index(group)] if group in named else _OTHER for group in alignment.groups]

    def draw(content: list[list[float]], ids: list[list[float]], name: str) -> str:
        from matplotlib.collections import LineCollection

        figure, axes = blank((4.2, 4.2))
        dots, rings = np.array(content), np.array(ids)
        axes.add_collection(LineCollection(list(np.stack([dots, rings], 1)), colors=colours, linewidths=0.5, alpha=0.22,
                                           clip_on=False))  # fmt: skip
        axes.scatter(rings[:, 0], rings[:, 1], s=13, facecolors="none", edgecolors=colours, linewidths=0.9, clip_on=False)
        axes.scatter(dots[:, 0], dots[:, 1], s=11, c=colours, linewidths=0, clip_on=False)
        axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        axes.set(xticks=[], yticks=[], aspect="equal")
        return svg(figure, name)

    before = draw(alignment.content_before, alignment.ids_before, "before")
    return before, draw(alignment.content_after, alignment.ids_after, "after")


def blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Empty axes in the colours of the page."""
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=100, layout="constrained")
    axes = figure.subplots()
    for side in axes.spines.values():
        side.set_color(LINE)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    return figure, axes


def svg(figure: Figure, name: str) -> str:
    """The figure to stand inside a page, whose CSS variables its colours become; ``name`` is read out instead of it."""
    import matplotlib

    content = io.StringIO()
    # The salt makes the ids of clip paths and markers differ between the drawings of one page, and repeatable.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to them, and drawings share them
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 {names} role="img" aria-label="{name}">', text, count=1)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # a hundredth of a pixel is enough, and half the bytes
    return re.sub("|".join(_VARIABLES), lambda colour: f"var({_VARIABLES[colour[0]]})", text)
