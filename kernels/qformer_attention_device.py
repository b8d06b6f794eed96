"""The device code of ``qformer_attention.py``, whose docstring says what a program holds and in which forms.

Every stream is read under a softmax of its own here, and so is every part of the tokens that an item is cut into; the
caller joins them by their logsumexps. Nothing is added atomically: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(x, offsets, lookup, item, part, parts, tokens, x_item, x_token, TOKENS: tl.constexpr):
    """An item's tokens: behind which address (all of the bank's, looked up), the number of the first place, and which of them
    are this part's. Offsets are not trusted."""
    base = x
    at = tl.cast(item, tl.int64) * tokens
    length = tokens
    if offsets is not None:
        at = tl.minimum(tl.maximum(tl.load(offsets + item).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.load(offsets + item + 1).to(tl.int64), tokens)
        length = tl.maximum(end - at, 0).to(tl.int32)
        if lookup is None:
            base = x + at * x_token
    elif lookup is None:
        base = x + tl.cast(item, tl.int64) * x_item
    share = tl.cdiv(tl.cdiv(length, TOKENS), parts) * TOKENS
    first = tl.minimum(part * share, length)
    return base, at, first, tl.minimum(first + share, length)


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
def _mixed(x):
    """Of uint32; ``em3.ops._dropout._mixed``."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _factors(seed, threshold, factor, stream, token, row):
    """What dropout multiplies the weights of tokens and rows with, which broadcast to a tile: of ``Dropout.factors``."""
    drawn = tl.load(seed)
    place = token.to(tl.uint32) * 0x85EBCA77 + (tl.cast(stream, tl.int64) * 0xC2B2AE3D + drawn).to(tl.uint32)
    row = row.to(tl.uint32) * 0x9E3779B9 + (drawn >> 32).to(tl.uint32)
    return tl.where((_mixed(_mixed(place) ^ row) >> 8).to(tl.int32) >= threshold, factor, 0.0)


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
def _forward(u, c, x, offsets, mask, lookup, bias, seed, threshold, factor, stream, y, lse, kept,
             batch, tokens, bank, x_item, x_token, C, Q, R, groups, slices, parts,
             PER_ITEM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
             CHUNK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``y [parts, H, B, Q, C]`` and ``lse [parts, H, B, Q]`` of one group of rows, one item, one part, one slice.

    With ``seed`` weights are dropped from ``y``, and ``kept`` is their sum, shaped as ``lse``.
    """
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

    base, at, first, last = _span(x, offsets, lookup, item, part, parts, tokens, x_item, x_token, TOKENS)
    if CHUNK == WIDTH:
        rows = _tile(u, u_row, C, col, row_in, C)
    shift = tl.zeros((ROWS,), tl.float32)
    if c is not None:
        shift = tl.load(c + u_row, mask=row_in, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    read = tl.zeros((ROWS, WIDTH), tl.float32)
    left = tl.zeros((ROWS,), tl.float32)
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
        if seed is not None:
            p *= _factors(seed, threshold, factor, stream, (at + t + step)[None, :], r[:, None])
            left = left * fade + tl.sum(p, 1)
        read = tl.dot(p.to(seen.dtype), seen, read * fade[:, None], input_precision=PRECISION)
        top = new
    whole = tl.where(total == 0.0, 1.0, total)
    read = read / whole[:, None]
    out_row = item_row + part.to(tl.int64) * R * batch
    tl.store(y + out_row[:, None] * C + col[None, :], read.to(y.dtype.element_ty),
             mask=row_in[:, None] & (col < C)[None, :])  # fmt: skip
    if lane == 0:
        tl.store(lse + out_row, top / LOG2E + tl.log(total), mask=row_in)  # -inf + log(0) = -inf for no token
        if seed is not None:
            tl.store(kept + out_row, left / whole, mask=row_in)


@triton.jit
def _score_gradient(s, dp, shift, dshift, lse, inside, seed, threshold, factor, stream, dmass, token, row):
    """``p`` after dropout and ``ds`` of a tile ``[tokens, rows]`` or ``[rows, tokens]``, whatever the others broadcast to.

    ``dshift`` is what adds to the gradient to every weight alike, ``dmass`` what does to those that are kept.
    """
    p = tl.where(inside, tl.exp2((s + shift - lse) * LOG2E), 0.0)
    kept = p
    if seed is None:
        ds = tl.where(inside, p * (dp + dshift), 0.0)
    else:
        factors = _factors(seed, threshold, factor, stream, token, row)
        kept = p * factors
        ds = tl.where(inside, p * (factors * (dp + dmass) + dshift), 0.0)
    return kept, ds


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
def _query_gradient(u, c, x, offsets, mask, lookup, bias, seed, threshold, factor, stream, dy, dshift, lse, dmass,
                    du, dc, dbias, batch, tokens, bank, x_item, x_token, C, Q, R, groups, slices, parts, units,
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
        base, at, first, last = _span(x, offsets, lookup, item, unit % parts, parts, tokens, x_item, x_token, TOKENS)
        level = tl.load(lse + item_row, mask=row_in, other=0.0)
        less = tl.load(dshift + item_row, mask=row_in, other=0.0)
        more = tl.zeros((ROWS,), tl.float32)
        if dmass is not None:
            more = tl.load(dmass + item_row, mask=row_in, other=0.0)
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
            _, ds = _score_gradient(s, dp, shift[:, None], less[:, None], level[:, None], inside[None, :], seed, threshold,
                                    factor, stream, more[:, None], (at + t + step)[None, :], r[:, None])  # fmt: skip
            flat += tl.sum(ds, 1)
            if dbias is not None:
                _add_up_heads(ds, dbias, group, lane, places, at + t, step, t + step < last, Q, R, ROWS, TOKENS, SPAN)
            grad = tl.dot(ds.to(seen.dtype), seen, grad, input_precision=PRECISION)
    tl.store(du + out_row[:, None] * C + col[None, :], grad.to(du.dtype.element_ty),
             mask=row_in[:, None] & (col < C)[None, :])  # fmt: skip
    if lane == 0:
        tl.store(dc + out_row, flat, mask=row_in)


@triton.jit
def _token_gradient(u, c, x, offsets, mask, lookup, bias, seed, threshold, factor, stream, dy, dshift, lse, dmass,
                    dx, batch, tokens, bank, x_item, x_token, C, Q, R, slices, parts,
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
    base, at, first, last = _span(x, offsets, lookup, item, part, parts, tokens, x_item, x_token, TOKENS)
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
            more = tl.zeros((ROWS,), tl.float32)
            if dmass is not None:
                more = tl.load(dmass + item_row, mask=row_in, other=0.0)
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
            p, ds = _score_gradient(s, dp, shift[None, :], less[None, :], level[None, :], both, seed, threshold, factor,
                                    stream, more[None, :], (at + t + step)[:, None], r[None, :])  # fmt: skip
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
