"""``qformer_attention``: a few learned queries read many tokens. Public function, cost model, registered operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..jagged import Stream, num_items, parse_stream
from ..tuning import decide, gradients, layout
from . import _checks, _dispatch, _projected
from ._dropout import Dropout

STRATEGIES = ("auto", "absorb", "project")


def qformer_attention(query: Tensor, streams: Any, w_q: Tensor | None, w_k: Sequence[Tensor], w_v: Sequence[Tensor],
                      w_o: Tensor | None, b_q: Tensor | None = None, b_k: Sequence[Tensor | None] | None = None,
                      b_v: Sequence[Tensor | None] | None = None, b_o: Tensor | None = None, *, num_heads: int,
                      masks: Sequence[Tensor | None] | None = None, scale: float | None = None,
                      dropout: float = 0.0, strategy: str = "auto", backend: str | None = None) -> Tensor:  # fmt: skip
    """Multi-head cross-attention of ``Q`` queries over the tokens of one or more modality streams.

    With ``q = query w_q^T + b_q``, ``k_m = x_m w_k[m]^T + b_k[m]`` and ``v_m = x_m w_v[m]^T + b_v[m]``, one softmax a
    head over all tokens of all streams of an item::

        out = concat_h(softmax(scale * q_h [k_1h .. k_Mh]^T) [v_1h .. v_Mh]) w_o^T + b_o

    ``strategy="absorb"`` never forms keys and values: it folds ``w_k`` into the queries, attends over the raw tokens
    and applies ``w_v`` to what was read, at about ``H * Q / D`` of the cost for long sequences. ``"project"`` is the
    formula as written. ``"auto"`` takes the one that ``em3 tune`` measured for such shapes as the
    faster, else asks the cost model.

    An item without a token in any stream gets zero attention, so its output is ``b_o``, and zero gradient.

    Args:
        query: ``[Q, D]``, shared by all items, or ``[B, Q, D]``.
        streams: one stream or a sequence of ``M``: padded ``[B, N, C_m]``, or jagged (``em3.Jagged``,
            ``torch.nested`` in the jagged layout, anything with ``.values()`` and ``.offsets()``). Each may be of another
            floating-point dtype than the rest, as tokens stored in a half type: half the memory, not less time.
        w_q, w_o: ``[D, D]``. Without ``w_q`` the query counts as projected, without ``w_o`` the heads' outputs are
            returned side by side: where a model has these two layers elsewhere.
        w_k, w_v: one ``[D, C_m]`` a stream.
        b_q, b_o: ``[D]`` or None.
        b_k, b_v: one ``[D]`` or None a stream, or None.
        num_heads: ``H``; divides ``D``.
        masks: one boolean ``[B, N]`` (True = a real token) or None a stream, or None. Jagged streams take none.
        scale: factor of the scores, ``1 / sqrt(D / H)`` by default.
        dropout: probability with which an attention weight counts as zero, the others being divided by
            ``1 - dropout``. Drawn anew in every call from torch's generator of the query's device.
        strategy: ``"auto"``, ``"absorb"`` or ``"project"``; dropout needs the absorbed form.
        backend: ``"auto"`` or a backend's name; the process-wide choice (``em3.set_backend``) by default.

    Returns:
        ``[B, Q, D]``, of the inputs' dtype (under autocast: of its dtype). float32, bfloat16, float16 or float64.
        Gradients flow to every floating-point argument that requires them, and cost nothing for the others;
        second-order ones are an error with ``"absorb"``. Nothing in the tokens of one item, and nothing at a masked
        place, reaches another item, not even NaN.

    Raises:
        ValueError: naming the argument, what it was and what it must be.
        em3.BackendError: if the backend asked for cannot serve the call.

    Source: cross-attention of the Q-Former (Li et al., "BLIP-2", arXiv 2301.12597, section 3.1), used as the
    Fusion-Q-Former by EM3 (arXiv 2404.06078).
    """
    _checks.tensor(query, "query", " [Q, D] or [B, Q, D]")
    parsed = parse(streams, masks)
    wk, wv = per_stream(w_k, "w_k", len(parsed)), per_stream(w_v, "w_v", len(parsed))
    bk, bv = per_stream(b_k, "b_k", len(parsed)), per_stream(b_v, "b_v", len(parsed))
    query, w_q, w_o, b_q, b_o, *rest = _checks.autocast(
        query, w_q, w_o, b_q, b_o, *(s.values for s in parsed), *wk, *wv, *bk, *bv, device=query.device
    )
    m = len(parsed)
    parsed = [s._replace(values=x) for s, x in zip(parsed, rest[:m], strict=True)]
    wk, wv, bk, bv = rest[m : 2 * m], rest[2 * m : 3 * m], rest[3 * m : 4 * m], rest[4 * m :]
    batch = check_call(query, parsed, w_q, wk, wv, w_o, b_q, bk, bv, b_o, num_heads)
    _checks.one_of(strategy, STRATEGIES, "strategy")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: was {dropout}, must be a probability from 0 to 1")
    if dropout and strategy == "project":
        raise ValueError("strategy: was 'project', must be 'absorb' or 'auto' with dropout")

    request = _dispatch.requested(backend)
    d = query.shape[-1]
    q = heads_of(query, w_q, b_q, num_heads, scale)  # [1 or B, Q, H, E]
    if dropout:
        strategy = "absorb"
    elif strategy == "auto":
        strategy = cheaper(parsed, query.shape[-2], num_heads, d) if request in ("auto", "torch") else "absorb"
        if request == "auto":
            kind = f"{gradients([s.values for s in parsed])} {layout(*parsed[0][:2], query)}"
            dims = (batch, query.shape[-2], num_heads, d, *_sizes([s.values for s in parsed], [s.offsets for s in parsed]))
            strategy = decide("qformer_attention.strategy", query, kind, dims, strategy)
    if strategy == "project":
        _dispatch.serves_projection("qformer_attention", request)
        projected = []
        for s, *weights in zip(parsed, wk, wv, bk, bv, strict=True):
            x = _projected.real_tokens(s).to(q.dtype)
            k, v = F.linear(x, weights[0], weights[2]), F.linear(x, weights[1], weights[3])
            projected.append(_projected.Projected(k, v, s.offsets, s.mask))
        out = _projected.attend(q, projected, batch, [f"streams[{i}]" for i in range(m)])
    else:
        seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=query.device) if dropout else None
        out = _absorbed(q, parsed, wk, wv, bk, bv, batch, seed, dropout, request)
    return out if w_o is None else F.linear(out, w_o, b_o)


def heads_of(query: Tensor, w_q: Tensor | None, b_q: Tensor | None, h: int, scale: float | None) -> Tensor:
    """The queries of each head, scaled, ``[1 or B, Q, H, E]``; 1 where all items share them."""
    q = query if w_q is None else F.linear(query, w_q, b_q)
    q = (q if q.dim() == 3 else q[None]).unflatten(-1, (h, -1))
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def cheaper(streams: Sequence[Stream], q: int, h: int, d: int) -> str:
    """The cost model: a training step in multiply-adds of a large product.

    Absorbing costs five products of ``[H Q, C]`` with an item's tokens, and those of ``[Q, C]`` with the weights;
    projecting costs the two projections forward and backward (the tokens are taken as frozen, the usual case), and
    seven products of ``[Q, D]`` with the keys or values.

    The factors of the first line were set on 64 shapes (N from 50 to 1,024, C and D from 256 to 1,024, Q from 8 to 64,
    tokens with and without gradient; float32, 2 threads): the long products run faster than counted, the small ones
    slower. The form they pick was never more than 1.1 times the other's time with the compiled kernel, 1.2 without.
    Where an item's rows ``[H Q, C]`` outgrow the cache their products slow down. Time of absorbing over projecting, one
    thread, AVX2, tokens frozen, and (by this model): C=D=1024, H*Q = 1024: 1.38 (1.42), 768: 1.18 (1.09); C=1024, D=768,
    H*Q = 576: 1.27 (1.23); C=D=512, H*Q = 448: 1.02 (1.07), 384: 0.96 (0.94).
    """
    absorb = project = 0.0
    for stream in streams:
        batch = num_items(stream)
        tokens, c = _sizes([stream.values], [stream.offsets])
        absorb += (4.7 if h * q * c <= 1 << 19 else 6) * tokens * h * q * c + 4.5 * batch * q * c * d
        project += 4 * tokens * c * d + 7 * tokens * q * d
    return "absorb" if absorb <= project else "project"


def _sizes(values: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> list[int]:
    """Tokens and width of each stream."""
    sizes: list[int] = []
    for x, bounds in zip(values, offsets, strict=True):
        sizes += (x.shape[0] * x.shape[1] if bounds is None else x.shape[0], x.shape[-1])
    return sizes


def _absorbed(q: Tensor, streams: Sequence[Stream], w_k: Sequence[Tensor], w_v: Sequence[Tensor],
              b_k: Sequence[Tensor | None], b_v: Sequence[Tensor | None], batch: int, seed: Tensor | None, dropout: float,
              request: str) -> Tensor:  # fmt: skip
    _, nq, h, e = q.shape
    u, c = absorbed_keys(q, w_k, b_k)
    w = [t.view(h, e, t.shape[1]) for t in w_v]
    _, out, mass, _ = torch.ops.em3.qformer_attention(
        u, c, w, [s.values for s in streams], [s.offsets for s in streams], [s.mask for s in streams], batch, seed,
        dropout, request,
    )  # fmt: skip
    if any(bias is not None for bias in b_v):
        # One product for all streams: 0.7 ms forward and backward against 1.8 for a sum over them (B=1128, Q=4, H=4, E=16).
        biases = torch.stack([out.new_zeros(h, e) if bias is None else bias.view(h, e) for bias in b_v], 1)  # [H, M, E]
        weights = mass.to(out.dtype).flatten(2).permute(1, 2, 0)  # [H, B * Q, M]
        out = torch.baddbmm(out.flatten(1, 2), weights, biases).view(h, batch, nq, e)
    return out.permute(1, 2, 0, 3).reshape(batch, nq, h * e)


def absorbed_keys(q: Tensor, w_k: Sequence[Tensor], b_k: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
    """Queries ``[1 or B, Q, H, E]`` with the key weights folded in, ``[H, 1 or B, Q, C_m]`` a stream, and what the key
    biases add to their scores, ``[M, H, 1 or B, Q]`` or None."""
    bu, nq, h, e = q.shape
    rows = q.permute(2, 0, 1, 3).reshape(h, bu * nq, e)  # [H, Bu * Q, E]
    u = [torch.bmm(rows, w.view(h, e, w.shape[1])).view(h, bu, nq, w.shape[1]) for w in w_k]
    c = _score_offsets(rows, b_k, h, e)
    return u, None if c is None else c.view(len(u), h, bu, nq)


def _score_offsets(rows: Tensor, b_k: Sequence[Tensor | None], h: int, e: int) -> Tensor | None:
    """``q . b_k`` of each stream, ``[M, H, Bu * Q]`` in the accumulation dtype; None if there are no key biases."""
    if all(bias is None for bias in b_k):
        return None
    wide = rows if rows.dtype == torch.float64 else rows.float()
    zero = wide.new_zeros(wide.shape[:2])
    # A product and a sum rather than bmm, which autocast would round to its own dtype.
    return torch.stack([zero if b is None else (wide * b.to(wide.dtype).view(h, 1, e)).sum(-1) for b in b_k])


def per_stream(given: Any, name: str, count: int) -> list:
    if given is None:
        return [None] * count
    if isinstance(given, Tensor):
        given = [given]
    if len(given) != count:
        raise ValueError(f"{name}: held {len(given)} entries, must hold one for each of the {count} streams")
    return list(given)


def parse(streams: Any, masks: Any) -> list[Stream]:
    sources = list(streams) if isinstance(streams, (list, tuple)) else [streams]
    if not sources:
        raise ValueError("streams: was empty, must hold at least one stream")
    given = per_stream(masks, "masks", len(sources))
    pairs = enumerate(zip(sources, given, strict=True))
    return [parse_stream(source, mask, f"streams[{i}]", f"masks[{i}]") for i, (source, mask) in pairs]


def batch_of(streams: Sequence[Stream]) -> int:
    """``B``, which all streams must agree in."""
    batch = num_items(streams[0])
    for i, stream in enumerate(streams):
        _checks.floating(stream.values, f"streams[{i}]")
        if num_items(stream) != batch:
            raise ValueError(f"streams[{i}]: had {num_items(stream)} items, must have {batch} like streams[0]")
    return batch


def check_call(query: Tensor, streams: Sequence[Stream], w_q: Tensor | None, w_k: Sequence[Tensor | None],
               w_v: Sequence[Tensor | None], w_o: Tensor | None, b_q: Tensor | None, b_k: Sequence[Tensor | None],
               b_v: Sequence[Tensor | None], b_o: Tensor | None, num_heads: int) -> int:  # fmt: skip
    """Everything that shapes, dtypes and devices can show; returns ``B``."""
    batch = batch_of(streams)
    if query.dim() not in (2, 3):
        raise ValueError(f"query: was {list(query.shape)}, must be [Q, D] or [B, Q, D]")
    d = query.shape[-1]
    if query.dim() == 3:
        _checks.shape(query, [batch, "Q", d], "query")
    _checks.divides(num_heads, d, "query")
    for letter, weight, bias in (("q", w_q, b_q), ("o", w_o, b_o)):
        if weight is None and bias is not None:
            raise ValueError(f"b_{letter}: was given, must be None without w_{letter}")
    named: dict[str, tuple[Tensor | None, list[int | str]]] = {
        "w_q": (w_q, [d, d]), "w_o": (w_o, [d, d]), "b_q": (b_q, [d]), "b_o": (b_o, [d]),
    }  # fmt: skip
    for i, stream in enumerate(streams):
        width = stream.values.shape[-1]
        named |= {f"w_k[{i}]": (w_k[i], [d, width]), f"w_v[{i}]": (w_v[i], [d, width]),
                  f"b_k[{i}]": (b_k[i], [d]), f"b_v[{i}]": (b_v[i], [d])}  # fmt: skip
    for name, (tensor, expected) in named.items():
        if tensor is not None:
            _checks.shape(tensor, expected, name)
    _checks.same_device_and_dtype("query", query, {name: t for name, (t, _) in named.items()})
    given: dict[str, Tensor | None] = {}
    for i, stream in enumerate(streams):
        given |= {f"streams[{i}]": stream.values, f"streams[{i}].offsets": stream.offsets, f"masks[{i}]": stream.mask}
    _checks.same_device("query", query, given)
    return batch


# The registered operator is the part between the query's projection and the last one, which are ordinary products:
#   s[r, t] = u_m[r] . x_m[t] + c_m[r];  p = softmax over the item's tokens of all streams;  y_m[r] = sum_t p x_m[t];
#   o[r] = sum_m w_m,h y_m[r];  mass_m[r] = sum_t p;  lse[r] = logsumexp_t s, for the H * Q rows r = (h, q) of every item.
# With a seed, y and mass take p times the factors of _dropout.Dropout(dropout, seed), which the backward draws again.
# An item without tokens has y = 0, o = 0, mass = 0, lse = -inf. y and lse are outputs for the backward of the same
# backend to read; the Triton one leaves the factor mass_m out of y_m.
torch.library.define(
    "em3::qformer_attention",
    "(Tensor[] u, Tensor? c, Tensor[] w, Tensor[] values, Tensor?[] offsets, Tensor?[] masks, SymInt batch, Tensor? seed,"
    " float dropout, str backend) -> (Tensor[] y, Tensor o, Tensor mass, Tensor lse)",
)
torch.library.define(
    "em3::qformer_attention_backward",
    "(Tensor dout, Tensor? dmass, Tensor[] u, Tensor? c, Tensor[] w, Tensor[] values, Tensor?[] offsets, Tensor?[] masks,"
    " Tensor[] y, Tensor o, Tensor mass, Tensor lse, bool need_u, bool[] need_w, bool[] need_values, Tensor? seed,"
    " float dropout, str backend) -> (Tensor[] du, Tensor dc, Tensor[] dw, Tensor[] dvalues)",
)


@torch.library.impl("em3::qformer_attention", "default")
def _forward(u, c, w, values, offsets, masks, batch, seed, dropout, backend):
    check_content(values, offsets)
    args = (u, c, w, values, offsets, masks, batch, _drop(seed, dropout))
    with _checks.no_autocast(values[0].device):
        return _dispatch.choose("qformer_attention", backend, args, _about(*args)).forward(*args)


@torch.library.impl("em3::qformer_attention_backward", "default")
def _backward(dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_w, need_values, seed, dropout,
              backend):  # fmt: skip
    check_content(values, offsets)
    drop = _drop(seed, dropout)
    args = (u, c, w, values, offsets, masks, lse.shape[1], drop)
    chosen = _dispatch.choose("qformer_attention", backend, args, _about(*args))
    with _checks.no_autocast(lse.device):
        return chosen.backward(
            dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_w, need_values, drop
        )


def _drop(seed, dropout):
    return None if seed is None else Dropout(dropout, seed)


def _about(u, c, w, values, offsets, masks, batch, drop):
    """What the choice of a backend depends on. Not on gradients: an operator's forward does not know who wants them."""
    h, of_items, q, _ = u[0].shape
    kind = f"{layout(values[0], offsets[0], u[0])} {'shared' if of_items == 1 else 'own'}"
    return u[0], kind, (batch, q, h, w[0].shape[1], *_sizes(values, offsets))


