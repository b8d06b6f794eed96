"""``qformer_attention``: a few learned queries read many tokens. Public function and cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..jagged import Stream, num_items, parse_stream
from ..tuning import decide, gradients, layout
from . import _checks, _dispatch, _projected, _qformer_step
from ._qformer_operator import sizes

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
    _checks.outside_transforms("qformer_attention")
    _checks.tensor(query, "query", " [Q, D] or [B, Q, D]")
    parsed = parse(streams, masks)
    wk, wv = weights_of(w_k, "w_k", len(parsed)), weights_of(w_v, "w_v", len(parsed))
    bk, bv = per_stream(b_k, "b_k", len(parsed)), per_stream(b_v, "b_v", len(parsed))
    query, w_q, w_o, b_q, b_o, *rest = _checks.autocast(
        query, w_q, w_o, b_q, b_o, *(s.values for s in parsed), *wk, *wv, *bk, *bv, device=query.device
    )
    m = len(parsed)
    parsed = [s._replace(values=x) for s, x in zip(parsed, rest[:m], strict=True)]
    wk, wv, bk, bv = rest[m : 2 * m], rest[2 * m : 3 * m], rest[3 * m : 4 * m], rest[4 * m :]
    batch = check_call(query, parsed, w_q, wk, wv, w_o, b_q, bk, bv, b_o, num_heads)
    _checks.one_of(strategy, STRATEGIES, "strategy")
    _checks.probability(dropout, "dropout")
    if scale is not None and not (_checks.is_number(scale) and math.isfinite(scale)):
        raise ValueError(f"scale: was {scale!r}, must be a finite number")
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
            dims = (batch, query.shape[-2], num_heads, d, *sizes([s.values for s in parsed], [s.offsets for s in parsed]))
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
    *of_items, n, d = q.shape
    q = q.view(*(of_items or (1,)), n, h, d // h)
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

    Keys and values of jagged streams are padded, where the offsets may be read: 48 items of 1 to 349 tokens, 45 in the mean,
    C=D=256, H=8, Q=32 took 37 ms absorbed and 94 to 102 projected.
    """
    absorb = project = of_padding = 0.0
    for stream in streams:
        batch = num_items(stream)
        tokens, c = sizes([stream.values], [stream.offsets])
        absorb += (4.7 if h * q * c <= 1 << 19 else 6) * tokens * h * q * c + 4.5 * batch * q * c * d
        project += 4 * tokens * c * d + 7 * tokens * q * d
    if absorb <= project:
        return "absorb"
    for values, offsets, _ in streams:
        if offsets is not None and _checks.readable(offsets) and len(offsets) > 1:
            of_padding += 7 * (int(offsets.diff().max()) * (len(offsets) - 1) - len(values)) * q * d
    return "absorb" if absorb <= project + of_padding else "project"


def _absorbed(q: Tensor, streams: Sequence[Stream], w_k: Sequence[Tensor], w_v: Sequence[Tensor],
              b_k: Sequence[Tensor | None], b_v: Sequence[Tensor | None], batch: int, seed: Tensor | None, dropout: float,
              request: str) -> Tensor:  # fmt: skip
    _, nq, h, e = q.shape
    given = (q, *w_k, *w_v, *b_k, *b_v)
    if _checks.in_float32(given) and _checks.eager_on_cpu((*given, *(s.values for s in streams))):
        return _qformer_step.attend(q, streams, w_k, w_v, b_k, b_v, batch, seed, dropout, request)
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
    if not hasattr(given, "__len__"):
        raise ValueError(f"{name}: was {type(given).__name__}, must be a tensor, or a list of one for each of the {count} streams")
    if len(given) != count:
        raise ValueError(f"{name}: held {len(given)} entries, must hold one for each of the {count} streams")
    return list(given)


def weights_of(given: Any, name: str, count: int) -> list:
    found = per_stream(given, name, count)
    for i, weight in enumerate(found):
        _checks.tensor(weight, f"{name}[{i}]", " [D, C]")
    return found


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
    if not d:
        raise ValueError(f"query: was {list(query.shape)}, must be of a width D of at least 1")
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
