"""Device code that the two kinds of contrast share: split matrices, their products, logits and who is a candidate."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _power_below(x):
    """The power of two that ``x / 256`` has in front, and one over it; both normal numbers, whatever ``x`` is."""
    bits = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x0D800000), 0x71800000)  # 2^-100 to 2^100
    bits -= 0x04000000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """``x``, whose largest is under 512, as a sum of two numbers in float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _tile(base, at, row_in, first, V, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``first`` and on of ROWS rows from row ``at`` of ``base``, zero outside; where there is no base, nothing."""
    tile = None
    if base is not None:
        col = first + tl.arange(0, WIDTH)
        place = tl.arange(0, ROWS)[:, None] * V + col[None, :]
        tile = tl.load(base + tl.cast(at, tl.int64) * V + place, mask=row_in[:, None] & (col < V)[None, :], other=0.0)
    return tile


@triton.jit
def _product(a, a_low, b, b_low):
    """``a b`` of split matrices; the smaller terms first."""
    if a_low is not None:
        return tl.dot(a, b, tl.dot(a, b_low, tl.dot(a_low, b)))
    else:
        return tl.dot(a, b)


@triton.jit
def _products(a, a_low, a_at, a_in, b, b_low, b_at, b_in, V, A: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr):
    """``a b^T`` of A rows of ``a`` and B rows of ``b``, a chunk of V at a time."""
    out = tl.zeros((A, B), tl.float32)
    rest = tl.zeros((A, B), tl.float32)
    for first in range(0, V, CHUNK):
        left = _tile(a, a_at, a_in, first, V, A, CHUNK)
        right = _tile(b, b_at, b_in, first, V, B, CHUNK)
        out = tl.dot(left, tl.trans(right), out)
        if a_low is not None:
            rest = tl.dot(left, tl.trans(_tile(b_low, b_at, b_in, first, V, B, CHUNK)), rest)
            rest = tl.dot(_tile(a_low, a_at, a_in, first, V, A, CHUNK), tl.trans(right), rest)
    return out + rest


@triton.jit
def _transposed(tile):
    if tile is not None:
        tile = tl.trans(tile)
    return tile


@triton.jit
def _whole(base, at, row_in, V, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A tile of all columns, where these are taken at once; nothing where chunk by chunk."""
    tile = None
    if CHUNK == WIDTH:
        tile = _tile(base, at, row_in, 0, V, ROWS, WIDTH)
    return tile


@triton.jit
def _cosines(left, left_low, a, a_low, a_at, a_in, right, right_low, b, b_low, b_at, b_in, V, A: tl.constexpr, B: tl.constexpr,
             WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """``a b^T`` of a block of either, before their sizes: of what has been read, or a chunk of V at a time."""
    if CHUNK == WIDTH:
        cosine = _product(left, left_low, tl.trans(right), _transposed(right_low))
    else:
        cosine = _products(a, a_low, a_at, a_in, b, b_low, b_at, b_in, V, A, B, CHUNK)
    return cosine


@triton.jit
def _keys(ids, at, anchors, none: tl.constexpr):
    """What must differ between a row and its candidate: the items' numbers, or else the places."""
    key = at
    if ids is not None:
        key = tl.load(ids + at, mask=at < anchors, other=none)
    return key


@triton.jit
def _factor(scale):
    """The scale of logits to base 2, as a sum of two numbers in float32."""
    exact = tl.load(scale) * LOG2E
    high = exact.to(tl.float32)
    return high, (exact - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _scaled(cosine, high, low):
    """Logits rounded once, for the positive's is exact: a rounded scale would be between it and all the others, 5e-6 at 100.
    It costs a multiplication a logit, beside some fifteen operations and one or two exponentials."""
    return tl.fma(cosine, high, cosine * low)


@triton.jit
def _plus(s, offset, at, count, AXIS: tl.constexpr):
    """``s`` with the offsets of the candidates along an axis added, both in base 2."""
    if offset is not None:
        s += tl.expand_dims(tl.load(offset + at, mask=at < count, other=0.0) * LOG2E, AXIS)
    return s


@triton.jit
def _summed(ds, b, b_low):
    """``ds b``, the gradient to vectors from that to their logits and the vectors ``b`` beside them, split row by row."""
    power, one_over = _power_below(tl.max(tl.abs(ds), 1))
    large, small = _halves(ds * one_over[:, None])
    if b_low is not None:
        part = _product(large, small, b, b_low)
    else:
        part = tl.dot(large, b)
    return part * power[:, None]
