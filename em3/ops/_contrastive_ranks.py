"""The registered operators ``em3::contrastive_ranks`` and ``..._ring``: how many candidates are above each positive.

The arguments are those of ``em3::contrastive_loss`` and its ring; ``of_row [B, 2]`` and ``of_col [B, 2]`` are the least
and the largest logit that is taken for the positive's, None for a direction that is not asked for. The results are counts in
float64, a candidate between them is half a one; empty where not asked for. They have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.torch import contrastive_ranks as tiled
from . import _checks
from . import _contrastive_checks as check
from ._contrastive_ring import Blocks
from ._ring import Exchange, Ring, arrived

torch.library.define(
    "em3::contrastive_ranks",
    "(Tensor x, Tensor y, Tensor scale, Tensor? item_ids, Tensor? offset, Tensor? of_row, Tensor? of_col)"
    " -> (Tensor row, Tensor col)",
)
torch.library.define(
    "em3::contrastive_ranks_ring",
    "(Tensor x, Tensor y, Tensor scale, Tensor? item_ids, Tensor? offset, Tensor? of_row, Tensor? of_col, Tensor sizes,"
    " str group) -> (Tensor row, Tensor col)",
)


@torch.library.impl("em3::contrastive_ranks", "default")
def _ranks(x, y, scale, item_ids, offset, of_row, of_col):
    check.log_probabilities(offset)
    with _checks.no_autocast(x.device):
        return tiled.forward(x, y, scale, item_ids, offset, of_row, of_col)


@torch.library.impl("em3::contrastive_ranks_ring", "default")
def _ranks_ring(x, y, scale, item_ids, offset, of_row, of_col, sizes, group):
    check.log_probabilities(offset)
    ring, blocks = Ring(group), Blocks(x, y, item_ids, offset, sizes)
    row = x.new_zeros(0 if of_row is None else x.shape[0], dtype=torch.float64)
    passed: list[Tensor] | Exchange | None = None
    # Behind the shard itself: what its columns' candidates are compared with.
    shard = [*blocks.shard, *([] if of_col is None else [of_col])]
    lengths = [[*mine, *([] if of_col is None else b)] for mine, b in zip(blocks.shard_lengths, blocks.lengths("B"), strict=True)]
    with _checks.no_autocast(x.device):
        for source, theirs in ring.circulate(shard, lengths):
            own, n = source == ring.rank, blocks.sizes[source][0]
            col = x.new_zeros(0 if of_col is None else n, dtype=torch.float64)
            if x.shape[0] and theirs[0].shape[0]:
                candidates, ids, offsets = blocks.against(own, theirs[: len(blocks.shard)])
                of_cols = None if of_col is None else theirs[-1]
                part = tiled.forward(x, candidates, scale, ids, offsets, of_row, of_cols, None if own else n)
                row, col = (t + p for t, p in zip((row, col), part, strict=True))
            if of_col is not None:
                if passed is not None:
                    col = col + arrived(passed)[0]
                passed = ring.hand_on([col], source, blocks.lengths("B"))
    return row, arrived(passed)[0] if passed is not None else row.new_empty(0)


@torch.library.register_fake("em3::contrastive_ranks")
def _ranks_fake(x, y, scale, item_ids, offset, of_row, of_col):
    return tuple(x.new_empty(0 if of is None else x.shape[0], dtype=torch.float64) for of in (of_row, of_col))


@torch.library.register_fake("em3::contrastive_ranks_ring")
def _ranks_ring_fake(x, y, scale, item_ids, offset, of_row, of_col, sizes, group):
    return _ranks_fake(x, y, scale, item_ids, offset, of_row, of_col)
