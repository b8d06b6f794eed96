"""Where the batch of ``contrastive_loss`` lies: in this process, or a shard of it on every rank of a process group.

Both have the same methods, so that the formulas (``_contrastive_terms.py``) are written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _contrastive_kinds as kinds
from . import _contrastive_ranks, _contrastive_ring  # noqa: F401, they register operators that are called here, as do the kinds


class Alone:
    """The batch is this process's."""

    ranks = 1

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def sums(self, kind: str, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, item_ids: Tensor | None,
             offset: Tensor | None, asked: list[bool], backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``row, col`` of ``em3::contrastive_loss`` or ``em3::contrastive_sigmoid``, whose arguments these are."""
        found: tuple[Tensor, Tensor]
        if kind == kinds.INFONCE:
            found = torch.ops.em3.contrastive_loss(x, y, scale, item_ids, offset, *asked, backend)
        else:
            positive = kind == kinds.SIGMOID_POSITIVE
            found = torch.ops.em3.contrastive_sigmoid(x, y, scale, bias, item_ids, offset, *asked, positive, backend)
        return found

    def above(self, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None,
              of_row: Tensor | None, of_col: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``row, col`` of ``em3::contrastive_ranks``, whose arguments these are."""
        found: tuple[Tensor, Tensor] = torch.ops.em3.contrastive_ranks(x, y, scale, item_ids, offset, of_row, of_col)
        return found

    def total(self, t: Tensor) -> Tensor:
        """The sum of every rank's ``t``."""
        return t

    def item_sums(self, rows: Tensor, item_ids: Tensor) -> Tensor:
        """``rows [B, F]`` -> ``[B, F]`` in float64: in place of each the sum of the rows of its item."""
        ids, order = item_ids.sort(stable=True)
        first = torch.cat([ids[:1] != ids[:1], ids[1:] != ids[:-1]])
        item = torch.empty_like(order).scatter(0, order, first.cumsum(0))  # numbers under B: no shape depends on the content
        return torch.zeros_like(rows, dtype=torch.float64).index_add(0, item, rows.double())[item]


class Shared:
    """A shard of the batch on every rank.

    Args:
        sizes: of ``em3::ring_sizes``: ``B``, ``K`` and ``V`` of each rank.
        group: the name of the process group.
    """

    def __init__(self, sizes: Tensor, group: str) -> None:
        self.sizes, self.group = sizes, group
        self.ranks = sizes.shape[0]
        self.rows = sizes[:, 0].sum()  # on the CPU

    def sums(self, kind: str, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, item_ids: Tensor | None,
             offset: Tensor | None, asked: list[bool], backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
        found: tuple[Tensor, Tensor] = torch.ops.em3.contrastive_loss_ring(
            x, y, scale, bias, item_ids, offset, self.sizes, *asked, kind, backend, self.group
        )
        return found

    def above(self, x: Tensor, y: Tensor, scale: Tensor, item_ids: Tensor | None, offset: Tensor | None,
              of_row: Tensor | None, of_col: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        found: tuple[Tensor, Tensor] = torch.ops.em3.contrastive_ranks_ring(
            x, y, scale, item_ids, offset, of_row, of_col, self.sizes, self.group
        )
        return found

    def total(self, t: Tensor) -> Tensor:
        summed: Tensor = torch.ops.em3.ring_total(t, self.group)
        return summed

    def item_sums(self, rows: Tensor, item_ids: Tensor) -> Tensor:
        sums: Tensor = torch.ops.em3.ring_item_sums(rows, item_ids, self.sizes, self.group)
        return sums


Scope = Alone | Shared
