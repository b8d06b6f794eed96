"""``contrastive_loss`` in Triton: the matrix of logits ``S = scale x y^T``, made tile by tile and never kept.

Forward: a program has a rectangle of the matrix, some blocks of rows against some tiles of columns. Each tile gives its
share of both statistics: rows keep theirs in registers while their block meets the columns, columns keep theirs in the
program's own place in memory, from one block of rows to the next. What the rectangles found is joined afterwards, in
order. About as many rectangles as the GPU runs programs, and nearly square, so that this costs a few numbers a row.

Backward: one kernel, launched for the rows and, with x and y exchanged, for the columns. A program makes the logits of one
block against the others again, adds up the gradient to the block in registers, and beside it what the scale and the
offsets need. Nothing is added atomically: the same inputs give the same bits.

Two forms, chosen by CHUNK. With CHUNK == WIDTH all V columns of the embeddings fit in WIDTH: a tile is read once and serves
both products. With CHUNK < WIDTH logits are summed over chunks of V, and a program of the backward sums only its slice of
WIDTH columns.

float32 comes out of the tensor cores. A vector is split once into two numbers of float16 an element, under a power of two
of its own: ``x = size (high + low)``, which keeps 22 bits. Three products of these give one of float32 (``low low`` is
beneath it); where torch allows TF32, whose 11 bits ``high`` has too, the first of them stands for it. The tensor cores cut
off what they add up, so large sums leave them after every tile, and small products are summed before large ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_device import _cosines, _factor, _halves, _keys, _plus, _power_below, _scaled, _summed, _tile, _whole
from .launch import REGISTERS, cdiv, on_device, table, waves

STEP = 16  # what V is a multiple of


class Split(NamedTuple):
    """Vectors for the tensor cores; V is padded with zeros to a multiple of 16."""

    high: Tensor  # [A, V] float16
    low: Tensor | None  # [A, V] float16; None for products in TF32
    size: Tensor  # [A] float32


class Side(NamedTuple):
    """The rows or the columns of the matrix."""

    vectors: Split
    ids: Tensor | None  # [N] int32, 0 or more
    offset: Tensor | None  # [A]
    anchors: int  # N <= A: those that have a statistic and an id


class Sheet(NamedTuple):
    """The matrix of logits that is never formed."""

    rows: Side
    cols: Side
    scale: Tensor  # [] float64
    own: bool  # whether row i is column i


class Config(NamedTuple):
    """The tile of one kernel; see the module's docstring."""

    rows: int
    cols: int
    width: int
    chunk: int
    warps: int
    stages: int


SPLIT = Config(rows=8, cols=0, width=128, chunk=128, warps=4, stages=1)  # it has one side only


@triton.jit
def _split(x, high, low, size, A, C, stride, V, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``[A, C]`` that lie ``stride`` apart, split."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    top = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, WIDTH):
        col = first + tl.arange(0, WIDTH)
        seen = tl.load(x + i[:, None] * stride + col[None, :], mask=(i < A)[:, None] & (col < C)[None, :], other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(seen), 1))
    power, one_over = _power_below(top)
    tl.store(size + i, power, mask=i < A)
    for first in range(0, V, WIDTH):
        col = first + tl.arange(0, WIDTH)
        seen = tl.load(x + i[:, None] * stride + col[None, :], mask=(i < A)[:, None] & (col < C)[None, :], other=0.0)
        large, small = _halves(seen * one_over[:, None])
        place, inside = i[:, None] * V + col[None, :], (i < A)[:, None] & (col < V)[None, :]
        tl.store(high + place, large, mask=inside)
        if low is not None:
            tl.store(low + place, small, mask=inside)


@triton.jit
def _merged(top, total, s, AXIS: tl.constexpr):
    """Largest logits and sums of exponentials beneath them, after those of a tile have come to them."""
    new = tl.maximum(top, tl.max(s, AXIS))
    safe = tl.where(new == float("-inf"), 0.0, new)  # no candidate so far: every term is exp(-inf) = 0
    return new, total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - tl.expand_dims(safe, AXIS)), AXIS)


