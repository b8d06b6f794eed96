"""``lora_linear`` in Triton: the low-rank part, added where PyTorch's products with the weight have left their rows.

Row numbers are sorted by adapter, rows never move. Each adapter's run of row numbers is cut into parts, and a program finds
out for itself which part it has: from the G + 1 bounds of the runs it counts the parts of every adapter. So the host knows
no more than that there are at most ``T / size + G`` of them, and waits for nothing.

One kernel serves forward and backward. It shrinks a tile of rows ``x [ROWS, C]`` with one factor of the adapter to
``low [ROWS, R]``, which stays in float32 registers, and expands that with the other factor to what it adds to ``y``. In the
forward x and y are those of the layer; in the backward ``dy`` takes the place of x and ``dx`` that of y. What the adapters'
gradients need of ``low`` is written, ``R`` numbers a row, in the order of the row numbers.

The gradients ``low^T x`` are summed by parts: the only part of an adapter writes its gradient, parts of several write sums,
which are added up in order. Nothing is added atomically: the same inputs give the same bits.

Factors are held as the layers hold them: ``A [G, R, C]``, ``B [G, D, R]``. TURNED is for one whose rank comes last.

In the half types products with rows are those of the tensor cores. A float32 number of ``low`` is split into two of TF32,
which keeps 22 bits of it, and multiplied with the other side, which TF32 holds exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import REGISTERS, cdiv, on_device, precision, table, waves

MAX_GROUPS = 1024  # adapters whose bounds are looked at in one step


class Rows(NamedTuple):
    """Which rows an adapter has: ``order[bounds[g] .. bounds[g + 1] - 1]``, or without an order these places themselves."""

    order: Tensor | None  # [T] int64
    bounds: Tensor | None  # [G + 1] int32, not decreasing, 0 .. T; None for one adapter that has all


class Mask(NamedTuple):
    """Dropout, of em3/ops/_dropout.py."""

    seed: Tensor  # [1] int64
    threshold: int
    factor: float


class Scaling(NamedTuple):
    """Of all adapters, and of each, or None."""

    shared: float
    each: Tensor | None  # [G] float32


class Config(NamedTuple):
    """The tile of one kernel: rows, columns of x or y at a time."""

    rows: int
    width: int
    warps: int
    stages: int


@triton.jit
def _runs(bounds, first, G, size, LEAST: tl.constexpr, GROUPS: tl.constexpr):
    """Of GROUPS adapters from ``first`` on: their numbers, their runs, and in how many parts each is cut."""
    g = first + tl.arange(0, GROUPS)
    begin = tl.load(bounds + g, mask=g < G, other=0)
    end = tl.load(bounds + g + 1, mask=g < G, other=0)
    count = tl.where(g < G, tl.maximum(tl.cdiv(end - begin, size), LEAST), 0)
    return g, begin, end, count


@triton.jit
def _part(bounds, index, T, G, size, LEAST: tl.constexpr, GROUPS: tl.constexpr):
    """The part with this index, of at most ``size`` places: its adapter, its places from first to last, how many parts its
    adapter has (0: there is no such part), and where its sums lie among those of adapters with several parts."""
    adapter = tl.zeros((), tl.int32)
    first = tl.cast(index * size, tl.int32)
    last = tl.minimum(first + size, T)
    count = tl.maximum(tl.cast(tl.cdiv(T, size), tl.int32), LEAST)
    slot = tl.cast(index, tl.int32)
    if bounds is not None:
        adapter, first, last, count, slot = adapter, adapter, adapter, adapter, adapter
        before = tl.zeros((), tl.int32)
        slots = tl.zeros((), tl.int32)
        for block in range(0, G, GROUPS):
            g, begin, end, counts = _runs(bounds, block, G, size, LEAST, GROUPS)
            ends = before + tl.cumsum(counts)
            several = tl.where(counts > 1, counts, 0)
            kth = index - (ends - counts)
            mine = (kth >= 0) & (index < ends)  # of one adapter at most: sums pick its numbers
            adapter += tl.sum(tl.where(mine, g, 0))
            first += tl.sum(tl.where(mine, begin + kth * size, 0))
            last += tl.sum(tl.where(mine, tl.minimum(begin + (kth + 1) * size, end), 0))
            count += tl.sum(tl.where(mine, counts, 0))
            slot += tl.sum(tl.where(mine, slots + tl.cumsum(several) - several + kth, 0))
            before += tl.sum(counts)
            slots += tl.sum(several)
    return adapter, first, last, count, slot


@triton.jit
def _rows(order, place, inside):
    row = place
    if order is not None:
        row = tl.load(order + place, mask=inside, other=0)
    return row.to(tl.int64)


@triton.jit
def _tile(x, row, stride, inside, col, C):
    return tl.load(x + row[:, None] * stride + col[None, :], mask=inside[:, None] & (col < C)[None, :], other=0.0)


@triton.jit
def _factor(factor, adapter, col, rank, C, R: tl.constexpr, TURNED: tl.constexpr):
    """``[columns, ranks]`` of an adapter's A, or TURNED of its B; zero behind C and R."""
    at = factor + adapter.to(tl.int64) * C * R
    place = col[:, None] * R + rank[None, :] if TURNED else rank[None, :] * C + col[:, None]
    return tl.load(at + place, mask=(col < C)[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, threshold, row, col):
    """``[rows, columns]``: what dropout leaves; the mask of em3/ops/_dropout.py."""
    drawn = tl.load(seed)
    place = row.to(tl.uint32) * tl.full((), 0x85EBCA77, tl.uint32) + drawn.to(tl.uint32)
    across = col.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32) + (drawn >> 32).to(tl.uint32)
    return (_mixed(_mixed(place)[:, None] ^ across[None, :]) >> 8).to(tl.int32) >= threshold


