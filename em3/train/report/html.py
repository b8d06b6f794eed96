"""The page itself. Every word that came from data passes through ``html.escape``; the page runs no script at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...files import atomic
from ..metrics import METRICS, spread
from . import figures, frame
from .comparison import Difference, difference, distance_text, error_text, headline, number
from .pictures import PictureError, thumbnail
from .summary import EM3, ID_ONLY, PERFECT, TWO_STAGE, Alignment, Arm, Card, Cost, Neighbours, RunSummary

_NAMES = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss"}
_PARTS = {"": "All items", "_warm": "Warm items", "_cold": "Cold items", "_new_user": "New users"}


def write_report(folder: Path, run: RunSummary) -> Path:
    """Writes ``report.html`` into the run folder, complete or not at all, and returns its path.

    The file holds everything it shows: it opens without a network and may be mailed or moved. Pictures of the
    neighbours that cannot be read are drawn as placeholders and named among the page's warnings.

    Args:
        folder: the run folder; relative paths of pictures start there.
        run: what to show. Parts that are empty (no curves, no alignment, no neighbours) are left out.
    """
    warnings = list(run.warnings)
    neighbours = _neighbours(folder, run.neighbours, warnings)  # finds unreadable pictures: before the warnings
    body = "\n".join([
        _head(run), _warnings(warnings), _results(run), _curves(run.arms), _cost(run.arms), _alignment(run.alignment),
        neighbours, _setup(run),
    ])  # fmt: skip
    page = frame.whole(f"{run.data}: EM3 with {run.ranker}", body, run.version)
    path = Path(folder) / "report.html"
    with atomic(path) as file:
        file.write(page.encode("utf-8", "replace"))  # a title may hold half of a surrogate pair
    return path


def _head(run: RunSummary) -> str:
    seeds = ", ".join(map(str, run.seeds))
    facts = {"Data": run.data, "Ranker": run.ranker, "Seeds": seeds, **run.facts, "Machine": run.machine,
             "em3": run.version}  # fmt: skip
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in headline(run))
    return f"""<header>
