"""A small catalogue with faults, and settings of runs on it that take seconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from em3.train.config import Config, load

SMALL = [
    "encoder={width: 16, height: 32, width_pixels: 32, epochs: 1}",
    "model={id_dim: 8, hidden: [16], content_dim: 8, dim: 8, num_queries: 2, num_heads: 2, rank: 2}",
]
SETTINGS = [
    *SMALL, "seeds=[3]", "arms=[em3]", "train.epochs=2", "train.batch_size=64", "train.checkpoint_every=3",
    "train.log_every=2", "train.refresh_every=3", "history_length=10",
]  # fmt: skip
WORDS = ["red", "green", "blue", "lamp", "chair", "kettle", "large", "small"]
ITEMS = 40


def write_catalogue(folder: Path, *, unknown_item: bool = False) -> None:
    """Item 0: a JPEG cut off, item 1: no title, item 2: a picture that is not there, item 3: none named."""
    from PIL import Image

    rng = np.random.default_rng(5)
    (folder / "pictures").mkdir(parents=True)
    for item in range(ITEMS):
        pixels = rng.integers(0, 60, (40, 36, 3)) + rng.integers(0, 190, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "pictures" / f"{item}.jpg")
    broken = folder / "pictures" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    (folder / "pictures" / "2.jpg").unlink()
    with open(folder / "items.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title", "picture"])
        for item in range(ITEMS):
            title = "" if item == 1 else " ".join(rng.choice(WORDS, 3))
            rows.writerow([f"thing-{item}", title, "" if item == 3 else f"pictures/{item}.jpg"])
    with open(folder / "interactions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "label", "timestamp", "request"])
        for row in range(900):
            item = rng.integers(ITEMS) if row > 10 else row % 4
            rows.writerow([f"u{row // 3 % 25}", f"thing-{item}", int(rng.random() < 0.4), 1000 + row // 3, row // 3])
        if unknown_item:
            rows.writerow(["u1", "thing-99", 1, 2000, 301])


def configured(catalogue: Path, *words: str) -> Config:
    return load([], [f"data={catalogue}", *SETTINGS, *words])


def silent(*_: Any) -> None:
    pass
