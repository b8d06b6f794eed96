"""``contrastive_loss`` of the kind "sigmoid" in Triton: each pair's softplus, from a matrix of logits that is never kept.

The matrix, its tiles, how programs share it and how float32 comes out of the tensor cores are those of
``contrastive_loss.py``. What differs is that a pair's loss depends on no other pair: the forward adds up and keeps no maxima,
without offsets one softplus serves both directions, and the backward reads nothing that the forward has made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contrastive_loss as infonce
from .contrastive_device import _cosines, _factor, _keys, _plus, _summed, _tile, _whole
from .contrastive_loss import Sheet


@triton.jit
def _softplus(z):
    """``log(1 + 2^z)``, to a relative error of 3e-7, so that a small loss keeps its digits; exactly 0 for -inf. The polynomial
    is the compiled kernel's: a GPU's own logarithm near 1 is right to 2^-22 of 1 and no better."""
    t = tl.exp2(-tl.abs(z))
    y = tl.fma(t, -3.25637848e-3, 1.99071609e-2)
    y = tl.fma(y, t, -5.70642008e-2)
    y = tl.fma(y, t, 1.06142647e-1)
    y = tl.fma(y, t, -1.53118631e-1)
    y = tl.fma(y, t, 1.96781173e-1)
    y = tl.fma(y, t, -2.49545589e-1)
    y = tl.fma(y, t, 3.3330004e-1)
    y = tl.fma(y, t, -4.9999904e-1)
    y = tl.fma(y, t, 1.0)
    return tl.fma(y, t, tl.maximum(z, 0.0) * 0.693147181)


@triton.jit
def _loss(z, sign):
    """Of pairs with the logits ``z`` to base 2, of which those with the sign -1 are positive."""
    if sign is not None:
        z *= sign
    return _softplus(z)


@triton.jit
def _slope(z, sign):
    """How the loss changes with the logit; exactly 0 for -inf."""
    if sign is not None:
        slope = sign / (1.0 + tl.exp2(-z * sign))
    else:
        slope = 1.0 / (1.0 + tl.exp2(-z))
    return slope


@triton.jit
def _biased(cosine, high, low, bias, bias_low):
    """Logits to base 2, of which scale and bias are two numbers of float32 each: where they cancel, nothing is lost before."""
    return tl.fma(cosine, high, bias) + tl.fma(cosine, low, bias_low)


@triton.jit
def _pairs(row_in, col_in, i, j, row_key, col_key, OWN: tl.constexpr, IDS: tl.constexpr, POSITIVE: tl.constexpr):
    """Which logits are pairs: no row is one with itself, and none with its item where such pairs are not positive."""
    pair = row_in[:, None] & col_in[None, :]
    if POSITIVE:
        if OWN:
            pair = pair & (i[:, None] != j[None, :])
    elif OWN or IDS:
        pair = pair & (row_key[:, None] != col_key[None, :])
    return pair


@triton.jit
def _signs(pair, row_key, col_key, POSITIVE: tl.constexpr):
    """-1 where a pair is positive, else 1; nothing where none ever is."""
    sign = None
    if POSITIVE:
        sign = tl.where(pair & (row_key[:, None] == col_key[None, :]), -1.0, 1.0)
    return sign


@triton.jit
def _sums(x, x_low, x_size, y, y_low, y_size, scale, bias, row_ids, col_ids, row_offset, col_offset, rows, cols, B, N, M, V,
          row_share, col_share, groups, splits,
          OWN: tl.constexpr, POSITIVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
          CHUNK: tl.constexpr):  # fmt: skip
    """``rows [splits, B]`` and ``cols [groups, N]``, the sums over each program's pairs."""
    pid = tl.program_id(0)
    group = pid // splits
    split = pid % splits
    high, low = _factor(scale)
    added, added_low = _factor(bias)
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
        row_key = _keys(row_ids, i, B, -1)
        total = tl.zeros((ROWS,), tl.float32)
        for c in range(first_col, last_col, COLS):
            j = c + tl.arange(0, COLS)
            col_in = j < M
            right = _whole(y, c, col_in, V, COLS, WIDTH, CHUNK)
            right_low = _whole(y_low, c, col_in, V, COLS, WIDTH, CHUNK)
            cosine = _cosines(
                left, left_low, x, x_low, r, row_in, right, right_low, y, y_low, c, col_in, V, ROWS, COLS, WIDTH, CHUNK
            )
            cosine = cosine * row_size[:, None] * tl.load(y_size + j, mask=col_in, other=0.0)[None, :]
            col_key = _keys(col_ids, j, N, -2)
            pair = _pairs(row_in, col_in, i, j, row_key, col_key, OWN, row_ids is not None, POSITIVE)
            sign = _signs(pair, row_key, col_key, POSITIVE)
            z = tl.where(pair, _biased(cosine, high, low, added, added_low), float("-inf"))
            if rows is not None or row_offset is None:
                losses = _loss(_plus(z, col_offset, j, M, 0), sign)
            if rows is not None:
                total += tl.sum(losses, 1)
            if cols is not None:
                if row_offset is not None:
                    losses = _loss(_plus(z, row_offset, i, B, 1), sign)
                place = cols + col_at + j
                later = j < tl.where(tl.cast(r, tl.int32) > first_row, N, 0)
                before = tl.load(place, mask=later, other=0.0)
                tl.store(place, before + tl.sum(losses, 0), mask=j < N)
        if rows is not None:
            tl.store(rows + row_at + i, total, mask=row_in)
        tl.debug_barrier()  # the next block of rows goes on with what other threads have stored of the columns


