"""``qformer_attention`` in Triton: rows of absorbed queries attend over raw tokens, one stream a launch. Tiles and launches;
the device code is in ``qformer_attention_device.py``.

``lora_target_attention`` is the same with tokens that are looked up, rows of a bank by their numbers, and with biases, a
number for each place and head that is added to the scores.

``R = H * Q`` rows of ``u`` read an item's tokens ``x``; row ``r = (h, q)`` has the score ``s = u[r] . x[t] + c[r]``. A
program holds ROWS rows and, in float32 registers, ROWS x WIDTH sums.

Two forms, chosen by CHUNK. With CHUNK == WIDTH a tile of tokens ``[TOKENS, WIDTH]`` is read once and serves both
products; all C columns fit in WIDTH. With CHUNK < WIDTH scores are summed over chunks of C, and a program sums only
its slice of WIDTH columns, so any C will do; a tile comes out of the cache again, and scores are computed once a slice.

C and the strides of the tokens are passed in units of UNIT = 8 columns where they have that divisor: so the compiler
knows that it may load 16 bytes at a time, and needs no address for every element. Other tokens have a small tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import REGISTERS, cdiv, on_device, precision, table, waves
from .qformer_attention_device import _forward, _query_gradient, _token_gradient, _zero_behind


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


class Drop(NamedTuple):
    """Dropout of one stream's weights: those of ``em3.ops._dropout.Dropout``, whose hash the kernels compute."""

    seed: Tensor  # [1] int64
    threshold: int  # of 2^24: a weight is dropped below it
    factor: float  # of the others
    stream: int


class Config(NamedTuple):
    """The tile of one kernel; see the module's docstring."""

    rows: int
    tokens: int
    width: int
    chunk: int
    warps: int
    stages: int


def config(kernel: str, stream: Stream, u: Tensor, dropped: bool = False) -> Config:
    """The table's tile for these tokens and queries."""
    values = stream.values
    masked, looked_up, biased = (t is not None for t in (stream.mask, stream.lookup, stream.bias))
    rows = table("qformer_attention")[kernel][kind(u.dtype, unit(values) > 1, masked, looked_up, biased, dropped)]
    return next(Config(*tile) for up_to, *tile in rows if up_to is None or values.shape[-1] <= up_to)


def fitted(tile: Config, stream: Stream, u: Tensor) -> Config:
    """For one target of a few heads: products without tensor cores need no 16 rows, and those that are not there cost as much."""
    h, _, q, _ = u.shape
    if stream.lookup is None or u.dtype != torch.float32 or precision() != "ieee":
        return tile
    return tile._replace(rows=min(tile.rows, max(4, 1 << (h * q - 1).bit_length())))


def kind(dtype: torch.dtype, even: bool, masked: bool, looked_up: bool, biased: bool, dropped: bool = False) -> str:
    """The part of the table that holds tiles for such tokens, and queries of this dtype."""
    what = "float32" if dtype == torch.float32 else "half"
    if not even:
        return f"{what}, odd"
    if dropped and what == "half":
        return "half, dropped"
    if biased and what == "half":
        return "half, biased"
    if looked_up:
        return f"{what}, looked up"
    return "half, masked" if masked and what == "half" else what


def unit(values: Tensor) -> int:
    """Of the width and the strides, see the module's docstring."""
    even = all(n % 8 == 0 for n in (values.shape[-1], *values.stride()[:-1])) and values.data_ptr() % 16 == 0
    return 8 if even else 1


