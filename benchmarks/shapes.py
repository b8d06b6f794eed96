"""The table of shapes: what is in ``shapes.yaml`` or in a user's file of the same form, checked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("shapes.yaml")
# What an operation's shape must hold, and what it may hold with the value that is meant when it is left out.
DIMENSIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "qformer_attention": (("B", "N", "C", "D", "H", "Q"), {"tokens": "frozen", "lengths": "full"}),
    "lora_linear": (("T", "C", "D", "R"), {"G": 0}),
    "lora_target_attention": (("B", "N", "C", "D", "H", "R"), {"Q": 1, "bank": 20_000, "lengths": "full"}),
    "contrastive_loss": (("B", "V"), {}),
}
WORDS = {"tokens": ("frozen", "trained"), "lengths": ("full", "skewed")}


class ShapeError(ValueError):
    """Something in a file of shapes that is not right; the message names the file, the shape and what must stand there."""


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    op: str
    name: str
    dims: dict[str, Any]
    source: str
    quick: bool = False
    sweep: dict[str, Any] = field(default_factory=dict)  # of a sweep's point: over, at, of

    @property
    def label(self) -> str:
        """``B=32 N=197+77 ... skewed``: the dimensions as results show them; what is left out when it is as usual."""
        usual = DIMENSIONS[self.op][1]
        shown = [(key, "+".join(map(str, v)) if isinstance(v, list) else v) for key, v in self.dims.items() if usual.get(key) != v]
        return " ".join(str(value) if key in WORDS else f"{key}={value}" for key, value in shown)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} was given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path = TABLE) -> list[Shape]:
    """The shapes of a file, then the points of its sweeps.

    Raises:
        ShapeError: unreadable YAML, an unknown or missing key, a value of the wrong kind, a name given twice.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or a date that there is not
        raise ShapeError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ShapeError(f"{path}: was {type(content).__name__}, must be operations, each with a list of shapes")
    shapes: list[Shape] = []
    for op, entries in content.items():
        _known(op, (*DIMENSIONS, "sweeps"), f"{path}: no operation")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ShapeError(f"{path}: {op}: must be a list of shapes, each of keys and values")
        if op != "sweeps":
            shapes += [_shape(op, entry, f"{path}: {op}", path.name) for entry in entries]
    for i, entry in enumerate(content.get("sweeps", [])):
        shapes += _points(entry, shapes, f"{path}: sweeps, entry {i + 1}")
    names = [(shape.op, shape.name) for shape in shapes]
    for op, name in names:
        if names.count((op, name)) > 1:
            raise ShapeError(f"{path}: {op}: the name {name!r} was given twice, must be given once")
    return shapes


def there_must_be(found: Sequence[Any], file: Path, ops: Sequence[str], quick: bool) -> None:
    """Raises ShapeError if nothing was found in a file for these operations or suites."""
    if not found:
        mark = " marked `quick: true`, as --quick asks for" if quick else ""
        raise ShapeError(f"{file}: must hold a shape of {' or '.join(ops)}{mark}; there is none")


def _known(word: Any, known: tuple[str, ...], complaint: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(str(word), known, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f" (there is {', '.join(known)})"
        raise ShapeError(f"{complaint} {word!r}{hint}")


def _shape(op: str, entry: dict[str, Any], where: str, file: str) -> Shape:
    needed, usual = DIMENSIONS[op]
    where = f"{where}: {entry.get('name', 'a shape without a name')}"
    for key in entry:
        _known(key, (*needed, *usual, "name", "from", "quick"), f"{where}: no key")
    missing = [key for key in ("name", *needed) if key not in entry]
    if missing:
        raise ShapeError(f"{where}: {missing[0]} was not given")
    if type(entry.get("quick", False)) is not bool:
        raise ShapeError(f"{where}: quick: was {entry['quick']!r}, must be true or false")
    for key in ("name", "from"):
        if not isinstance(entry.get(key, ""), (str, int, float)) or "\n" in str(entry.get(key)):
            raise ShapeError(f"{' '.join(where.split())}: {key}: was {entry[key]!r}, must be a line of text")
    dims = {key: entry.get(key, usual.get(key)) for key in (*needed, *usual)}
    _check(op, dims, where)
    return Shape(op, str(entry["name"]), dims, str(entry.get("from", file)), entry.get("quick", False))


def _check(op: str, dims: dict[str, Any], where: str) -> None:
    for key, value in dims.items():
        if key in WORDS:
            _known(value, WORDS[key], f"{where}: {key}: no value")
            continue
        listed = op == "qformer_attention" and key in ("N", "C")
        if listed and not (isinstance(value, list) and value):
            raise ShapeError(f"{where}: {key}: was {value!r}, must be a list with one number for each stream")
        for number in value if listed else [value]:
            if type(number) is not int or number < (key != "G"):  # G = 0: one adapter for all rows
                raise ShapeError(f"{where}: {key}: was {number!r}, must be a whole number of at least 1")
    if op == "qformer_attention" and len(dims["N"]) != len(dims["C"]):
        raise ShapeError(f"{where}: C: was {dims['C']}, must have one width for each of the {len(dims['N'])} streams of N")
    if "H" in dims and dims["D"] % dims["H"]:
        raise ShapeError(f"{where}: H: was {dims['H']}, must divide D = {dims['D']}")


def _points(entry: dict[str, Any], shapes: list[Shape], where: str) -> list[Shape]:
    keys = ("op", "of", "over", "values")
    for key in entry:
        _known(key, keys, f"{where}: no key")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ShapeError(f"{where}: {missing[0]} was not given")
    op, of, over, values = (entry[key] for key in keys)
    _known(op, tuple(DIMENSIONS), f"{where}: op: no operation")
    named = {shape.name: shape for shape in shapes if shape.op == op}
    _known(of, tuple(named), f"{where}: of: no shape")
    base = named[of]
    _known(over, tuple(key for key in base.dims if key not in WORDS), f"{where}: over: no key")
    if not isinstance(values, list) or not values:
        raise ShapeError(f"{where}: values: was {values!r}, must be a list of numbers")
    points = []
    for at in values:
        varied = base.dims[over]
        dims = base.dims | {over: [at] * len(varied) if isinstance(varied, list) else at}
        _check(op, dims, f"{where}: {of}")
        points.append(Shape(op, f"{of} {over}={at}", dims, f"sweep of {of}", sweep={"over": over, "at": at, "of": of}))
    return points