@triton.jit
def _statistics(x, x_low, x_size, y, y_low, y_size, scale, row_ids, col_ids, row_offset, col_offset, rows, cols, B, N, M, V,
                row_share, col_share, groups, splits,
                OWN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """``rows [2, splits, B]`` and ``cols [2, groups, N]``, the largest logits and the sums beneath them, in base 2."""
    pid = tl.program_id(0)
    group = pid // splits
    split = pid % splits
    high, low = _factor(scale)
    row_at = split.to(tl.int64) * B
    col_at = group.to(tl.int64) * N
    first_row = group * row_share
    first_col = split * col_share
    last_row = tl.minimum(first_row + row_share, B)
    last_col = tl.minimum(first_col + col_share, M)
    for r in range(first_row, last_row, ROWS):
        i = r + tl.arange(0, ROWS)
        row_in = i < B
        left = _whole(x, r, row_in, V, ROWS, WIDTH, CHUNK)
        left_low = _whole(x_low, r, row_in, V, ROWS, WIDTH, CHUNK)
        row_size = tl.load(x_size + i, mask=row_in, other=0.0)
        row_high, row_low = row_size * high, row_size * low
        row_key = _keys(row_ids, i, B, -1)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for c in range(first_col, last_col, COLS):
            j = c + tl.arange(0, COLS)
            col_in = j < M
            right = _whole(y, c, col_in, V, COLS, WIDTH, CHUNK)
            right_low = _whole(y_low, c, col_in, V, COLS, WIDTH, CHUNK)
            s = _cosines(
                left, left_low, x, x_low, r, row_in, right, right_low, y, y_low, c, col_in, V, ROWS, COLS, WIDTH, CHUNK
            )
            s = s * tl.load(y_size + j, mask=col_in, other=0.0)[None, :]
            s = _scaled(s, row_high[:, None], row_low[:, None])
            apart = row_in[:, None] & col_in[None, :]
            if OWN or row_ids is not None:
                apart = apart & (row_key[:, None] != _keys(col_ids, j, N, -2)[None, :])
            s = tl.where(apart, s, float("-inf"))
            if rows is not None:
                top, total = _merged(top, total, _plus(s, col_offset, j, M, 0), 1)
            if cols is not None:
                anchor = j < N
                later = j < tl.where(tl.cast(r, tl.int32) > first_row, N, 0)
                place = cols + col_at + j
                other = place + tl.cast(groups, tl.int64) * N
                col_top = tl.load(place, mask=later, other=float("-inf"))
                col_total = tl.load(other, mask=later, other=0.0)
                col_top, col_total = _merged(col_top, col_total, _plus(s, row_offset, i, B, 1), 0)
                tl.store(place, col_top, mask=anchor)
                tl.store(other, col_total, mask=anchor)
        if rows is not None:
            tl.store(rows + row_at + i, top, mask=row_in)
            tl.store(rows + row_at + tl.cast(splits, tl.int64) * B + i, total, mask=row_in)
        tl.debug_barrier()  # the next block of rows goes on with what other threads have stored of the columns


@triton.jit
def _share(s, lse, grad, at, anchors, AXIS: tl.constexpr):
    """The gradient to the logits ``s`` (offsets added) through the statistics along an axis."""
    level = tl.load(lse + at, mask=at < anchors, other=float("inf"))
    weight = tl.load(grad + at, mask=at < anchors, other=0.0)
    return tl.expand_dims(weight, AXIS) * tl.exp2(s - tl.expand_dims(level, AXIS))


@triton.jit
def _gradient(a, a_low, a_size, b, b_low, b_size, scale, a_ids, b_ids, a_offset, b_offset, a_lse, b_lse, a_grad, b_grad,
              da, dscale, doffset, A, A_ANCHORS, B, B_ANCHORS, V, slices, splits, share,
              OWN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """Of a block of ``a`` against a part of ``b``: ``da [splits, A, V]``, and the rows' shares ``dscale, doffset [splits, A]``."""
    pid = tl.program_id(0)
    lane = pid % slices
    split = pid // slices % splits
    r = pid // slices // splits * ROWS
    i = r + tl.arange(0, ROWS)
    row_in = i < A
    high, low = _factor(scale)
    left = _whole(a, r, row_in, V, ROWS, WIDTH, CHUNK)
    left_low = _whole(a_low, r, row_in, V, ROWS, WIDTH, CHUNK)
    row_size = tl.load(a_size + i, mask=row_in, other=0.0)
    row_key = _keys(a_ids, i, A_ANCHORS, -1)
    grad = tl.zeros((ROWS, WIDTH), tl.float32)
    to_scale = tl.zeros((ROWS,), tl.float32)
    to_offset = tl.zeros((ROWS,), tl.float32)
    for c in range(split * share, tl.minimum((split + 1) * share, B), COLS):
        j = c + tl.arange(0, COLS)
        col_in = j < B
        right = _tile(b, c, col_in, lane * WIDTH, V, COLS, WIDTH)
        right_low = _tile(b_low, c, col_in, lane * WIDTH, V, COLS, WIDTH)
        cosine = _cosines(left, left_low, a, a_low, r, row_in, right, right_low, b, b_low, c, col_in, V, ROWS, COLS, WIDTH, CHUNK)
        col_size = tl.load(b_size + j, mask=col_in, other=0.0)
        cosine = cosine * row_size[:, None] * col_size[None, :]
        apart = row_in[:, None] & col_in[None, :]
        if OWN or a_ids is not None:
            apart = apart & (row_key[:, None] != _keys(b_ids, j, B_ANCHORS, -2)[None, :])
        s = tl.where(apart, _scaled(cosine, high, low), float("-inf"))
        ds = tl.zeros((ROWS, COLS), tl.float32)
        if a_lse is not None:
            ds += _share(_plus(s, b_offset, j, B, 0), a_lse, a_grad, i, A_ANCHORS, 1)
        if b_lse is not None:
            across = _share(_plus(s, a_offset, i, A, 1), b_lse, b_grad, j, B_ANCHORS, 0)
            ds += across
            if doffset is not None:
                to_offset += tl.sum(across, 1)
        if dscale is not None:
            to_scale += tl.sum(ds * cosine, 1)
        if da is not None:
            grad += _summed(ds * col_size[None, :], right, right_low)
    out = split.to(tl.int64) * A + i
    if da is not None:
        col = lane * WIDTH + tl.arange(0, WIDTH)
        grad = grad * tl.load(scale).to(tl.float32)
        tl.store(da + out[:, None] * V + col[None, :], grad, mask=row_in[:, None] & (col < V)[None, :])
    if lane == 0:
        if dscale is not None:
            tl.store(dscale + out, to_scale, mask=row_in)
        if doffset is not None:
            tl.store(doffset + out, to_offset, mask=row_in)


def architecture(device: torch.device) -> str:
    """The part of the table for a GPU. Those of a generation's smaller chips have the shared memory of 8.6."""
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found in ((9, 0), (10, 0)):
            return f"sm_{found[0]}{found[1]}"
    return "sm_80"


def config(kernel: str, v: int, device: torch.device, op: str = "contrastive_loss") -> Config:
    """The tile for embeddings of this width, of the table of either kind."""
    rows = table(op)[architecture(device)][kernel]
    return next(Config(*tile) for up_to, *tile in rows if up_to is None or v <= up_to)


def rectangles(tile: Config, b: int, m: int, device: torch.device) -> tuple[int, int, int, int]:
    """How many rows and columns of the matrix ``[b, m]`` a program has, and into how many groups these come."""
    row_blocks, col_blocks = cdiv(b, tile.rows), cdiv(m, tile.cols)
    aim = waves(device)
    splits = max(1, min(col_blocks, max(math.isqrt(aim), cdiv(aim, max(1, row_blocks)))))
    groups = max(1, min(row_blocks, cdiv(aim, splits)))
    row_share, col_share = cdiv(row_blocks, groups), cdiv(col_blocks, splits)  # in blocks
    # None without work.
    return row_share * tile.rows, col_share * tile.cols, cdiv(row_blocks, row_share), cdiv(col_blocks, col_share)


def parts(tile: Config, a: int, m: int, v: int, device: torch.device) -> tuple[int, int, int, int]:
    """Of a gradient ``[a, v]``: blocks of rows, slices of columns, programs that share these, and the columns of the matrix
    that each of them has."""
    blocks, slices, col_blocks = cdiv(a, tile.rows), cdiv(v, tile.width), cdiv(m, tile.cols)
    splits = max(1, min(cdiv(waves(device), max(1, blocks * slices)), col_blocks))
    share = cdiv(col_blocks, splits)
    return blocks, slices, cdiv(col_blocks, share), share * tile.cols


def split(vectors: Tensor) -> Split:
    """float32 ``[A, C]`` for the tensor cores."""
    a, c = vectors.shape
    vectors = vectors if vectors.stride(1) == 1 else vectors.contiguous()
    v = cdiv(c, STEP) * STEP
    high, low = (torch.empty(a, v, dtype=torch.float16, device=vectors.device) for _ in range(2))
    size = torch.empty(a, dtype=torch.float32, device=vectors.device)
    coarse = torch.backends.cuda.matmul.allow_tf32
    with on_device(vectors):
        _split[(cdiv(a, SPLIT.rows),)](
            vectors, high, None if coarse else low, size, a, c, vectors.stride(0), v, ROWS=SPLIT.rows, WIDTH=SPLIT.width,
            num_warps=SPLIT.warps, num_stages=SPLIT.stages, maxnreg=REGISTERS,
        )  # fmt: skip
    return Split(high, None if coarse else low, size)


def over_rectangles(kernel: Any, tile: Config, sheet: Sheet, given: Sequence[Tensor | None], numbers: tuple[int, ...],
                    rows: bool, cols: bool, **constants: bool) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What a forward kernel finds in each rectangle of the matrix: ``[*numbers, splits, B]`` and ``[*numbers, groups, N]``, None
    where not asked for. ``given`` is what it reads beside the sheet's vectors and scale."""
    (x, _, _, b), (y, _, _, n) = sheet.rows, sheet.cols
    m, v = y.high.shape
    device = x.high.device
    row_share, col_share, groups, splits = rectangles(tile, b, m, device)
    of_rows, of_cols = (
        torch.empty(*numbers, parts, count, dtype=torch.float32, device=device) if asked else None
        for parts, count, asked in ((splits, b, rows), (groups, n, cols and n > 0))
    )
    if of_rows is not None or of_cols is not None:
        with on_device(x.high):
            kernel[(groups * splits,)](
                *x, *y, sheet.scale, *given, of_rows, of_cols, b, n, m, v, row_share, col_share, groups, splits,
                OWN=sheet.own, **constants, **options(tile),
            )  # fmt: skip
    return of_rows, of_cols


def statistics(sheet: Sheet, rows: bool, cols: bool) -> tuple[Tensor, Tensor]:
    """The logsumexps of the rows, ``[B]``, and of the columns, ``[N]``, in float64; empty where not asked for."""
    vectors = sheet.cols.vectors.high
    tile = config("statistics", vectors.shape[1], vectors.device)
    given = (sheet.rows.ids, sheet.cols.ids, sheet.rows.offset, sheet.cols.offset)
    of_both = over_rectangles(_statistics, tile, sheet, given, (2,), rows, cols)
    row, col = (sheet.scale.new_empty(0) if found is None else _joined(*found) for found in of_both)
    return row, col


def _joined(top: Tensor, total: Tensor) -> Tensor:
    """``[P, A]`` both -> the logsumexp ``[A]``, in float64: one number of float32 near 100 is off by 4e-6."""
    whole = top.amax(0)
    total = (total * (top - whole.clamp(min=torch.finfo(top.dtype).min)).exp2_()).sum(0)
    return (whole.double() + total.double().log2_()) * math.log(2)  # -inf + log(0) = -inf for no candidate


def over_blocks(kernel: Any, tile: Config, sheet: Sheet, given: Sequence[Tensor | None], need: Sequence[bool],
                **constants: bool) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What a backward kernel adds up for the rows: ``[A, V]`` and then ``[A]`` each, None where not needed."""
    (x, _, _, b), (y, _, _, n) = sheet.rows, sheet.cols
    (a, v), m = x.high.shape, y.high.shape[0]
    device = x.high.device
    blocks, slices, splits, share = parts(tile, a, m, v, device)
    sizes = ((splits, a, v), *[(splits, a)] * (len(need) - 1))
    out = [torch.empty(size, dtype=torch.float32, device=device) if t else None for size, t in zip(sizes, need, strict=True)]
    with on_device(x.high):
        kernel[(blocks * splits * slices,)](
            *x, *y, sheet.scale, *given, *out, a, b, m, n, v, slices, splits, share, OWN=sheet.own, **constants,
            **options(tile),
        )  # fmt: skip
    # What the programs found that share a block of rows, one after the other.
    return tuple(None if t is None else t[0] if t.shape[0] == 1 else t.sum(0) for t in out)


def gradient(sheet: Sheet, row: Tensor | None, col: Tensor | None, drow: Tensor | None, dcol: Tensor | None,
             need: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients to the rows' vectors ``[A, V]``, to the scale (the rows' shares of it, ``[A]``) and to the rows' offsets ``[A]``.

    ``drow`` and ``dcol`` are the gradients to the statistics ``row`` and ``col``, None for a direction without one. The
    gradients to the columns come from the sheet with its sides exchanged.
    """
    vectors = sheet.cols.vectors.high
    tile = config("gradient", vectors.shape[1], vectors.device)
    (row, drow), (col, dcol) = (
        (None, None) if d is None or t is None else _levels(t, d) for t, d in ((row, drow), (col, dcol))
    )
    given = (sheet.rows.ids, sheet.cols.ids, sheet.rows.offset, sheet.cols.offset, row, col, drow, dcol)
    return over_blocks(_gradient, tile, sheet, given, need)


def _levels(lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexps to base 2 in float32, and the gradients to them times the power of 2 that rounding has left out: there
    it costs nothing for each logit."""
    exact = (lse * math.log2(math.e)).clamp(min=-(2.0**100))  # no candidate: 0 of every logit, not NaN
    level = exact.float()
    return level, grad * (level - exact).exp2_().float()


def options(tile: Config) -> dict[str, Any]:
    return dict(
        ROWS=tile.rows, COLS=tile.cols, WIDTH=tile.width, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=REGISTERS,
    )  # fmt: skip