def check_content(values, offsets):
    """In the backward again: the user's offsets may have been written to in between."""
    for m, bounds in enumerate(offsets):
        if bounds is not None:
            _checks.offsets_content(bounds, values[m].shape[0], f"streams[{m}].offsets")


@torch.library.register_fake("em3::qformer_attention")
def _forward_fake(u, c, w, values, offsets, masks, batch, seed, dropout, backend):
    h, _, q, _ = u[0].shape
    wide = torch.float64 if u[0].dtype == torch.float64 else torch.float32
    y = [u[0].new_empty(h, batch, q, x.shape[-1]) for x in values]
    o, mass = u[0].new_empty(h, batch, q, w[0].shape[1]), u[0].new_empty(len(u), h, batch, q, dtype=wide)
    return y, o, mass, u[0].new_empty(h, batch, q, dtype=wide)


@torch.library.register_fake("em3::qformer_attention_backward")
def _backward_fake(dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, need_u, need_w, need_values, seed,
                   dropout, backend):  # fmt: skip
    dc = lse.new_empty(len(u), *u[0].shape[:3])
    dw, dvalues = (
        [t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True)]
        for tensors, needs in ((w, need_w), (values, need_values))
    )
    return [x.new_empty(x.shape) for x in u], dc, dw, dvalues


