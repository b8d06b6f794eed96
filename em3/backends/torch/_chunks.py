"""Cutting a batch of token streams into pieces of bounded size, padded only as far as each piece needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...tuning import decide

# Elements of one temporary. A chunk's token rows, its scores and its upcast copy each stay under this, so the
# backend's memory does not grow with the batch. qformer_attention forward and backward at B=256, N=256, C=512, H*Q=64,
# float32, 2 threads with 1 MiB of L2 each: 258 ms at 1/4 Mi elements, 226 at 1 Mi, 246 at 4 Mi, 279 at 16 Mi.
# `em3 tune` may have found a quarter or four times as many to be faster on the user's machine.
BUDGET = 1 << 20


class Rows(NamedTuple):
    """Where the rows of one stream lie: for a padded stream ``offsets`` is None and the grid is ``[B, N]``."""

    values: Tensor  # [B, N, C] or [T, C], or the bank [n, C] when lookup is given
    offsets: Tensor | None  # [B + 1]
    mask: Tensor | None  # [B, N], padded only; None with a lookup
    lookup: Tensor | None = None  # [B, N] or [T]: row numbers into values; out of range = missing
    bias: Tensor | None = None  # [B, N, H] or [T, H], added to the scores of each head; only with a lookup

    def safe(self) -> Rows:
        """Without offsets or row numbers that lie outside: on a GPU nobody has looked at them.

        What a row number outside names counts as missing (in ``mask``, which has the shape of ``lookup``).
        """
        if self.offsets is not None:
            rows = self.values if self.lookup is None else self.lookup
            self = self._replace(offsets=self.offsets.clamp(0, rows.shape[0]))
        if self.lookup is None:
            return self
        inside = (self.lookup >= 0) & (self.lookup < self.values.shape[0])
        if inside.device.type == "cpu" and bool(inside.all()):  # looking is free here, and saves passes over the scores
            return self
        return self._replace(lookup=self.lookup.masked_fill(~inside, 0), mask=inside)


class Piece(NamedTuple):
    """The tokens of one chunk of items in one stream."""

    x: Tensor  # [b, n, C], zero where not present
    present: Tensor | None  # [b, n] bool, None = all
    source: Tensor | slice  # where x came from: row numbers [b, n] into values' rows, or a slice of items
    bias: Tensor | None = None  # [b, n, H]
    place: Tensor | slice | None = None  # where that came from: row numbers [b, n] into [B * N, H] or [T, H], or items


class _Kept(threading.local):
    def __init__(self) -> None:  # once in every thread
        self.buffers: dict[tuple[int, torch.dtype], Tensor] = {}


class Scratch:
    """Memory for the gathered rows of one stream, overwritten by the next chunk.

    On the CPU a thread keeps it from call to call (one chunk, ``BUDGET`` elements at most): fresh pages cost as much as
    the copying. lora_target_attention, forward and backward, B=64, N=200, C=D=256, H=4, on a trimmed heap: 19.0 ms with
    memory of its own for each call, 16.2 with memory that is kept.
    """

    _kept = _Kept()

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.buffer: Tensor | None = None

    def take(self, rows: int, values: Tensor) -> Tensor:
        size = rows * values.shape[1]
        keeps = values.device.type == "cpu" and size <= BUDGET
        kept = self._kept.buffers
        buffer = kept.get((self.stream, values.dtype)) if keeps else self.buffer
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be kept for training
                buffer = torch.empty(size, dtype=values.dtype, device=values.device)
            if keeps:
                kept[self.stream, values.dtype] = buffer
            else:
                self.buffer = buffer
        return buffer[:size].view(rows, values.shape[1])


class Chunk(NamedTuple):
    items: Tensor | slice  # [b] item numbers, or a slice of them
    size: int
    pieces: list[Piece]


def chunks(streams: list[Rows], num_items: int, row_cost: int) -> Iterator[Chunk]:
    """Chunks of items such that (padded tokens) * ``row_cost`` stays within the budget, at least one item each.

    A chunk's ``x`` is valid until the next chunk is asked for.

    Args:
        streams: the streams of the batch, all with ``num_items`` items.
        num_items: B.
        row_cost: elements that one token costs in the caller's largest temporary.
    """
    scratch = [Scratch(m) for m, _ in enumerate(streams)]
    streams = [s.safe() for s in streams]
    budget = _budget(streams, num_items, row_cost)
    if all(s.offsets is None for s in streams):
        tokens = sum((s.values if s.lookup is None else s.lookup).shape[1] for s in streams)
        step = max(1, budget // max(1, tokens * row_cost))
        for start in range(0, num_items, step):
            stop = min(num_items, start + step)
            some = slice(start, stop)
            yield Chunk(some, stop - start, [_padded(s, some, w) for s, w in zip(streams, scratch, strict=True)])
        return
    lengths = torch.stack([_lengths(s, num_items) for s in streams])  # [M, B]
    order = lengths.sum(0).sort(stable=True)  # items of like length together: little padding
    for group in _groups(order.values.tolist(), row_cost, budget):
        items = order.indices[group]
        longest = lengths[:, items].amax(1).tolist()
        pieces = [_gathered(s, items, n, w) for s, n, w in zip(streams, longest, scratch, strict=True)]
        yield Chunk(items, len(items), pieces)


def _budget(streams: list[Rows], num_items: int, row_cost: int) -> int:
    first = streams[0]
    op = "qformer_attention" if first.lookup is None else "lora_target_attention"
    places = first.values[..., 0] if first.lookup is None else first.lookup  # [B, N] or [T]
    dims = (num_items, row_cost, len(streams), places.numel(), first.values.shape[-1])
    kind = "padded" if first.offsets is None else "jagged"
    return int(decide(f"{op}.chunk", first.values, kind, dims, str(BUDGET)))


def _groups(sorted_lengths: list[int], row_cost: int, budget: int) -> Iterator[slice]:
    start = 0
    for end in range(1, len(sorted_lengths) + 1):
        full = end == len(sorted_lengths) or (end + 1 - start) * sorted_lengths[end] * row_cost > budget
        if full:
            yield slice(start, end)
            start = end


def _lengths(stream: Rows, num_items: int) -> Tensor:
    if stream.offsets is not None:
        return stream.offsets.diff().clamp(min=0)
    grid = stream.values if stream.lookup is None else stream.lookup
    return torch.full((num_items,), grid.shape[1], device=grid.device)


def _padded(stream: Rows, items: slice | Tensor, scratch: Scratch) -> Piece:
    mask = None if stream.mask is None else stream.mask[items]
    if stream.lookup is not None:
        piece = _taken(stream.values, stream.lookup[items], mask, scratch)
        return piece if stream.bias is None else piece._replace(bias=stream.bias[items], place=items)
    x = stream.values[items]
    if mask is not None and not (mask.device.type == "cpu" and bool(mask.all())):
        x = x.masked_fill(~mask[..., None], 0)
    if isinstance(items, slice):
        return Piece(x, mask, items)
    n = stream.values.shape[1]
    return Piece(x, mask, items[:, None] * n + torch.arange(n, device=items.device))


def _gathered(stream: Rows, items: Tensor, longest: int, scratch: Scratch) -> Piece:
    if stream.offsets is None:
        return _padded(stream, items, scratch)
    total = (stream.values if stream.lookup is None else stream.lookup).shape[0]
    rows = stream.offsets[items][:, None] + torch.arange(longest, device=items.device)  # [b, n]
    present = rows < stream.offsets[items + 1][:, None]
    places = rows = rows.masked_fill(~present, 0)
    if stream.lookup is not None and total:
        present = present if stream.mask is None else present & stream.mask[rows]
        rows = stream.lookup[rows]
    piece = _taken(stream.values, rows, present, scratch)
    return piece if stream.bias is None or not total else piece._replace(bias=stream.bias[places], place=places)


def _taken(values: Tensor, rows: Tensor, present: Tensor | None, scratch: Scratch) -> Piece:
    """Rows ``[b, n]`` of ``values [n, C]``, where every row number lies inside; zeros for those not present."""
    if values.shape[0] == 0:
        return Piece(values.new_zeros(*rows.shape, values.shape[1]), present, rows)
    # index_select rather than values[rows]: it copies whole rows, 0.9 ms against 8.2 for 4,000 rows of 256 on 2 threads.
    x = torch.index_select(values, 0, rows.reshape(-1), out=scratch.take(rows.numel(), values))
    if present is not None:  # a weight of 0 would not do: 0 * NaN is NaN
        absent = ~present.reshape(-1)
        if absent.device.type == "cpu":  # looking is free here, and only the absent rows are written to
            x.index_fill_(0, absent.nonzero()[:, 0], 0)
        else:
            x.masked_fill_(absent[:, None], 0)
    return Piece(x.view(*rows.shape, values.shape[1]), present, rows)


def room(out: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """Where to compute the gradient ``[b, n, C]`` of a piece: in its place in ``out``, if that is one block."""
    if isinstance(piece.source, slice) and out.dtype == dtype:
        return out[piece.source]
    return out.new_empty(piece.x.shape, dtype=dtype)


def scatter(out: Tensor, piece: Piece, grad: Tensor) -> None:
    """Add the gradient ``[b, n, C]`` of a piece to the rows of ``out`` (shaped like ``values``, zero at first)."""
    if isinstance(piece.source, slice):
        place = out[piece.source]
        if grad.data_ptr() != place.data_ptr():  # else it was computed there
            place.copy_(grad)
        return
    _add(out, piece.source, piece.present, grad)


def scatter_bias(out: Tensor, piece: Piece, grad: Tensor) -> None:
    """Add the gradient ``[b, n, H]`` of a piece's bias to ``out`` (shaped like the bias, zero at first)."""
    if isinstance(piece.place, slice) or out.dim() == 3:
        out[piece.place] += grad
    elif piece.place is not None:
        _add(out, piece.place, piece.present, grad)


def _add(out: Tensor, rows: Tensor, present: Tensor | None, grad: Tensor) -> None:
    rows, flat = rows.reshape(-1), grad.reshape(-1, grad.shape[-1])
    if present is not None:
        keep = present.reshape(-1)
        rows, flat = rows[keep], flat[keep]
    out.view(-1, out.shape[-1]).index_add_(0, rows, flat.to(out.dtype))