@triton.jit
def _product(low, other, sums, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """``sums + low other`` of a float32 ``low``; see the module's docstring for the half types."""
    if HALF:
        high = (low.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 11 bits of TF32
        other = other.to(tl.float32)
        sums = tl.dot(low - high, other, sums, input_precision="tf32")
        return tl.dot(high, other, sums, input_precision="tf32")
    else:
        return tl.dot(low, other, sums, input_precision=PRECISION)


@triton.jit
def _low_rank(x, first_factor, second_factor, y, low, order, bounds, scaling, scalings, seed, kept, threshold, T, C, D, G,
              stride,
              R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
              TURNED: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``low [T, R]`` of the rows of x, in their order, and what follows from it added to ``y [T, D]``.

    The first factor is TURNED or the second one is. Dropout is on x, or BEHIND: on what is added to y.
    """
    HALF: tl.constexpr = x.dtype.element_ty != tl.float32
    adapter, first, last, _, _ = _part(bounds, tl.program_id(0), T, G, ROWS, 0, GROUPS)
    if first < last:
        place = first + tl.arange(0, ROWS)
        inside = place < last
        row = _rows(order, place, inside)
        rank = tl.arange(0, RANK)
        sums = tl.zeros((ROWS, RANK), tl.float32)
        for c in range(0, C, WIDTH):
            col = c + tl.arange(0, WIDTH)
            seen = _tile(x, row, stride, inside, col, C)
            if seed is not None and not BEHIND:
                seen = tl.where(_kept(seed, threshold, row, col), seen, 0.0).to(x.dtype.element_ty)
            sums = tl.dot(seen, _factor(first_factor, adapter, col, rank, C, R, TURNED), sums, input_precision=PRECISION)
        factor = scaling
        if scalings is not None:
            factor *= tl.load(scalings + adapter)
        if seed is not None and not BEHIND:
            factor *= kept
        sums *= factor
        if low is not None:
            at = low + place.to(tl.int64)[:, None] * R + rank[None, :]
            tl.store(at, sums, mask=inside[:, None] & (rank < R)[None, :])
        if y is not None:
            for d in range(0, D, WIDTH):
                col = d + tl.arange(0, WIDTH)
                other = tl.trans(_factor(second_factor, adapter, col, rank, D, R, not TURNED))
                more = _product(sums, other, tl.zeros((ROWS, WIDTH), tl.float32), HALF, PRECISION)
                if seed is not None and BEHIND:
                    more = tl.where(_kept(seed, threshold, row, col), more * kept, 0.0)
                had = _tile(y, row, D, inside, col, D).to(tl.float32)
                tl.store(y + row[:, None] * D + col[None, :], (had + more).to(y.dtype.element_ty),
                         mask=inside[:, None] & (col < D)[None, :])  # fmt: skip


@triton.jit
def _put(out, index, rank, col, C, value, R: tl.constexpr, TURNED: tl.constexpr):
    """``value [ranks, columns]`` as the factor with this index."""
    at = out + index.to(tl.int64) * C * R
    place = col[None, :] * R + rank[:, None] if TURNED else rank[:, None] * C + col[None, :]
    tl.store(at + place, value.to(out.dtype.element_ty), mask=(rank < R)[:, None] & (col < C)[None, :])


@triton.jit
def _collect(low, x, out, sums, order, bounds, seed, kept, threshold, T, C, G, stride, size, slices,
             R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
             TURNED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``low^T x`` of one part and a slice of columns: into ``out`` if it is its adapter's only one, else into ``sums``."""
    HALF: tl.constexpr = x.dtype.element_ty != tl.float32
    lane = tl.program_id(0) % slices
    adapter, first, last, count, slot = _part(bounds, tl.program_id(0) // slices, T, G, size, 1, GROUPS)
    rank = tl.arange(0, RANK)
    col = lane * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((RANK, WIDTH), tl.float32)
    for t in range(first, last, ROWS):
        place = t + tl.arange(0, ROWS)
        inside = place < last
        row = _rows(order, place, inside)
        seen = _tile(x, row, stride, inside, col, C)
        if seed is not None:
            seen = tl.where(_kept(seed, threshold, row, col), seen, 0.0).to(x.dtype.element_ty)
        left = _tile(low, place.to(tl.int64), R, inside, rank, R)
        total = _product(tl.trans(left), seen, total, HALF, PRECISION)
    if seed is not None:
        total *= kept
    if count == 1:
        _put(out, adapter, rank, col, C, total, R, TURNED)
    elif count > 1:
        _put(sums, slot, rank, col, C, total, R, False)


@triton.jit
def _add_up(sums, out, bounds, T, C, G, size, slices,
            R: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
            TURNED: tl.constexpr):  # fmt: skip
    """The gradient of an adapter of several parts, a slice of columns."""
    lane = tl.program_id(0) % slices
    adapter = tl.program_id(0) // slices
    count = tl.cdiv(T, size)
    slot = tl.zeros((), tl.int32)
    if bounds is not None:
        count = tl.cdiv(tl.load(bounds + adapter + 1) - tl.load(bounds + adapter), size)
        for block in range(0, adapter, GROUPS):
            _, _, _, counts = _runs(bounds, block, adapter, size, 1, GROUPS)
            slot += tl.sum(tl.where(counts > 1, counts, 0))
    if count > 1:
        rank = tl.arange(0, RANK)
        col = lane * WIDTH + tl.arange(0, WIDTH)
        inside = (rank < R)[:, None] & (col < C)[None, :]
        total = tl.zeros((RANK, WIDTH), tl.float32)
        for k in range(count):
            at = sums + tl.cast(slot + k, tl.int64) * C * R
            total += tl.load(at + rank[:, None] * C + col[None, :], mask=inside, other=0.0)
        _put(out, adapter, rank, col, C, total, R, TURNED)


def config(kernel: str, dtype: torch.dtype, r: int, even: bool) -> Config:
    """The table's tile for adapters of this rank."""
    rows = table("lora_linear")[kernel][("float32" if dtype == torch.float32 else "half") + ("" if even else ", odd")]
    return next(Config(*tile) for up_to, *tile in rows if r <= up_to)


def even(x: Tensor, *widths: int) -> bool:
    """Whether rows and factors may be read 16 bytes at a time; an address for every element takes many registers."""
    return all(n % 16 == 0 for n in (*widths, x.shape[1], x.stride(0), x.data_ptr()))


def fitted(tile: Config, t: int, g: int, device: torch.device) -> Config:
    """Lower tiles where there are few rows for each adapter, or for each multiprocessor."""
    mean = t // max(g, waves(device) // 2)
    return tile._replace(rows=min(tile.rows, max(16, 1 << max(0, mean.bit_length() - 1))))


def by_adapter(adapter: Tensor | None, offsets: Tensor | None, t: int, g: int) -> Rows:
    """An adapter outside ``0 .. G - 1`` is none; offsets are not trusted. Nothing here waits for the device."""
    if offsets is not None:
        return Rows(None, offsets.clamp(0, t).cummax(0).values.int())
    if adapter is None:
        return Rows(None, None)
    # Before and behind the adapters, the rows without one. Few bits: a sort of few steps.
    ordered, order = torch.sort(adapter.clamp(-1, g).to(torch.int16 if g < 2**15 else torch.int32), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(g + 1, dtype=ordered.dtype, device=ordered.device), out_int32=True)
    return Rows(order, bounds)


def low_rank(x: Tensor, factors: tuple[Tensor, Tensor], y: Tensor | None, rows: Rows, scaling: Scaling, mask: Mask | None, *,
             behind: bool, keep: bool) -> Tensor | None:  # fmt: skip
    """Adds the low-rank part of ``x [T, C]`` to ``y [T, D]``, which is contiguous; ``low [T, R]``, scaled, if it is to be kept.

    ``factors`` are A and B, contiguous, or, ``behind`` which the dropout then comes, B and A: for the gradient to x.
    """
    t, c = x.shape
    a, b = factors
    g, r, d = (a.shape[0], a.shape[2], b.shape[2]) if behind else (a.shape[0], a.shape[1], b.shape[1])
    tile = fitted(config("low_rank", x.dtype, r, even(x, d)), t, g, x.device)
    low = torch.empty(t, r, dtype=torch.float32, device=x.device) if keep else None
    tiles = _parts(rows, t, g, tile.rows, 0)
    if tiles:
        with on_device(x):
            _low_rank[(tiles,)](
                x, a, b, y, low, *rows, *scaling, *_drawn(mask), t, c, d, g, x.stride(0), TURNED=behind, BEHIND=behind,
                PRECISION=precision(), ROWS=tile.rows, **_options(tile, r, g),
            )  # fmt: skip
    return low


def collect(low: Tensor, x: Tensor, rows: Rows, like: Tensor, mask: Mask | None, *, turned: bool) -> Tensor:
    """``low^T x`` of each adapter, in the shape and dtype of ``like``: A ``[G, R, C]``, or ``turned``, B ``[G, C, R]``."""
    t, c = x.shape
    g, r = like.shape[0], low.shape[1]
    tile = config("collect", x.dtype, r, even(x))
    slices = cdiv(c, tile.width)
    # Parts as long as leaves two waves of programs with rows, and no shorter than two tiles.
    size = tile.rows * max(2, cdiv(t * slices, waves(x.device) * tile.rows))
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    # An adapter with several parts has more rows than `size`, and so at most twice as many parts as rows / size.
    sums = torch.empty(cdiv(2 * t, size), r, c, dtype=torch.float32, device=x.device)
    with on_device(x):
        _collect[(_parts(rows, t, g, size, 1) * slices,)](
            low, x, out, sums, *rows, *_drawn(mask), t, c, g, x.stride(0), size, slices, TURNED=turned, PRECISION=precision(),
            ROWS=tile.rows, **_options(tile, r, g),
        )  # fmt: skip
        _add_up[(g * slices,)](sums, out, rows.bounds, t, c, g, size, slices, TURNED=turned, **_options(tile, r, g))
    return out


def _options(tile: Config, r: int, g: int) -> dict[str, Any]:
    return dict(
        R=r, RANK=rank(r), WIDTH=tile.width, GROUPS=groups(g), num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS,
    )  # fmt: skip


def rank(r: int) -> int:
    """What a tile holds of it: tensor cores multiply 16 at a time."""
    return max(16, 1 << (r - 1).bit_length())


def groups(g: int) -> int:
    return min(MAX_GROUPS, 1 << (g - 1).bit_length())


def _parts(rows: Rows, t: int, g: int, size: int, least: int) -> int:
    """The most parts that there can be."""
    if rows.bounds is None:
        return max(least, cdiv(t, size))
    return t // size + (g if least else min(g, t))


def _drawn(mask: Mask | None) -> tuple[Tensor | None, float, int]:
    return (None, 1.0, 0) if mask is None else (mask.seed, mask.factor, mask.threshold)
