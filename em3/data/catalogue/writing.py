"""``make``: the catalogue's files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from em3._version import __version__

from ...files import atomic
from ..table import SPLITS, DataError
from .attributes import ATTRIBUTES, STYLES, Content, draw_content
from .clicks import Clicks, draw_clicks
from .drawing import draw_picture
from .titles import write_titles

FORMAT = 1
_DONE = "catalogue.json"
_UNFINISHED = "catalogue.unfinished"  # there while the folder is written: what may be thrown away and begun again
_PICTURES = "pictures"
_CONTENT, _TRUTH, _REQUESTS, _LABELS, _TITLES, _DRAWINGS = range(6)  # streams of random numbers


def make(
    folder: str | os.PathLike[str],
    *,
    num_items: int = 2000,
    num_users: int = 2500,
    num_requests: int | None = None,
    candidates: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write a catalogue with known click probabilities into ``folder``, which must be empty, missing, or an unfinished one.

    The general layout, and beside it what only a made-up catalogue can tell:

    - ``items.parquet``: item (string), title (string, may be empty), picture (string, relative path, or null)
    - ``interactions.parquet``: user, item (string), label (int8, 0 or 1), timestamp (int64, seconds since 1970), request
      (int64), split (``"train"``, ``"valid"`` or ``"test"``, by time), probability (float32, the truth)
    - ``pictures/*.jpg``: 64 x 64 pixels
    - ``truth.parquet``: item, the name of each attribute's value (string), the styles (float64, 0 to 1)
    - ``catalogue.json``, written last: parameters, versions, checksum of the numbers, AUC of the perfect ranker on the
      test rows (all, and those of warm and cold items; cold = nobody clicked the item in the training period)

    The same arguments and library versions give the same numbers on every machine, and the same titles. Pictures are
    drawn from the same random numbers, but their bytes depend on the JPEG library.

    Args:
        folder: made if missing.
        num_items: at least 50.
        num_users: at least 1.
        num_requests: at least 50; ``8 * num_users`` (but 50) if None. The first 80% train, the last 10% test.
        candidates: different items shown in one request, 1 to an eighth of ``num_items``.
        seed: 0 or more.
        progress: whether to show a progress bar on standard error.

    Returns:
        The folder.

    Raises:
        ValueError: an argument that is out of range.
        DataError: if the folder holds anything else.
    """
    if num_requests is None:
        num_requests = max(8 * num_users, 50)
    parameters = dict(
        num_items=num_items, num_users=num_users, num_requests=num_requests, candidates=candidates, seed=seed
    )
    for name, least in (("num_items", 50), ("num_users", 1), ("num_requests", 50), ("candidates", 1), ("seed", 0)):
        if parameters[name] < least:
            raise ValueError(f"{name}: was {parameters[name]}, must be at least {least}")
    if candidates > num_items // 8:
        raise ValueError(f"candidates: was {candidates}, must be at most an eighth of the {num_items} items")
    path = Path(folder)
    _begin(path)
    streams = [_random(seed, stream) for stream in range(_DRAWINGS)]
    content = draw_content(streams[_CONTENT], num_items)
    clicks = draw_clicks(
        [streams[_TRUTH], streams[_REQUESTS], streams[_LABELS]],
        content,
        num_users=num_users,
        num_requests=num_requests,
        candidates=candidates,
    )
    titles = write_titles(streams[_TITLES], content)
    _write_items(path, content, titles)
    _write_interactions(path, clicks)
    _write_pictures(path, content, seed, progress)
    _finish(path, parameters, clicks)
    return path


def _random(seed: int, *stream: int) -> np.random.Generator:
    """Streams that share nothing with each other, nor with ``default_rng(seed)``, which a user of the data may take."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _begin(path: Path) -> None:
    """An empty folder marked as unfinished."""
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is a file, must be a folder that is empty or missing")
    path.mkdir(parents=True, exist_ok=True)
    marker = path / _UNFINISHED
    if (path / _DONE).exists():
        raise DataError(f"{path}: holds a finished catalogue already; name another folder, or remove it")
    if not marker.exists():
        if found := sorted(entry.name for entry in path.iterdir()):
            raise DataError(f"{path}: must be empty, or an unfinished catalogue, but holds {', '.join(found[:5])}")
        marker.touch()
    shutil.rmtree(path / _PICTURES, ignore_errors=True)
    for left_behind in path.glob(".*.tmp"):
        left_behind.unlink()


def _item_name(number: int) -> str:
    return f"i{number:06d}"


def _picture_name(number: int) -> str:
    return f"{_PICTURES}/{_item_name(number)}.jpg"


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    with atomic(path) as file:
        pa.parquet.write_table(pa.table(columns), file)


def _write_items(path: Path, content: Content, titles: list[str]) -> None:
    import pyarrow as pa

    names = [_item_name(number) for number in range(len(titles))]
    pictures = [_picture_name(number) if has else None for number, has in enumerate(content.has_picture)]
    _write_table(
        path / "items.parquet", {"item": names, "title": titles, "picture": pa.array(pictures, pa.string())}
    )
    truth: dict[str, Any] = {"item": names}
    truth |= {attribute.name: content.names(attribute.name) for attribute in ATTRIBUTES}
    truth |= {style: content.styles[:, column] for column, style in enumerate(STYLES)}
    _write_table(path / "truth.parquet", truth)


def _write_interactions(path: Path, clicks: Clicks) -> None:
    columns = {
        "user": [f"u{number:06d}" for number in clicks.user],
        "item": [_item_name(number) for number in clicks.item],
        "label": clicks.label,
        "timestamp": clicks.time,
        "request": clicks.request,
        "split": [SPLITS[number] for number in clicks.split],
        "probability": clicks.probability,
    }
    _write_table(path / "interactions.parquet", columns)


def _write_pictures(path: Path, content: Content, seed: int, progress: bool) -> None:
    numbers: Iterable[int] = np.flatnonzero(content.has_picture).tolist()
    if progress:
        from tqdm import tqdm

        numbers = tqdm(numbers, desc="drawing pictures", unit="picture", disable=None)
    (path / _PICTURES).mkdir()
    for number in numbers:
        rng = _random(seed, _DRAWINGS, number)
        picture = draw_picture(rng, content.values[number], content.styles[number])
        (path / _picture_name(number)).write_bytes(picture)


def _finish(path: Path, parameters: dict[str, int], clicks: Clicks) -> None:
    os.sync()  # thousands of small pictures at once: catalogue.json must not outlive them in a power cut
    about = {
        "format": FORMAT,
        "parameters": parameters,
        "versions": {
            "em3": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow")},
        },
        "rows": len(clicks.label),
        "clicks": int(clicks.label.sum()),
        "sha256": clicks.sha256(),
        "perfect_ranker_test_auc": _perfect_ranker(clicks),
    }
    with atomic(path / _DONE) as file:
        file.write(json.dumps(about, indent=2).encode() + b"\n")
    (path / _UNFINISHED).unlink()


def _perfect_ranker(clicks: Clicks) -> dict[str, float | None]:
    """AUC of the true probabilities on the test rows; None where a part has no click, or nothing else."""
    from ...train.metrics import auc

    test = clicks.split == SPLITS.index("test")
    parts = {"all": test, "warm": test & ~clicks.cold, "cold": test & clicks.cold}
    return {name: auc(clicks.label[rows], clicks.probability[rows]) for name, rows in parts.items()}
