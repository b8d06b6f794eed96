"""Titles in words: synonyms, filler, attributes left out and sometimes wrong."""

from __future__ import annotations

import re

import numpy as np

from .attributes import ATTRIBUTES, NAMES, STYLES, Content

_MAKERS = (
    *("Alder", "Brix", "Corvo", "Delmar", "Eskil", "Fenn", "Galo", "Hobbs"),
    *("Ilex", "Juno", "Kestrel", "Lumo", "Marlow", "Nimbus", "Orla", "Pavo"),
)
_PRAISE = ("new", "lovely", "great gift", "bestseller", "top quality", "our favourite", "sale", "limited edition")
_COUNTS = (("single {kind}", "{kind}"), ("pair of {kind}s", "two {kind}s"), ("set of three {kind}s", "{kind}s, 3 pack"))
_OCCASIONS = ("for {}", "perfect for {}", "made for {}")
_TEMPLATES = (
    "{maker} {size} {colour} {origin} {make} {kind} {occasion} {year} {praise}",
    "{origin} {kind} in {colour}, {size}, {make} {occasion} by {maker} {year}",
    "{praise} {make} {kind} {occasion}, {colour} {size} {origin} style {year}",
    "{size} {kind} {colour} {occasion} {make}, {origin} design {year} {maker}",
)
_FIRST_YEAR, _YEARS, _YEAR_NOISE = 1950, 70, 3


def write_titles(rng: np.random.Generator, content: Content) -> list[str]:
    """One title an item, ``""`` where it has none; every item takes the same draws whether it has one or not."""
    titles = [_title(rng, values, styles) for values, styles in zip(content.values, content.styles, strict=True)]
    return [title if kept else "" for title, kept in zip(titles, content.has_title, strict=True)]


def _title(rng: np.random.Generator, values: np.ndarray, styles: np.ndarray) -> str:
    words = {}
    for attribute, value in zip(ATTRIBUTES, values, strict=True):
        said, wrong = rng.random(2)
        if wrong < attribute.wrong:
            value = (value + rng.integers(1, len(attribute.values))) % len(attribute.values)
        synonyms = attribute.values[value]
        word = synonyms[rng.integers(len(synonyms))]
        words[attribute.name] = word if said < attribute.mentioned else ""
    kind = words["kind"] or "piece"
    count = int(values[NAMES.index("count")]) if words["count"] else 0
    words["kind"] = _pick(rng, _COUNTS[count]).format(kind=kind)
    if words["occasion"]:
        words["occasion"] = _pick(rng, _OCCASIONS).format(words["occasion"])
    year = _FIRST_YEAR + round(_YEARS * styles[STYLES.index("year")]) + int(rng.integers(-_YEAR_NOISE, _YEAR_NOISE + 1))
    words["year"] = str(year) if rng.random() < 0.75 else ""
    words["maker"] = _pick(rng, _MAKERS)
    words["praise"] = _pick(rng, _PRAISE) if rng.random() < 0.4 else ""
    title = " ".join(_pick(rng, _TEMPLATES).format(**words).split())
    title = re.sub(r"( in)?( ?,)+", ",", title).strip(" ,")  # what left-out words leave behind: "in ,", ", ,"
    return title[0].upper() + title[1:]


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]
