"""Small random catalogues with rows to rank, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from em3.data.table import Events, Items, RankingData, Rows
from em3.jagged import Jagged


def random_data(seed: int, *, users: int = 7, items: int = 9, events: int = 40, rows: int = 30,
                shares: tuple[float, float, float] = (0.6, 0.2, 0.2), unseen: int = 2) -> RankingData:  # fmt: skip
    """Events of random users and items; rows in order of time, so that the first ones train.

    The last ``unseen`` items occur in rows of the other splits only, if at all.
    """
    rng = np.random.default_rng(seed)
    seen = max(items - unseen, 1)
    split = np.sort(rng.choice(3, rows, p=shares)).astype(np.int8)
    split[:1] = 0
    item = np.where(split == 0, rng.integers(0, seen, rows), rng.integers(0, items, rows))
    return RankingData(
        "toy",
        Items([f"i{i}" for i in range(items)], [f"thing {i}" for i in range(items)], [None] * items),
        users,
        Events(rng.integers(0, users, events), rng.integers(0, seen, events), np.sort(rng.integers(0, 99, events))),
        Rows(
            request=np.arange(rows) // 3, user=rng.integers(0, users, rows), item=item,
            label=(rng.random(rows) < 0.5).astype(np.float32), time=np.sort(rng.integers(0, 99, rows)), split=split,
            cold=item >= seen, before=np.sort(rng.integers(0, events + 1, rows)),
        ),
    )  # fmt: skip


class Tokens:
    """Random tokens of each item in two streams; item 1 has none at all. Reads like a token store."""

    names, widths = ("image", "text"), {"image": 5, "text": 3}

    def __init__(self, items: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sequences: list[list[Tensor]] = []
        for width in self.widths.values():
            lengths = torch.randint(0, 4, (items,), generator=generator)
            lengths[1:2] = 0
            self.sequences.append([torch.randn(n, width, generator=generator).to(dtype) for n in lengths.tolist()])
        self.reads: list[list[int]] = []

    def read(self, rows: Tensor) -> list[Jagged]:
        self.reads.append(rows.tolist())
        return [Jagged.from_sequences([stream[i] for i in rows.tolist()]) for stream in self.sequences]


def no_temporary_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*.tmp") if path.is_file()]
