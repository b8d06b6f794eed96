"""A catalogue in which the title names the picture's colour and where it is bright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from em3.data.table import Items

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
PLACES = ("left", "middle", "right", "everywhere")


def pictures_and_texts(n: int, seed: int, size: int = 32) -> tuple[Tensor, list[str]]:
    """uint8 ``[n, 3, size, size]`` and their titles; position in the picture is vertical, so mirroring keeps it."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (n, size, size, 3))
    texts = []
    for picture in pixels:
        colour, place = rng.choice(list(COLOURS)), int(rng.integers(len(PLACES)))
        third = size // 3
        band = slice(place * third, (place + 1) * third) if place < 3 else slice(0, size)
        picture[band] += np.array(COLOURS[colour]) - 40
        texts.append(f"A {colour} thing, {PLACES[place]} ({rng.integers(1990, 2000)})")
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous(), texts


def written(folder: Path, pictures: Tensor, texts: list[str]) -> Items:
    """The same as JPEG files."""
    paths: list[Path | None] = []
    for number, picture in enumerate(pictures):
        path = folder / f"{number}.jpg"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=95)
        paths.append(path)
    return Items([f"i{number}" for number in range(len(texts))], list(texts), paths)
