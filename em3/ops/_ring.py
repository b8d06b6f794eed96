"""The ranks of a process group in a circle: shards travel once around it while the caller computes on those it holds.

Everything here is a collective: every rank of the group makes the same calls in the same order. Point-to-point messages
and reductions are torch.distributed's, so what the group's backend does not do (gloo: tensors of a GPU) is not done here.
Groups go into operators by name, as in torch's own functional collectives, so that they stand in a graph.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RingError(RuntimeError):
    """Another rank died, hung, or made other calls; this one gave up within the group's timeout."""


class Exchange:
    """Messages under way. They are held here until they have arrived: memory must outlive what is sent from it."""

    def __init__(self, ring: Ring, sent: Sequence[Tensor], received: list[Tensor], what: str) -> None:
        self._ring, self._held, self._received, self._what = ring, sent, received, what
        ops = [dist.P2POp(dist.isend, t, ring.next, ring.group) for t in sent if t.numel()]
        ops += [dist.P2POp(dist.irecv, t, ring.previous, ring.group) for t in received if t.numel()]
        with ring.told(what):
            self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> list[Tensor]:
        """What was received; on a GPU the current stream waits and not the host."""
        with self._ring.told(self._what):
            for work in self._works:
                work.wait()
        return self._received


class Ring:
    def __init__(self, group_name: Any) -> None:
        self.group = dist.distributed_c10d._resolve_process_group(group_name)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.next = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(self.group, (self.rank - 1) % self.size)

    def circulate(self, mine: list[Tensor], lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[Tensor]]]:
        """``(rank, its tensors)`` for every rank, this one first; the next shard travels while the caller computes.

        No more than two shards are there beside ``mine``, and each is good until the next one is asked for.

        Args:
            mine: contiguous tensors.
            lengths: for every rank the number of rows of each of its tensors.
        """
        shard = mine
        for step in range(self.size):
            source = (self.rank - step) % self.size
            if step + 1 == self.size:
                yield source, shard
                return
            coming = (source - 1) % self.size
            room = [t.new_empty(n, *t.shape[1:]) for t, n in zip(mine, lengths[coming], strict=True)]
            exchange = Exchange(self, shard, room, f"the shard of rank {coming}")
            yield source, shard
            shard = exchange.wait()

    def hand_on(self, tensors: list[Tensor], source: int, lengths: Sequence[Sequence[int]]) -> list[Tensor] | Exchange:
        """Send what belongs to the shard of ``source``, the one that ``circulate`` gave, to follow it around the ring.

        What comes back, see :func:`arrived`, belongs to the next shard; to this rank's own after the last one.
        """
        if self.size == 1:
            return tensors
        before = (source - 1) % self.size
        room = [t.new_empty(n, *t.shape[1:]) for t, n in zip(tensors, lengths[before], strict=True)]
        return Exchange(self, tensors, room, f"the sums of rank {before}")

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RingError(
                f"group: rank {self.rank} of {self.size} waited for {what}, which did not come; a rank died, hangs, or makes "
                f"other calls than this one ({str(error).splitlines()[0]})"
            ) from error


def arrived(handed_on: list[Tensor] | Exchange) -> list[Tensor]:
    return handed_on.wait() if isinstance(handed_on, Exchange) else handed_on


# sizes [W, 3] on the CPU: of each rank the three given numbers, the last of which must agree, as must the words.
torch.library.define("em3::ring_sizes", "(Tensor like, SymInt[] sizes, str[] words, str group) -> Tensor")
# The sum over the ranks; its gradient is the sum of theirs.
torch.library.define("em3::ring_total", "(Tensor rows, str group) -> Tensor")
# In place of each row [B, ...] the sum, in float64, over the rows of its item on all ranks; ids [B], sizes as above.
torch.library.define("em3::ring_item_sums", "(Tensor rows, Tensor ids, Tensor sizes, str group) -> Tensor")


@torch.library.impl("em3::ring_sizes", "default")
def _sizes(like: Tensor, sizes: list[int], words: list[str], group: str) -> Tensor:
    ring = Ring(group)
    mine = torch.tensor([*sizes, *(zlib.crc32(word.encode()) for word in words)], device=like.device)
    everyones = [torch.empty_like(mine) for _ in range(ring.size)]
    with ring.told("the sizes of all ranks"):
        dist.all_gather(everyones, mine, group=ring.group)
    table = torch.stack(everyones).cpu()
    for name, column in zip([f"the width {sizes[-1]}", *words], table[:, len(sizes) - 1 :].T, strict=True):
        other = (column != column[ring.rank]).nonzero().flatten().tolist()
        if other:
            raise ValueError(
                f"group: {name} on rank {ring.rank} differs from that on rank {other[0]}, must be the same on every rank"
            )
    return table[:, : len(sizes)].clone()


@torch.library.impl("em3::ring_total", "default")
def _total(rows: Tensor, group: str) -> Tensor:
    ring = Ring(group)
    total = rows.clone(memory_format=torch.contiguous_format)
    with ring.told("the totals of all ranks"):
        dist.all_reduce(total, group=ring.group)
    return total


@torch.library.impl("em3::ring_item_sums", "default")
def _item_sums(rows: Tensor, ids: Tensor, sizes: Tensor, group: str) -> Tensor:
    ring = Ring(group)
    items, place = ids.unique(return_inverse=True)
    sums = rows.new_zeros(len(items), *rows.shape[1:], dtype=torch.float64)
    lengths = [(b, b) for b in sizes[:, 0].tolist()]
    for _, (their_rows, their_ids) in ring.circulate([rows.contiguous(), ids.contiguous()], lengths):
        if len(items):
            at = torch.searchsorted(items, their_ids).clamp_(max=len(items) - 1)
            here = items[at] == their_ids
            sums.index_add_(0, at[here], their_rows[here].double())
    return sums[place]


@torch.library.register_fake("em3::ring_sizes")
def _sizes_fake(like: Tensor, sizes: list[int], words: list[str], group: str) -> Tensor:
    return torch.empty(Ring(group).size, len(sizes), dtype=torch.int64)


@torch.library.register_fake("em3::ring_total")
def _total_fake(rows: Tensor, group: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.register_fake("em3::ring_item_sums")
def _item_sums_fake(rows: Tensor, ids: Tensor, sizes: Tensor, group: str) -> Tensor:
    return rows.new_empty(rows.shape, dtype=torch.float64)


def _setup_total(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.group = inputs[1]


def _setup_item_sums(ctx: Any, inputs: Any, output: Any) -> None:
    rows, ids, sizes, ctx.group = inputs
    ctx.dtype = rows.dtype
    ctx.save_for_backward(ids, sizes)


# Both are their own adjoints.
torch.library.register_autograd(
    "em3::ring_total", lambda ctx, grad: (torch.ops.em3.ring_total(grad, ctx.group), None), setup_context=_setup_total
)
torch.library.register_autograd(
    "em3::ring_item_sums",
    lambda ctx, grad: (torch.ops.em3.ring_item_sums(grad, *ctx.saved_tensors, ctx.group).to(ctx.dtype), None, None, None),
    setup_context=_setup_item_sums,
)