def forward(u: Tensor, c: Tensor | None, stream: Stream, batch: int,
            drop: Drop | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What each row reads of one stream, under a softmax over each of P parts of an item's tokens.

    ``u [H, 1 or B, Q, C]``, ``c [H, 1 or B, Q]`` float32 -> ``y [P, H, B, Q, C]``, of the dtype of ``u`` if P = 1, else
    float32, and ``lse [P, H, B, Q]`` float32, -inf where there is no token. With dropout, what is left of each softmax, too,
    shaped as ``lse``.
    """
    h, _, q, width = u.shape
    tile = fitted(config("forward", stream, u, drop is not None), stream, u)
    groups, slices = cdiv(h * q, tile.rows), cdiv(width, tile.width)
    parts = _parts(stream, batch, groups * slices * batch, tile, u.device)
    y = torch.empty(parts, h, batch, q, width, dtype=u.dtype if parts == 1 else torch.float32, device=u.device)
    lse = torch.empty(parts, h, batch, q, dtype=torch.float32, device=u.device)
    kept = None if drop is None else torch.empty_like(lse)
    if lse.numel():
        programs, counts = groups * slices * parts * batch, (groups, slices, parts)
        _launch(_forward, programs, u, c, stream, drop, (y, lse, kept), batch, counts, tile)
    return y, lse, kept


def query_gradient(u: Tensor, c: Tensor | None, stream: Stream, dy: Tensor, dshift: Tensor, lse: Tensor,
                   need_bias: bool = False, drop: Drop | None = None,
                   dmass: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients to ``u``, in its dtype, to ``c``, in float32, and, if asked for, to the stream's biases; shaped as these.

    ``dy [H, B, Q, C]`` is the gradient to what the rows read, ``dshift [H, B, Q]`` what else adds to that of a weight,
    ``lse [H, B, Q]`` the logsumexp over all streams. With dropout ``dmass``, shaped as ``dshift``, adds to the gradient of the
    weights that are kept.
    """
    h, own, q, width = u.shape
    batch = lse.shape[1]
    tile = fitted(config("query_gradient", stream, u, drop is not None), stream, u)
    span = min(tile.rows, max(1, 1 << (q - 1).bit_length())) if need_bias else 0
    pieces = cdiv(q, span) if need_bias else 1
    groups = pieces * cdiv(h, tile.rows // span) if need_bias else cdiv(h * q, tile.rows)
    slices = cdiv(width, tile.width)
    parts = _parts(stream, batch, groups * slices * batch, tile, u.device)
    per_item, units = own == batch, 1
    if not per_item:  # a program sums over so many parts of items that about one wave of programs is left
        units = max(1, cdiv(batch * parts * groups * slices, waves(u.device)))
    programs = cdiv(batch * parts, units)
    sums = (parts if per_item else programs, h, own, q)
    dtype = u.dtype if sums[0] == 1 else torch.float32
    du = torch.empty(*sums, width, dtype=dtype, device=u.device)
    dc = torch.empty(sums, dtype=torch.float32, device=u.device)
    # Zeros, for there may be places that no item has.
    dbias = torch.zeros(pieces, *stream.places, h, dtype=torch.float32, device=u.device) if need_bias else None
    if dc.numel():
        tensors, counts = (dy, dshift, lse, dmass, du, dc, dbias), (groups, slices, parts, units)
        _launch(_query_gradient, groups * slices * programs, u, c, stream, drop, tensors, batch, counts, tile, SPAN=span)
    if dbias is not None:
        dbias = dbias[0] if pieces == 1 else dbias.sum(0)
    if sums[0] == 1:
        return du[0], dc[0], dbias
    return du.sum(0).to(u.dtype), dc.sum(0), dbias


def token_gradient(u: Tensor, c: Tensor | None, stream: Stream, dy: Tensor, dshift: Tensor, lse: Tensor,
                   drop: Drop | None = None, dmass: Tensor | None = None) -> Tensor:  # fmt: skip
    """The gradient to the tokens, ``[B, N, C]`` or ``[T, C]``; arguments as in ``query_gradient``.

    Of tokens that are looked up it is in float32, for it is to be added up.
    """
    values, batch = stream.values, lse.shape[1]
    tile = config("token_gradient", stream, u, drop is not None)
    slices = cdiv(u.shape[-1], tile.width)
    parts = max(1, cdiv(_mean_tokens(stream, batch), tile.tokens))
    dtype = values.dtype if stream.lookup is None else torch.float32
    dx = torch.empty(*stream.places, values.shape[-1], dtype=dtype, device=values.device)
    if dx.numel() and batch:
        tensors = (dy, dshift, lse, dmass, dx)
        _launch(_token_gradient, slices * parts * batch, u, c, stream, drop, tensors, batch, (slices, parts), tile)
    if dx.numel() and stream.offsets is not None:
        programs = waves(values.device)
        with on_device(values):
            _zero_behind[(programs,)](dx, stream.offsets, batch, *dx.shape, programs, BLOCK=1024)
    return dx


def _launch(kernel: Any, programs: int, u: Tensor, c: Tensor | None, stream: Stream, drop: Drop | None,
            tensors: tuple[Tensor | None, ...], batch: int, counts: tuple[int, ...], tile: Config,
            **others: int) -> None:  # fmt: skip
    """All kernels take the same arguments but for ``tensors``, ``counts`` and ``others``."""
    values, offsets, mask, lookup, bias = stream
    h, own, q, width = u.shape
    one = unit(values)
    with on_device(u):
        kernel[(programs,)](
            u, c, values, offsets, None if mask is None else mask.view(torch.uint8), lookup, bias,
            *((None, 0, 0.0, 0) if drop is None else drop), *tensors, batch,
            stream.places[-1], values.shape[0], values.stride(0) // one, values.stride(-2) // one, width // one, q, h * q,
            *counts, PER_ITEM=own == batch, ROWS=tile.rows, TOKENS=tile.tokens, WIDTH=tile.width, CHUNK=tile.chunk, UNIT=one,
            PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages, maxnreg=REGISTERS, **others,
        )  # fmt: skip


def _parts(stream: Stream, batch: int, programs: int, tile: Config, device: torch.device) -> int:
    """Into how many parts to cut each item's tokens: as many as keep the chip busy, none shorter than four tiles.

    A jagged stream is judged by its mean: looking at the lengths would wait for the device.
    """
    wanted = cdiv(waves(device), max(1, programs))
    return max(1, min(wanted, _mean_tokens(stream, batch) // (4 * tile.tokens)))


def _mean_tokens(stream: Stream, batch: int) -> int:
    tokens = stream.places[-1]
    return tokens if stream.offsets is None else cdiv(tokens, max(1, batch))
