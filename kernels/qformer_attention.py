"""``qformer_attention`` in Triton: rows of absorbed queries attend over raw tokens, one stream a launch.

``lora_target_attention`` is the same with tokens that are looked up, rows of a bank by their numbers, and with biases, a
number for each place and head that is added to the scores.

``R = H * Q`` rows of ``u`` read an item's tokens ``x``; row ``r = (h, q)`` has the score ``s = u[r] . x[t] + c[r]``. Every
stream is read under a softmax of its own here, and so is every part of the tokens that an item is cut into; the
caller joins them by their logsumexps. A program holds ROWS rows and, in float32 registers, ROWS x WIDTH sums.

Two forms, chosen by CHUNK. With CHUNK == WIDTH a tile of tokens ``[TOKENS, WIDTH]`` is read once and serves both
products; all C columns fit in WIDTH. With CHUNK < WIDTH scores are summed over chunks of C, and a program sums only
its slice of WIDTH columns, so any C will do; a tile comes out of the cache again, and scores are computed once a slice.

C and the strides of the tokens are passed in units of UNIT = 8 columns where they have that divisor: so the compiler
knows that it may load 16 bytes at a time, and needs no address for every element. Other tokens have a small tile.

Nothing is added atomically: the same inputs give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# All that a thread can have: where the assembler chooses, it may spill a few for the sake of more programs at a time.
REGISTERS = 255
LOG2E = tl.constexpr(1.4426950408889634)


class Stream(NamedTuple):
    """The tokens of one stream: padded ``[B, N, C]`` or, with offsets, jagged ``[T, C]``; columns lie side by side.

    With ``lookup`` the tokens are rows of a bank ``values [n, C]``, which may be of another dtype than the queries.
    """

    values: Tensor
    offsets: Tensor | None  # [B + 1] int64
    mask: Tensor | None  # [B, N] bool, True = a real token
    lookup: Tensor | None = None  # [B, N] or [T] int64; a number outside the bank is no token
    bias: Tensor | None = None  # [B, N, H] or [T, H] float32, contiguous

    @property
    def places(self) -> torch.Size:
        """``[B, N]`` or ``[T]``."""
        return self.values.shape[:-1] if self.lookup is None else self.lookup.shape


class Config(NamedTuple):
    """The tile of one kernel; see the module's docstring."""

    rows: int
    tokens: int
    width: int
    chunk: int
    warps: int
    stages: int


@triton.jit
def _span(offsets, item, part, parts, tokens, TOKENS: tl.constexpr):
    """Row of the item's first token, and which of its tokens are this part's. Offsets are not trusted."""
    begin = tl.zeros((), tl.int64)
    length = tokens
    if offsets is not None:
        begin = tl.minimum(tl.maximum(tl.load(offsets + item).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.load(offsets + item + 1).to(tl.int64), tokens)
        length = tl.maximum(end - begin, 0).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, TOKENS), parts) * TOKENS
    first = tl.minimum(part * share, length)
    return begin, first, tl.minimum(first + share, length)