<p class="over">{escape(run.date)}</p>
<h1>{escape(run.data)}: EM3 with {escape(run.ranker)}</h1>
<div class="result">{sentences}</div>
<dl>{terms}</dl>
</header>"""


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    lines = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'{frame.title("Warnings")}<ul class="warnings">{lines}</ul>'


def _results(run: RunSummary) -> str:
    parts = [part for part in _PARTS if any("auc" + part in of_seed for arm in run.arms for of_seed in arm.metrics)]
    keys = [metric + part for part in parts for metric in METRICS]
    top = "".join(f'<th class="first" colspan="{len(METRICS)}">{_PARTS[part]}</th>' for part in parts)
    below = "".join(f"<th{_first(metric)}>{_NAMES[metric]}</th>" for _ in parts for metric in METRICS)
    head = f"<thead><tr><th></th>{top}</tr><tr><th></th>{below}</tr></thead>"
    rows = "".join(frame.row(arm.name, [_mean(arm, key) for key in keys], _kind(arm.name)) for arm in run.arms)
    several = len(run.seeds) > 1
    over = f"mean ± standard error over {len(run.seeds)} seeds" if several else "one seed, so no standard error"
    page = (
        frame.title("Results on the test rows")
        + f'<p class="note">{over[0].upper()}{over[1:]}. Higher AUC and GAUC are better, lower log loss is better. '
        "GAUC is the AUC within groups of rows ranked together, weighted by their rows. Cold items have no event in "
        "the training period.</p>" + frame.table(f"{head}<tbody>{rows}</tbody>", "results of each arm")
    )
    found = [(other, [difference(run, other, key) for key in keys]) for other in (ID_ONLY, TWO_STAGE)]
    rows = "".join(
        frame.row(f"EM3 \N{MINUS SIGN} {other}", [_delta(d, key) for d, key in zip(differences, keys, strict=True)])
        for other, differences in found if any(d is not None for d in differences)
    )  # fmt: skip
    if rows:
        page += frame.table(f"{head}<tbody>{rows}</tbody>", "paired differences") + (
            '<p class="note">Differences are paired seed by seed; s.e. = standard errors from zero. Coloured where '
            "Student's t gives p &lt; 0.05. Seeds show how far training varies; all share the same test rows.</p>"
        )
    return page


def _first(key: str) -> str:
    return ' class="first"' if key.startswith(METRICS[0]) else ""


def _kind(arm: str) -> str:
    return {EM3: "ours", PERFECT: "known"}.get(arm, "")


def _mean(arm: Arm, key: str) -> str:
    values = [value for of_seed in arm.metrics if (value := of_seed.get(key)) is not None]
    if len(values) < len(arm.metrics):
        return f"<td{_first(key)}>\N{EN DASH}</td>"
    mean, error = spread(values)
    return f"<td{_first(key)}>{number(mean)}<small>{error_text(error)}</small></td>"


def _delta(found: Difference | None, key: str) -> str:
    if found is None:
        return f"<td{_first(key)}>\N{EN DASH}</td>"
    better = (found.mean > 0) != key.startswith("log_loss")
    kind = ("good" if better else "bad") if found.significant else ""
    details = "<br>".join(filter(None, (error_text(found.error), distance_text(found))))
    value = number(found.mean, sign=True)
    return f'<td{_first(key)}><span class="{kind}">{value}</span><small>{details}</small></td>'


def _curves(arms: Sequence[Arm]) -> str:
    drawn = [("Ranking loss in training", figures.curves(arms, "loss")),
             ("AUC on the validation rows", figures.curves(arms, "valid_auc"))]  # fmt: skip
    shown = "".join(f"<figure><h3>{title}</h3>{svg}</figure>" for title, svg in drawn if svg)
    if not shown:
        return ""
    colours = figures.arm_colours(arms)
    legend = frame.legend((arm.name, f"--s{colours[arm.name]}") for arm in arms if arm.curves)
    return (
        frame.title("Training")
        + '<p class="note">Lines are means over the seeds at the steps all seeds reached; bands go from the lowest '
        f'seed to the highest.</p>{legend}<div class="figures">{shown}</div>'
    )


def _cost(arms: Sequence[Arm]) -> str:
    costs = {arm.name: arm.cost for arm in arms if arm.cost}
    if not costs:
        return ""
    base = costs.get(ID_ONLY)
    names = ["", "step, ms", "20 % to 80 %", "against ID-only", "samples/s", "peak memory, MiB", "against ID-only"]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(frame.row(name, _cost_cells(cost, base), _kind(name)) for name, cost in costs.items())
    return (
        frame.title("Cost of training")
        + '<p class="note">Step times are medians of wall time with their 20th and 80th percentiles; a refresh of the '
        "whole bank is spread over the steps between two.</p>"
        + frame.table(f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>", "cost of each arm")
        + "".join(_parts(name, cost) for name, cost in costs.items() if cost.parts_ms)
    )


def _cost_cells(cost: Cost, base: Cost | None) -> list[str]:
    memory, base_memory = cost.peak_memory_mib, base.peak_memory_mib if base else None
    return [f"<td>{text}</td>" for text in (
        f"{cost.step_ms:.1f}", f"{cost.step_ms_p20:.1f} to {cost.step_ms_p80:.1f}",
        _ratio(cost.step_ms, base.step_ms if base else None), f"{cost.samples_per_s:,.0f}",
        "not measured" if memory is None else f"{memory:,.0f}", _ratio(memory, base_memory),
    )]  # fmt: skip


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f} times" if value is not None and base else "\N{EN DASH}"


def _parts(name: str, cost: Cost) -> str:
    """The parts of a step as one bar, each with its milliseconds and share in the legend."""
    total = sum(cost.parts_ms.values())
    if not total > 0:
        return ""
    colour = {part: f"--s{i % figures.SERIES}" for i, part in enumerate(cost.parts_ms)}
    bar = "".join(f'<i style="width: {100 * ms / total:.2f}%; --swatch: var({colour[part]})"></i>'
                  for part, ms in cost.parts_ms.items())  # fmt: skip
    legend = frame.legend((f"{part}: {ms:.1f} ms, {ms / total:.0%}", colour[part]) for part, ms in cost.parts_ms.items())
    return (
        f'<figure style="margin-top: 14px"><h3>Where a step of {escape(name)} goes</h3>'
        f'<div class="bar">{bar}</div>{legend}</figure>'
    )


def _alignment(alignment: Alignment | None) -> str:
    if alignment is None:
        return ""
    before, after = figures.embeddings(alignment)
    named = figures.largest_groups(alignment.groups)
    entries = [(group or "(no words)", f"--s{i}") for i, group in enumerate(named)]
    if len(set(alignment.groups)) > len(named):
        entries.append(("others", "--other"))
    rows = "".join(
        frame.row(name, [f"<td>{number(value, 3)}</td>" for value in values]) for name, values in alignment.numbers.items()
    )
    numbers = frame.table(f"<thead><tr><th></th><th>before</th><th>after</th></tr></thead><tbody>{rows}</tbody>",
                     "alignment in numbers") if rows else ""  # fmt: skip
    return (
        frame.title("Content against ID embeddings")
        + f'<p class="note">{len(alignment.groups)} items, two points each, rows at unit length, on the first two '
        "principal components of all four sets; a thin line joins the two points of an item.</p>"
        + f'<div class="legend"><span class="dot">content</span><span class="ring">ID</span></div>{frame.legend(entries)}'
        + f'<div class="figures"><figure><h3>Before training</h3>{before}</figure>'
        + f"<figure><h3>After training</h3>{after}</figure></div>"
        + (f'<div style="margin-top: 14px">{numbers}</div>' if numbers else "")
    )


def _neighbours(folder: Path, rows: Sequence[Neighbours], warnings: list[str]) -> str:
    if not rows:
        return ""
    shown = "".join(
        f'<div class="cards">{_card(folder, row.query, warnings, "card query")}'
        f"{''.join(_card(folder, card, warnings, 'card') for card in row.nearest)}</div>"
        for row in rows
    )
    return frame.title("Nearest by content") + (
        '<p class="note">Left the item that was asked about, then the items whose content embeddings are nearest to '
        f"its own, with their cosine.</p>{shown}"
    )


def _card(folder: Path, card: Card, warnings: list[str], kind: str) -> str:
    title = escape(card.title) or "(no title)"
    picture = '<div class="none">no picture</div>'
    if card.picture is not None:
        try:
            picture = f'<img alt="" src="{thumbnail(Path(folder) / card.picture)}">'
        except PictureError as error:
            told = f"a picture of the neighbours cannot be read: {error}"
            if told not in warnings:  # an item may be near several
                warnings.append(told)
            picture = '<div class="none">picture cannot be read</div>'
    cosine = "" if card.similarity is None else f"<small>{number(card.similarity, 3)}</small>"
    return f'<div class="{kind}">{picture}<div class="title">{title}</div>{cosine}</div>'


def _setup(run: RunSummary) -> str:
    config = "".join(frame.row(key, [f"<td>{escape(value)}</td>"]) for key, value in _flat(run.config))
    parts = [frame.title("How to repeat it") + frame.pre(run.command, "command line")] if run.command else []
    if config:
        table = f'<div class="text">{frame.table(f"<tbody>{config}</tbody>", "configuration")}</div>'
        parts.append(f"<details><summary>Configuration</summary>{table}</details>")
    if run.environment:
        environment = frame.pre(run.environment, "environment")
        parts.append(f"<details><summary>Environment</summary>{environment}</details>")
    return "".join(parts)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested configuration as dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


