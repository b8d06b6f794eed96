"""What the made-up items are: discrete attributes and two continuous styles, and where each of them can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Attribute:
    """One discrete property of every item."""

    name: str
    values: tuple[tuple[str, ...], ...]  # words for each value, the first one is the value's name
    taste: float  # standard deviation of the users' tastes over its values, in logits
    mentioned: float  # probability that a title mentions it; 0 = it shows in the picture only
    wrong: float = 0.0  # probability that a mention names another value


ATTRIBUTES = (
    Attribute(
        "kind",
        (
            ("mug", "cup"),
            ("bottle", "flask"),
            ("vase", "urn"),
            ("lamp", "light"),
            ("chair", "seat"),
            ("bag", "tote"),
            ("shirt", "tee"),
            ("clock", "timepiece"),
        ),
        taste=0.72,
        mentioned=0.92,
        wrong=0.02,
    ),
    Attribute(
        "colour",
        (
            ("red", "crimson", "scarlet"),
            ("orange", "tangerine"),
            ("yellow", "lemon"),
            ("green", "emerald"),
            ("blue", "navy", "azure"),
            ("purple", "violet"),
            ("brown", "chestnut"),
            ("black", "ebony"),
        ),
        taste=0.72,
        mentioned=0.5,
        wrong=0.06,
    ),
    Attribute("pattern", (("plain",), ("striped",), ("dotted",), ("checked",)), taste=0.4, mentioned=0.0),
    Attribute("background", (("white",), ("sand",), ("sky",), ("rose",), ("slate",)), taste=0.55, mentioned=0.0),
    Attribute(
        "size",
        (("small", "compact", "mini"), ("medium", "regular"), ("large", "big", "oversized")),
        taste=0.3,
        mentioned=0.4,
        wrong=0.03,
    ),
    Attribute("count", (("one",), ("two",), ("three",)), taste=0.3, mentioned=0.7),
    Attribute(
        "origin",
        (("nordic", "scandinavian"), ("japanese", "kyoto"), ("italian", "milano"), ("mexican",), ("moroccan",)),
        taste=0.63,
        mentioned=0.92,
        wrong=0.02,
    ),
    Attribute(
        "make",
        (("handmade", "artisan"), ("recycled", "upcycled"), ("designer", "luxury"), ("budget", "value")),
        taste=0.55,
        mentioned=0.92,
        wrong=0.02,
    ),
    Attribute(
        "occasion",
        (("travel", "trips"), ("office", "desk"), ("garden", "terrace"), ("parties", "celebrations"), ("kids", "children")),
        taste=0.55,
        mentioned=0.92,
        wrong=0.02,
    ),
)
NAMES = tuple(attribute.name for attribute in ATTRIBUTES)

# The continuous styles, 0 to 1: the light of the picture (picture only), the year of the design (title only).
STYLES = ("light", "year")
STYLE_TASTE = 0.35  # standard deviation of the users' tastes for a style scaled to unit variance, in logits

WITHOUT_PICTURE = 0.04
WITHOUT_TITLE = 0.025


@dataclass(frozen=True)
class Content:
    """What the ``n`` items are."""

    values: np.ndarray  # [n, len(ATTRIBUTES)] int64, index into Attribute.values
    styles: np.ndarray  # [n, len(STYLES)] float64 in [0, 1], multiples of 1e-6
    has_picture: np.ndarray  # [n] bool
    has_title: np.ndarray  # [n] bool; an item has at least one of the two

    def names(self, attribute: str) -> list[str]:
        """The name of each item's value."""
        column = NAMES.index(attribute)
        return [ATTRIBUTES[column].values[value][0] for value in self.values[:, column]]


def draw_content(rng: np.random.Generator, num_items: int) -> Content:
    values = np.stack([rng.integers(len(a.values), size=num_items) for a in ATTRIBUTES], axis=1)  # [n, attributes]
    styles = rng.integers(1_000_001, size=(num_items, len(STYLES))) / 1e6
    missing = rng.random(num_items)
    has_picture = missing >= WITHOUT_PICTURE
    has_title = ~((missing >= WITHOUT_PICTURE) & (missing < WITHOUT_PICTURE + WITHOUT_TITLE))
    return Content(values, styles, has_picture, has_title)