def _setup_context(ctx, inputs, output):
    u, c, w, values, offsets, masks, _, seed, dropout, backend = inputs
    y, o, mass, lse = output
    ctx.mark_non_differentiable(*y, lse)
    ctx.set_materialize_grads(False)
    ctx.m, ctx.dropout, ctx.backend = len(u), dropout, backend
    ctx.save_for_backward(*u, *w, *values, *y, *offsets, *masks, c, o, mass, lse, seed)


def _autograd(ctx, _, dout, dmass, __):
    m, saved = ctx.m, ctx.saved_tensors
    u, w, values, y, offsets, masks = (list(saved[i * m : (i + 1) * m]) for i in range(6))
    c, o, mass, lse, seed = saved[6 * m :]
    need = ctx.needs_input_grad
    dout = torch.zeros_like(o) if dout is None else dout.contiguous()
    dmass = None if dmass is None else dmass.contiguous()
    du, dc, dw, dvalues = torch.ops.em3.qformer_attention_backward(
        dout, dmass, u, c, w, values, offsets, masks, y, o, mass, lse, any(need[0]) or need[1], list(need[2]),
        list(need[3]), seed, ctx.dropout, ctx.backend,
    )  # fmt: skip
    return (
        _wanted(du, need[0]), dc if need[1] else None, _wanted(dw, need[2]), _wanted(dvalues, need[3]),
        _no_gradient(offsets), _no_gradient(masks), None, None, None, None,
    )  # fmt: skip


def _wanted(grads, need):
    return [g if n else None for g, n in zip(grads, need, strict=True)]


def _no_gradient(given):
    """What register_autograd wants back for a ``Tensor?[]``: it takes a list apart only if it is full of tensors."""
    return None if any(t is None for t in given) else [None] * len(given)


torch.library.register_autograd("em3::qformer_attention", _autograd, setup_context=_setup_context)
_checks.no_second_order("qformer_attention")