@triton.jit
def _weights(grad, at, anchors, AXIS: tl.constexpr):
    """The gradients to the sums along an axis."""
    return tl.expand_dims(tl.load(grad + at, mask=at < anchors, other=0.0), AXIS)


@triton.jit
def _gradient(a, a_low, a_size, b, b_low, b_size, scale, bias, a_ids, b_ids, a_offset, b_offset, a_grad, b_grad,
              da, dscale, dbias, doffset, A, A_ANCHORS, B, B_ANCHORS, V, slices, splits, share,
              OWN: tl.constexpr, POSITIVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """Of a block of ``a`` against a part of ``b``: ``da [splits, A, V]``, and the rows' shares of ``dscale``, ``dbias`` and
    ``doffset``, ``[splits, A]``."""
    pid = tl.program_id(0)
    lane = pid % slices
    split = pid // slices % splits
    r = pid // slices // splits * ROWS
    i = r + tl.arange(0, ROWS)
    row_in = i < A
    high, low = _factor(scale)
    added, added_low = _factor(bias)
    left = _whole(a, r, row_in, V, ROWS, WIDTH, CHUNK)
    left_low = _whole(a_low, r, row_in, V, ROWS, WIDTH, CHUNK)
    row_size = tl.load(a_size + i, mask=row_in, other=0.0)
    row_key = _keys(a_ids, i, A_ANCHORS, -1)
    grad = tl.zeros((ROWS, WIDTH), tl.float32)
    to_scale = tl.zeros((ROWS,), tl.float32)
    to_bias = tl.zeros((ROWS,), tl.float32)
    to_offset = tl.zeros((ROWS,), tl.float32)
    for c in range(split * share, tl.minimum((split + 1) * share, B), COLS):
        j = c + tl.arange(0, COLS)
        col_in = j < B
        right = _tile(b, c, col_in, lane * WIDTH, V, COLS, WIDTH)
        right_low = _tile(b_low, c, col_in, lane * WIDTH, V, COLS, WIDTH)
        cosine = _cosines(left, left_low, a, a_low, r, row_in, right, right_low, b, b_low, c, col_in, V, ROWS, COLS, WIDTH, CHUNK)
        col_size = tl.load(b_size + j, mask=col_in, other=0.0)
        cosine = cosine * row_size[:, None] * col_size[None, :]
        col_key = _keys(b_ids, j, B_ANCHORS, -2)
        pair = _pairs(row_in, col_in, i, j, row_key, col_key, OWN, a_ids is not None, POSITIVE)
        sign = _signs(pair, row_key, col_key, POSITIVE)
        z = tl.where(pair, _biased(cosine, high, low, added, added_low), float("-inf"))
        ds = tl.zeros((ROWS, COLS), tl.float32)
        if a_offset is None:
            if a_grad is not None:
                ds += _weights(a_grad, i, A_ANCHORS, 1)
            if b_grad is not None:
                ds += _weights(b_grad, j, B_ANCHORS, 0)
            ds *= _slope(z, sign)
        else:
            if a_grad is not None:
                ds += _weights(a_grad, i, A_ANCHORS, 1) * _slope(_plus(z, b_offset, j, B, 0), sign)
            if b_grad is not None:
                across = _weights(b_grad, j, B_ANCHORS, 0) * _slope(_plus(z, a_offset, i, A, 1), sign)
                ds += across
                if doffset is not None:
                    to_offset += tl.sum(across, 1)
        if dscale is not None:
            to_scale += tl.sum(ds * cosine, 1)
        if dbias is not None:
            to_bias += tl.sum(ds, 1)
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
        if dbias is not None:
            tl.store(dbias + out, to_bias, mask=row_in)
        if doffset is not None:
            tl.store(doffset + out, to_offset, mask=row_in)


def sums(sheet: Sheet, bias: Tensor, positive: bool, rows: bool, cols: bool) -> tuple[Tensor, Tensor]:
    """The sums of the rows' pairs, ``[B]``, and of the columns', ``[N]``, in float64; empty where not asked for.

    ``bias`` is ``[]``, float64; ``positive`` whether pairs of one item are positive, or none.
    """
    vectors = sheet.cols.vectors.high
    tile = infonce.config("statistics", vectors.shape[1], vectors.device, "contrastive_sigmoid")
    given = (bias, sheet.rows.ids, sheet.cols.ids, sheet.rows.offset, sheet.cols.offset)
    positive = positive and sheet.rows.ids is not None
    of_both = infonce.over_rectangles(_sums, tile, sheet, given, (), rows, cols, POSITIVE=positive)
    row, col = (sheet.scale.new_empty(0) if t is None else t.sum(0, dtype=torch.float64) for t in of_both)
    return row, col


def gradient(sheet: Sheet, bias: Tensor, positive: bool, drow: Tensor | None, dcol: Tensor | None,
             need: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients to the rows' vectors ``[A, V]``, to the scale and the bias (the rows' shares of them, ``[A]``) and to the rows'
    offsets ``[A]``.

    ``drow`` and ``dcol`` are the gradients to the sums, None for a direction without one. The gradients to the columns come
    from the sheet with its sides exchanged.
    """
    positive = positive and sheet.rows.ids is not None
    kernel, vectors = "gradient_positive" if positive else "gradient", sheet.cols.vectors.high
    tile = infonce.config(kernel, vectors.shape[1], vectors.device, "contrastive_sigmoid")
    given = (bias, sheet.rows.ids, sheet.cols.ids, sheet.rows.offset, sheet.cols.offset, drow, dcol)
    return infonce.over_blocks(_gradient, tile, sheet, given, need, POSITIVE=positive)