@triton.jit
def _present(mask, at, token, last):
    inside = token < last
    if mask is not None:
        inside = inside & (tl.load(mask + at + token, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _placed(base, lookup, bank, at, t, step, stride, inside):
    """The tokens of a tile: behind which address, in which rows, and whether they are there."""
    here = base + tl.cast(t, tl.int64) * stride
    row = step
    if lookup is not None:
        here = base
        row = tl.load(lookup + at + t + step, mask=inside, other=-1)
        inside = inside & (row >= 0) & (row < bank)
    return here, row, inside


@triton.jit
def _tile(base, row, stride, col, inside, C):
    """Rows ``row`` and columns ``col`` behind ``base``, zero outside: what lies there may be NaN."""
    return tl.load(base + row[:, None] * stride + col[None, :], mask=inside[:, None] & (col < C)[None, :], other=0.0)


@triton.jit
def _biases(bias, at, step, head, heads, inside):
    """Of the places ``at + step`` and of ``head``, which broadcast to a tile of scores; where nothing is there it may be NaN."""
    return tl.load(bias + at * heads + (step * heads + head), mask=inside, other=0.0)


@triton.jit
def _product(a, a_row, a_stride, a_in, b, b_row, b_stride, b_in, C,
             A: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
             TYPE: tl.constexpr):  # fmt: skip
    """``a b^T`` over all C columns, a chunk at a time, in dtype TYPE."""
    out = tl.zeros((A, B), tl.float32)
    for first in range(0, C, CHUNK):
        col = first + tl.arange(0, CHUNK)
        left = _tile(a, a_row, a_stride, col, a_in, C)
        right = _tile(b, b_row, b_stride, col, b_in, C)
        out = tl.dot(left.to(TYPE), tl.trans(right.to(TYPE)), out, input_precision=PRECISION)
    return out


@triton.jit
def _forward(u, c, x, offsets, mask, lookup, bias, y, lse, batch, tokens, bank, x_item, x_token, C, Q, R, groups, slices,
             parts,
             PER_ITEM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
             CHUNK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``y [parts, H, B, Q, C]`` and ``lse [parts, H, B, Q]`` of one group of rows, one item, one part, one slice."""
    C, x_item, x_token = C * UNIT, x_item * UNIT, x_token * UNIT
    # Groups and slices of one item come one after the other, so that its tokens are in the L2 cache.
    pid = tl.program_id(0)
    group = pid % groups
    lane = pid // groups % slices
    part = pid // groups // slices % parts
    item = pid // groups // slices // parts
    r = group * ROWS + tl.arange(0, ROWS)
    row_in = r < R
    item_row = ((r // Q).to(tl.int64) * batch + item) * Q + r % Q
    u_row = item_row if PER_ITEM else r.to(tl.int64)
    col = lane * WIDTH + tl.arange(0, WIDTH)
    step = tl.arange(0, TOKENS)

    begin, first, last = _span(offsets, item, part, parts, tokens, TOKENS)
    at = begin if offsets is not None else item.to(tl.int64) * tokens
    base = x
    if lookup is None:
        base = x + (begin * x_token if offsets is not None else item.to(tl.int64) * x_item)
    if CHUNK == WIDTH:
        rows = _tile(u, u_row, C, col, row_in, C)
    shift = tl.zeros((ROWS,), tl.float32)
    if c is not None:
        shift = tl.load(c + u_row, mask=row_in, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    read = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in range(first, last, TOKENS):
        inside = _present(mask, at, t + step, last)
        here, place, inside = _placed(base, lookup, bank, at, t, step, x_token, inside)
        seen = _tile(here, place, x_token, col, inside, C).to(u.dtype.element_ty)
        if CHUNK == WIDTH:
            s = tl.dot(rows, tl.trans(seen), input_precision=PRECISION)
        else:
            s = _product(u, u_row, C, row_in, here, place, x_token, inside, C, ROWS, TOKENS, CHUNK, PRECISION,
                         u.dtype.element_ty)  # fmt: skip
        if bias is not None:
            s += _biases(bias, at + t, step[None, :], (r // Q)[:, None], R // Q, inside[None, :] & row_in[:, None])
        s = tl.where(inside[None, :], (s + shift[:, None]) * LOG2E, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # no token so far: every weight is exp(-inf) = 0
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, 1)
        read = tl.dot(p.to(seen.dtype), seen, read * fade[:, None], input_precision=PRECISION)
        top = new
    read = read / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = item_row + part.to(tl.int64) * R * batch
    tl.store(y + out_row[:, None] * C + col[None, :], read.to(y.dtype.element_ty),
             mask=row_in[:, None] & (col < C)[None, :])  # fmt: skip
    if lane == 0:
        tl.store(lse + out_row, top / LOG2E + tl.log(total), mask=row_in)  # -inf + log(0) = -inf for no token


@triton.jit
def _score_gradient(s, dp, shift, dshift, lse, inside):
    """``p`` and ``ds`` of a tile ``[tokens, rows]`` or ``[rows, tokens]``, whatever the four others broadcast to."""
    p = tl.where(inside, tl.exp2((s + shift - lse) * LOG2E), 0.0)
    return p, tl.where(inside, p * (dp + dshift), 0.0)


@triton.jit
def _rows(group, Q, R, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The rows of a group, and which of them there are. With SPAN: of several heads, SPAN rows of each."""
    i = tl.arange(0, ROWS)
    if SPAN == 0:
        r = group * ROWS + i
        inside = r < R
    else:
        pieces = tl.cdiv(Q, SPAN)
        head = group // pieces * (ROWS // SPAN) + i // SPAN
        q = group % pieces * SPAN + i % SPAN
        r = head * Q + q
        inside = (q < Q) & (head < R // Q)
    return r, inside


@triton.jit
def _add_up_heads(ds, dbias, group, lane, places, at, step, inside, Q, R, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                  SPAN: tl.constexpr):  # fmt: skip
    """Writes the sums of ``ds`` over the rows of each head, of ``_rows`` with SPAN; once, not for every slice."""
    if lane == 0:
        heads, pieces = R // Q, tl.cdiv(Q, SPAN)
        head = group // pieces * (ROWS // SPAN) + tl.arange(0, ROWS // SPAN)
        sums = tl.sum(tl.reshape(ds, (ROWS // SPAN, SPAN, TOKENS)), 1)
        out = dbias + ((group % pieces) * places + at) * heads
        tl.store(out + (step[None, :] * heads + head[:, None]), sums, mask=(head < heads)[:, None] & inside[None, :])


@triton.jit
def _query_gradient(u, c, x, offsets, mask, lookup, bias, dy, dshift, lse, du, dc, dbias, batch, tokens, bank, x_item, x_token, C,
                    Q, R, groups, slices, parts, units,
                    PER_ITEM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
                    CHUNK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """``ds x`` and the sums of ``ds``, added up over ``units`` parts of items in order.

    Queries that all items share: ``du [programs, R, C]``, a sum a program. Queries of an item's own: ``units`` is 1, and
    ``du [parts, H, B, Q, C]``.

    With ``dbias [pieces, B, N, H]`` or ``[pieces, T, H]`` the sums of ``ds`` over the rows of each head, too: a group has
    SPAN rows of each of its heads, and a head of more rows is in several pieces.
    """
    C, x_item, x_token = C * UNIT, x_item * UNIT, x_token * UNIT
    pid = tl.program_id(0)
    group = pid % groups
    lane = pid // groups % slices
    program = pid // groups // slices
    r, row_in = _rows(group, Q, R, ROWS, SPAN)
    col = lane * WIDTH + tl.arange(0, WIDTH)
    step = tl.arange(0, TOKENS)
    u_row = r.to(tl.int64)
    out_row = program.to(tl.int64) * R + r
    if PER_ITEM:
        u_row = ((r // Q).to(tl.int64) * batch + program // parts) * Q + r % Q
        out_row = u_row + (program % parts).to(tl.int64) * R * batch
    if CHUNK == WIDTH:
        rows = _tile(u, u_row, C, col, row_in, C)
    shift = tl.zeros((ROWS,), tl.float32)
    if c is not None:
        shift = tl.load(c + u_row, mask=row_in, other=0.0)

    grad = tl.zeros((ROWS, WIDTH), tl.float32)
    flat = tl.zeros((ROWS,), tl.float32)
    places = tl.cast(tokens, tl.int64) if offsets is not None else tl.cast(tokens, tl.int64) * batch
    for unit in range(program * units, tl.minimum((program + 1) * units, batch * parts)):
        item = unit // parts
        item_row = ((r // Q).to(tl.int64) * batch + item) * Q + r % Q
        begin, first, last = _span(offsets, item, unit % parts, parts, tokens, TOKENS)
        at = begin if offsets is not None else tl.cast(item, tl.int64) * tokens
        base = x
        if lookup is None:
            base = x + (begin * x_token if offsets is not None else tl.cast(item, tl.int64) * x_item)
        level = tl.load(lse + item_row, mask=row_in, other=0.0)
        less = tl.load(dshift + item_row, mask=row_in, other=0.0)
        if CHUNK == WIDTH:
            dread = _tile(dy, item_row, C, col, row_in, C)
        for t in range(first, last, TOKENS):
            inside = _present(mask, at, t + step, last)
            here, place, inside = _placed(base, lookup, bank, at, t, step, x_token, inside)
            seen = _tile(here, place, x_token, col, inside, C).to(u.dtype.element_ty)
            if CHUNK == WIDTH:
                s = tl.dot(rows, tl.trans(seen), input_precision=PRECISION)
                dp = tl.dot(dread, tl.trans(seen), input_precision=PRECISION)
            else:
                s = _product(u, u_row, C, row_in, here, place, x_token, inside, C, ROWS, TOKENS, CHUNK, PRECISION,
                             u.dtype.element_ty)  # fmt: skip
                dp = _product(dy, item_row, C, row_in, here, place, x_token, inside, C, ROWS, TOKENS, CHUNK, PRECISION,
                              u.dtype.element_ty)  # fmt: skip
            if bias is not None:
                s += _biases(bias, at + t, step[None, :], (r // Q)[:, None], R // Q, inside[None, :] & row_in[:, None])
            _, ds = _score_gradient(s, dp, shift[:, None], less[:, None], level[:, None], inside[None, :])
            flat += tl.sum(ds, 1)
            if dbias is not None:
                _add_up_heads(ds, dbias, group, lane, places, at + t, step, t + step < last, Q, R, ROWS, TOKENS, SPAN)
            grad = tl.dot(ds.to(seen.dtype), seen, grad, input_precision=PRECISION)
    tl.store(du + out_row[:, None] * C + col[None, :], grad.to(du.dtype.element_ty),
             mask=row_in[:, None] & (col < C)[None, :])  # fmt: skip
    if lane == 0:
        tl.store(dc + out_row, flat, mask=row_in)


@triton.jit
def _token_gradient(u, c, x, offsets, mask, lookup, bias, dy, dshift, lse, dx, batch, tokens, bank, x_item, x_token, C, Q, R,
                    slices, parts,
                    PER_ITEM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
                    CHUNK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``ds^T u + p^T dy`` of one part of an item's tokens, one slice. Jagged: the rows that no item has are left alone."""
    C, x_item, x_token = C * UNIT, x_item * UNIT, x_token * UNIT
    pid = tl.program_id(0)
    lane = pid % slices
    part = pid // slices % parts
    item = pid // slices // parts
    col = lane * WIDTH + tl.arange(0, WIDTH)
    step = tl.arange(0, TOKENS)
    begin, first, last = _span(offsets, item, part, parts, tokens, TOKENS)
    at = begin if offsets is not None else item.to(tl.int64) * tokens
    base = x
    if lookup is None:
        base = x + (begin * x_token if offsets is not None else item.to(tl.int64) * x_item)
    for t in range(first, last, TOKENS):
        inside = _present(mask, at, t + step, last)
        here, place, inside = _placed(base, lookup, bank, at, t, step, x_token, inside)
        if CHUNK == WIDTH:
            seen = _tile(here, place, x_token, col, inside, C).to(u.dtype.element_ty)
        grad = tl.zeros((TOKENS, WIDTH), tl.float32)
        for begun in range(0, R, ROWS):
            r = begun + tl.arange(0, ROWS)
            row_in = r < R
            item_row = ((r // Q).to(tl.int64) * batch + item) * Q + r % Q
            u_row = item_row if PER_ITEM else r.to(tl.int64)
            level = tl.load(lse + item_row, mask=row_in, other=0.0)
            less = tl.load(dshift + item_row, mask=row_in, other=0.0)
            shift = tl.zeros((ROWS,), tl.float32)
            if c is not None:
                shift = tl.load(c + u_row, mask=row_in, other=0.0)
            rows = _tile(u, u_row, C, col, row_in, C)
            dread = _tile(dy, item_row, C, col, row_in, C)
            if CHUNK == WIDTH:
                s = tl.dot(seen, tl.trans(rows), input_precision=PRECISION)
                dp = tl.dot(seen, tl.trans(dread), input_precision=PRECISION)
            else:
                s = _product(here, place, x_token, inside, u, u_row, C, row_in, C, TOKENS, ROWS, CHUNK, PRECISION,
                             u.dtype.element_ty)  # fmt: skip
                dp = _product(here, place, x_token, inside, dy, item_row, C, row_in, C, TOKENS, ROWS, CHUNK, PRECISION,
                              u.dtype.element_ty)  # fmt: skip
            both = inside[:, None] & row_in[None, :]
            if bias is not None:
                s += _biases(bias, at + t, step[:, None], (r // Q)[None, :], R // Q, both)
            p, ds = _score_gradient(s, dp, shift[None, :], less[None, :], level[None, :], both)
            grad = tl.dot(ds.to(rows.dtype), rows, grad, input_precision=PRECISION)
            grad = tl.dot(p.to(rows.dtype), dread, grad, input_precision=PRECISION)
        out = dx + (at + t) * C
        tl.store(out + step[:, None] * C + col[None, :], grad.to(dx.dtype.element_ty),
                 mask=(t + step < last)[:, None] & (col < C)[None, :])  # fmt: skip


@triton.jit
def _zero_behind(dx, offsets, batch, rows, C, programs, BLOCK: tl.constexpr):
    """Zeros in the rows of a jagged ``dx`` that lie behind its last item."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + batch).to(tl.int64), 0), rows) * C
    end = tl.cast(rows, tl.int64) * C
    for at in range(begin + tl.program_id(0) * BLOCK, end, programs * BLOCK):
        index = at + tl.arange(0, BLOCK)
        tl.store(dx + index, tl.zeros((BLOCK,), dx.dtype.element_ty), mask=index < end)


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return table


def config(kernel: str, stream: Stream, u: Tensor) -> Config:
    """The table's tile for these tokens and queries."""
    values = stream.values
    given = (t is not None for t in (stream.mask, stream.lookup, stream.bias))
    rows = _table()[kernel][kind(u.dtype, unit(values) > 1, *given)]
    return next(Config(*tile) for up_to, *tile in rows if up_to is None or values.shape[-1] <= up_to)


def fitted(tile: Config, stream: Stream, u: Tensor) -> Config:
    """For one target of a few heads: products without tensor cores need no 16 rows, and those that are not there cost as much."""
    h, _, q, _ = u.shape
    if stream.lookup is None or u.dtype != torch.float32 or precision() != "ieee":
        return tile
    return tile._replace(rows=min(tile.rows, max(4, 1 << (h * q - 1).bit_length())))


def kind(dtype: torch.dtype, even: bool, masked: bool, looked_up: bool, biased: bool) -> str:
    """The part of the table that holds tiles for such tokens, and queries of this dtype."""
    what = "float32" if dtype == torch.float32 else "half"
    if not even:
        return f"{what}, odd"
    if biased and what == "half":
        return "half, biased"
    if looked_up:
        return f"{what}, looked up"
    return "half, masked" if masked and what == "half" else what


def unit(values: Tensor) -> int:
    """Of the width and the strides, see the module's docstring."""
    even = all(n % 8 == 0 for n in (values.shape[-1], *values.stride()[:-1])) and values.data_ptr() % 16 == 0
    return 8 if even else 1


def waves(device: torch.device) -> int:
    """Programs that a launch aims at: two for each multiprocessor."""
    if device.type != "cuda":  # the interpreter
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision() -> str:
    """Of float32 products; the half types are multiplied as they are and summed in float32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def forward(u: Tensor, c: Tensor | None, stream: Stream, batch: int) -> tuple[Tensor, Tensor]:
    """What each row reads of one stream, under a softmax over each of P parts of an item's tokens.

    ``u [H, 1 or B, Q, C]``, ``c [H, 1 or B, Q]`` float32 -> ``y [P, H, B, Q, C]``, of the dtype of ``u`` if P = 1, else
    float32, and ``lse [P, H, B, Q]`` float32, -inf where there is no token.
    """
    h, _, q, width = u.shape
    tile = fitted(config("forward", stream, u), stream, u)
    groups, slices = _cdiv(h * q, tile.rows), _cdiv(width, tile.width)
    parts = _parts(stream, batch, groups * slices * batch, tile, u.device)
    y = torch.empty(parts, h, batch, q, width, dtype=u.dtype if parts == 1 else torch.float32, device=u.device)
    lse = torch.empty(parts, h, batch, q, dtype=torch.float32, device=u.device)
    if lse.numel():
        _launch(_forward, groups * slices * parts * batch, u, c, stream, (y, lse), batch, (groups, slices, parts), tile)
    return y, lse


def query_gradient(u: Tensor, c: Tensor | None, stream: Stream, dy: Tensor, dshift: Tensor, lse: Tensor,
                   need_bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients to ``u``, in its dtype, to ``c``, in float32, and, if asked for, to the stream's biases; shaped as these.

    ``dy [H, B, Q, C]`` is the gradient to what the rows read, ``dshift [H, B, Q]`` what else adds to that of a weight,
    ``lse [H, B, Q]`` the logsumexp over all streams.
    """
    h, own, q, width = u.shape
    batch = lse.shape[1]
    tile = fitted(config("query_gradient", stream, u), stream, u)
    span = min(tile.rows, max(1, 1 << (q - 1).bit_length())) if need_bias else 0
    pieces = _cdiv(q, span) if need_bias else 1
    groups = pieces * _cdiv(h, tile.rows // span) if need_bias else _cdiv(h * q, tile.rows)
    slices = _cdiv(width, tile.width)
    parts = _parts(stream, batch, groups * slices * batch, tile, u.device)
    per_item, units = own == batch, 1
    if not per_item:  # a program sums over so many parts of items that about one wave of programs is left
        units = max(1, _cdiv(batch * parts * groups * slices, waves(u.device)))
    programs = _cdiv(batch * parts, units)
    sums = (parts if per_item else programs, h, own, q)
    dtype = u.dtype if sums[0] == 1 else torch.float32
    du = torch.empty(*sums, width, dtype=dtype, device=u.device)
    dc = torch.empty(sums, dtype=torch.float32, device=u.device)
    # Zeros, for there may be places that no item has.
    dbias = torch.zeros(pieces, *stream.places, h, dtype=torch.float32, device=u.device) if need_bias else None
    if dc.numel():
        tensors, counts = (dy, dshift, lse, du, dc, dbias), (groups, slices, parts, units)
        _launch(_query_gradient, groups * slices * programs, u, c, stream, tensors, batch, counts, tile, SPAN=span)
    if dbias is not None:
        dbias = dbias[0] if pieces == 1 else dbias.sum(0)
    if sums[0] == 1:
        return du[0], dc[0], dbias
    return du.sum(0).to(u.dtype), dc.sum(0), dbias


def token_gradient(u: Tensor, c: Tensor | None, stream: Stream, dy: Tensor, dshift: Tensor, lse: Tensor) -> Tensor:
    """The gradient to the tokens, ``[B, N, C]`` or ``[T, C]``; arguments as in ``query_gradient``.

    Of tokens that are looked up it is in float32, for it is to be added up.
    """
    values, batch = stream.values, lse.shape[1]
    tile = config("token_gradient", stream, u)
    slices = _cdiv(u.shape[-1], tile.width)
    parts = max(1, _cdiv(_mean_tokens(stream, batch), tile.tokens))
    dtype = values.dtype if stream.lookup is None else torch.float32
    dx = torch.empty(*stream.places, values.shape[-1], dtype=dtype, device=values.device)
    if dx.numel() and batch:
        _launch(_token_gradient, slices * parts * batch, u, c, stream, (dy, dshift, lse, dx), batch, (slices, parts), tile)
    if dx.numel() and stream.offsets is not None:
        programs = waves(values.device)
        with _device(values):
            _zero_behind[(programs,)](dx, stream.offsets, batch, *dx.shape, programs, BLOCK=1024)
    return dx


def _launch(kernel: Any, programs: int, u: Tensor, c: Tensor | None, stream: Stream, tensors: tuple[Tensor | None, ...],
            batch: int, counts: tuple[int, ...], tile: Config, **others: int) -> None:  # fmt: skip
    """All kernels take the same arguments but for ``tensors``, ``counts`` and ``others``."""
    values, offsets, mask, lookup, bias = stream
    h, own, q, width = u.shape
    one = unit(values)
    with _device(u):
        kernel[(programs,)](
            u, c, values, offsets, None if mask is None else mask.view(torch.uint8), lookup, bias, *tensors, batch,
            stream.places[-1], values.shape[0], values.stride(0) // one, values.stride(-2) // one, width // one, q, h * q,
            *counts, PER_ITEM=own == batch, ROWS=tile.rows, TOKENS=tile.tokens, WIDTH=tile.width, CHUNK=tile.chunk, UNIT=one,
            PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **others,
        )  # fmt: skip


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _parts(stream: Stream, batch: int, programs: int, tile: Config, device: torch.device) -> int:
    """Into how many parts to cut each item's tokens: as many as keep the chip busy, none shorter than four tiles.

    A jagged stream is judged by its mean: looking at the lengths would wait for the device.
    """
    wanted = _cdiv(waves(device), max(1, programs))
    return max(1, min(wanted, _mean_tokens(stream, batch) // (4 * tile.tokens)))


def _mean_tokens(stream: Stream, batch: int) -> int:
    tokens = stream.places[-1]
    return tokens if stream.offsets is None else _cdiv(tokens, max(1, batch))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
