"""``lora_target_attention``: a target reads a long, LoRA-adapted history. Public function, cost model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..jagged import split_jagged
from ..tuning import decide, gradients, layout
from . import _checks, _dispatch, _lora_target_step, _projected
from ._lora_target_operator import score_dtype
from ._pooling import POOLINGS, SOFTMAX, Pooling
from .lora_linear import lora_linear

STRATEGIES = ("auto", "absorb", "project")
Lora = tuple[Tensor, Tensor, float]  # A [R, C], B [D, R], scaling
Biases = Sequence[tuple[Tensor, Tensor]]  # a table [H, buckets], and the bucket of each place of the history


def lora_target_attention(target: Tensor, history: Any, bank: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor,
                          w_o: Tensor, *, lora_k: Lora | None = None, lora_v: Lora | None = None, num_heads: int,
                          biases: Biases | None = None, pooling: str = "softmax", top_k: int | None = None,
                          strategy: str = "auto", backend: str | None = None) -> Tensor:  # fmt: skip
    """Multi-head attention of target items over the content embeddings of the items in a user's history.

    With ``x_t = bank[history_t]``, ``q = target w_q^T``, ``k_t = x_t (w_k + s_k B_k A_k)^T`` and
    ``v_t = x_t (w_v + s_v B_v A_v)^T``::

        out = concat_h(softmax(q_h k_h^T / sqrt(D / H)) v_h) w_o^T

    With ``biases``, ``table[h, bucket_t]`` of each is added to the scores of place ``t``: of its position, its age.

    ``pooling`` says how scores become weights: ``"softmax"``; ``"din"``, the sigmoid of each score, not normalised: ten
    events that match weigh ten times as much as one (in DIN the weights are not normalised either, and not bounded);
    ``"top_k"``, the softmax over the ``top_k`` best scores of each head, which scores equal to the last of them join, equal
    but for rounding too: so an item that a history names twice counts twice or not at all. The choice has no gradient.

    ``strategy="absorb"`` folds the adapted key projection into the target's query, reads each history row once and
    projects what was read: no row of the history is ever projected. ``"project"`` is the formula as written, and the
    cheaper one when many targets (``H * M`` beyond the width) read one history. ``"auto"`` takes the one that
    ``em3 tune`` measured for such shapes as the faster, else asks the cost model.

    A user without history gets zeros and zero gradient.

    Args:
        target: ``[B, D]``, or ``[B, M, D]`` for ``M`` candidates that share the user's history.
        history: row numbers into ``bank``, int64 or int32: padded ``[B, N]`` with -1 for no item, or jagged
            (``em3.Jagged`` and the like) with values ``[T]``; -1 there means an item that is missing.
        bank: ``[n, C]`` content embeddings; may be of another floating-point dtype than the rest.
        w_q, w_o: ``[D, D]``.
        w_k, w_v: ``[D, C]``.
        lora_k, lora_v: ``(A [R, C], B [D, R], scaling)`` or None.
        num_heads: ``H``; divides ``D``.
        biases: tables ``[H, buckets]`` of any floating-point dtype, each with the bucket of every place of the history,
            int64 or int32 and shaped as its row numbers, -1 for no bias there. In a half type's call they are added in
            float32 where keys are not formed.
        pooling: ``"softmax"``, ``"din"`` or ``"top_k"``; the latter two need the absorbed form. Triton kernels have the first
            only, the compiled ones not the last.
        top_k: how many, at least 1, for ``"top_k"`` only.
        strategy: ``"auto"``, ``"absorb"`` or ``"project"``.
        backend: ``"auto"`` or a backend's name; the process-wide choice (``em3.set_backend``) by default.

    Returns:
        Shaped like ``target``, of its dtype (under autocast: of its dtype). Gradients flow to every floating-point
        argument that requires them, to ``bank`` as a dense tensor, and cost nothing for the others; second-order ones
        are an error. Nothing in the bank reaches a user whose history does not name it, not even NaN.

    Raises:
        ValueError: naming the argument, what it was and what it must be. On a GPU a row number outside the bank raises
            only under ``em3.debug_checks()``; otherwise it counts as missing.
        em3.BackendError: if the backend asked for cannot serve the call.

    Source: target attention of DIN (Zhou et al., arXiv 1706.06978) in multi-head form, over cached content embeddings
    adapted by LoRA (Hu et al., arXiv 2106.09685) as in EM3 (arXiv 2404.06078); the k best of a long history as in SIM
    (Pi et al., arXiv 2006.05639).
    """
    _checks.outside_transforms("lora_target_attention")
    _checks.tensor(target, "target", " [B, D] or [B, M, D]")
    _checks.tensor(bank, "bank", " [n, C]; of a ContentBank give its rows")
    ids, offsets, batch = parse_history(history)
    loras = [_parse_lora(lora, name) for lora, name in ((lora_k, "lora_k"), (lora_v, "lora_v"))]
    target, w_q, w_k, w_v, w_o, *low = _checks.autocast(
        target, w_q, w_k, w_v, w_o, *(t for lora in loras for t in (lora or [None, None])[:2]), device=target.device
    )
    lora_k, lora_v = (None if g is None else (a, b, g[2]) for g, a, b in zip(loras, low[::2], low[1::2], strict=True))
    _check(target, ids, offsets, bank, batch, w_q, w_k, w_v, w_o, lora_k, lora_v, num_heads)
    _checks.one_of(strategy, STRATEGIES, "strategy")
    pool = _pooling(pooling, top_k)
    if pool != SOFTMAX:
        if strategy == "project":
            raise ValueError(f"strategy: was 'project', must be 'absorb' or 'auto' with pooling={pooling!r}")
        strategy = "absorb"
    bias = _bias(biases, ids, num_heads, target)

    request = _dispatch.requested(backend)
    targets = target if target.dim() == 3 else target[:, None]  # [B, M, D]
    m, d = targets.shape[1:]
    if strategy == "auto":
        strategy = cheaper(ids.numel(), batch, bank, m, num_heads, d) if request in ("auto", "torch") else "absorb"
        if request == "auto":
            kind = f"{gradients([bank])} {layout(bank, offsets, target)}"
            dims = (ids.numel(), batch, *bank.shape, m, num_heads, d)
            strategy = decide("lora_target_attention.strategy", target, kind, dims, strategy)
    if strategy == "project":
        _dispatch.serves_projection("lora_target_attention", request)
        out = F.linear(_projected_form(_queries(targets, w_q, num_heads), ids, offsets, bank, w_k, w_v, lora_k, lora_v, bias), w_o)
    else:
        out = _absorbed_form(targets, ids, offsets, bank, w_q, w_k, w_v, w_o, lora_k, lora_v, num_heads, bias, pool, request)
    return out if target.dim() == 3 else out[:, 0]


def _queries(targets: Tensor, w_q: Tensor, num_heads: int) -> Tensor:
    """``[B, M, H, E]``, scaled."""
    batch, m, d = targets.shape
    return F.linear(targets, w_q).view(batch, m, num_heads, d // num_heads) * (d // num_heads) ** -0.5


def cheaper(tokens: int, batch: int, bank: Tensor, m: int, h: int, d: int) -> str:
    """The cost model: a training step with frozen base weights, in multiply-adds of a large product.

    Absorbing costs five products of ``[H M, C]`` with the history's rows, the smaller ones of ``[M, D]`` with the
    weights, and reading the rows. Projecting costs two projections of the rows of the history or of the bank, whichever
    are fewer, seven products of ``[M, D]`` with keys or values, and moving keys, values and their gradients about.

    The factors are a least-squares fit to 32 shapes (B*N from 3,200 to 16,000, D from 128 to 512, M from 8 to 64, banks
    of 2,000 and 20,000 rows; float32, 2 threads): the form they pick is never more than 1.2 times the other's time.
    The last term is of rows wider than the target, which are copied and read twice: of 120 shapes (C from 128 to 1,024, D from
    32 to 256, M of 1, 4 and 16, B*N from 400 to 1,600; one thread's processor time) 4 were more than 1.1 times as slow as the
    other form, 1.4 times at worst, and 28 without it, 3.7 times.
    """
    n, c = bank.shape
    absorb = 5 * tokens * h * m * c + 12 * batch * m * c * d + 56 * tokens * c
    project = 2 * min(tokens, n) * c * d + 10 * tokens * m * d + 370 * tokens * d + 150 * tokens * max(c - d, 0)
    return "absorb" if absorb <= project else "project"


def _absorbed_form(targets: Tensor, ids: Tensor, offsets: Tensor | None, bank: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor,
                   w_o: Tensor, lora_k: Lora | None, lora_v: Lora | None, num_heads: int, bias: Tensor | None, pool: Pooling,
                   request: str) -> Tensor:  # fmt: skip
    w_k, lora_k = _merged(w_k, lora_k)
    w_v, lora_v = _merged(w_v, lora_v)
    given = (targets, w_q, w_k, w_v, w_o)
    if _checks.in_float32(given) and _checks.eager_on_cpu((*given, bank, bias)):
        return _lora_target_step.attend(targets, ids, offsets, bank, w_q, w_k, w_v, w_o, num_heads, bias, pool, request)
    q = _queries(targets, w_q, num_heads)
    batch, m, h, e = q.shape
    c = bank.shape[1]
    rows = q.permute(2, 0, 1, 3).reshape(h, batch * m, e)  # [H, B * M, E]
    u = torch.bmm(rows, w_k.view(h, e, c))  # [H, B * M, C]
    if lora_k is not None:
        a, b, scaling = lora_k
        u = torch.baddbmm(u, torch.bmm(rows, b.view(h, e, b.shape[1])), a.expand(h, -1, -1), alpha=scaling)
    w = w_v.view(h, e, c)
    if lora_v is not None:  # A as further rows of values, for B to be applied to what they have read
        w = torch.cat([w, lora_v[0].expand(h, -1, -1)], 1)  # [H, E + R, C]
    _, out, _ = torch.ops.em3.lora_target_attention(
        u.view(h, batch, m, c), w, ids, offsets, bank, bias, pool.kind, pool.k, request
    )
    if lora_v is not None:
        _, b, scaling = lora_v
        low = out[..., e:].flatten(1, 2)  # [H, B * M, R]
        out = torch.baddbmm(out[..., :e].flatten(1, 2), low, b.view(h, e, b.shape[1]).transpose(1, 2), alpha=scaling)
    return F.linear(out.view(h, batch, m, e).permute(1, 2, 0, 3).reshape(batch, m, h * e), w_o)


def _merged(weight: Tensor, lora: Lora | None) -> tuple[Tensor, Lora | None]:
    """The adapted weight as one matrix, ``D C R`` multiply-adds; in a half type their sum would round small updates away."""
    if lora is None or weight.dtype in (torch.float16, torch.bfloat16):
        return weight, lora
    return torch.addmm(weight, lora[1], lora[0], alpha=lora[2]), None


def _projected_form(q: Tensor, ids: Tensor, offsets: Tensor | None, bank: Tensor, w_k: Tensor, w_v: Tensor,
                    lora_k: Lora | None, lora_v: Lora | None, bias: Tensor | None) -> Tensor:  # fmt: skip
    if offsets is not None and not (_checks.readable(offsets) and int(offsets[-1]) == ids.shape[0]):
        # Behind the last user nobody reads: a row that is named only there would reach the weights' gradients.
        ids = ids.masked_fill(torch.arange(ids.shape[0], device=ids.device) >= offsets[-1], -1)
    rows, present = torch.ops.em3.bank_rows(ids, bank.shape[0])
    flat = rows.reshape(-1)
    mask = None if _checks.readable(present) and bool(present.all()) else present  # None: every place holds an item
    # Project each row of the bank once, then look the projections up?
    fewer = "bank" if bank.shape[0] <= ids.numel() else "history"
    dims = (ids.numel(), *bank.shape, w_k.shape[0])
    whole = decide("lora_target_attention.rows", q, gradients([bank]), dims, fewer) == "bank"
    # Where there is no item, and in place of a row that nobody names, stand zeros: NaN would pass through a weight of 0
    # into the output, and through a gradient of 0 into that of the weights.
    if whole:
        named = torch.zeros(bank.shape[0] + 1, dtype=torch.bool, device=bank.device).index_fill(0, flat, True)
        x = F.pad(bank, (0, 0, 0, 1)).masked_fill(~named[:, None], 0)  # [n + 1, C], the last row for no item
    else:
        x = bank.index_select(0, flat if mask is None else flat.clamp(max=bank.shape[0] - 1))  # [B * N, C]
        x = x if mask is None else x.masked_fill_(~mask.reshape(-1, 1), 0)
    x = x.to(q.dtype)
    k, v = (_projected_rows(x, w, lora) for w, lora in ((w_k, lora_k), (w_v, lora_v)))
    if whole:
        k, v = k.index_select(0, flat), v.index_select(0, flat)
    k, v = (t.view(*rows.shape, t.shape[1]) for t in (k, v))
    return _projected.attend(q, [_projected.Projected(k, v, offsets, mask, bias)], q.shape[0], ["history"])


def _projected_rows(x: Tensor, weight: Tensor, lora: Lora | None) -> Tensor:
    """``x [T, C]`` by the adapted weight, ``[T, D]``.

    A small one is merged under PyTorch's own autograd, whose gradient to the whole weight then costs less than what an
    operator of ours adds to each call. That over `lora_linear`, ms, forward and backward, float32, one thread, R=8, at
    T = 200, 1000, 4000, 12800: C=D=64: 0.16/0.71 0.69/1.04 1.22/2.25 3.79/4.93; C=D=128: 0.61/0.74 0.90/1.87 4.35/4.66
    13.28/13.83; C=D=256, T=1000, 2000: 3.70/3.65 6.87/5.86.
    """
    if lora is not None and x.device.type == "cpu" and weight.numel() <= 1 << 14:
        weight, lora = _merged(weight, lora)
    if lora is None:
        return F.linear(x, weight)
    return lora_linear(x, weight, None, lora[0], lora[1], scaling=lora[2], backend="torch")


def parse_history(history: Any) -> tuple[Tensor, Tensor | None, int]:
    """Row numbers ``[B, N]`` or ``[T]``, offsets of a jagged history, and ``B``."""
    jagged = split_jagged(history, "history")
    ids, offsets = (history, None) if jagged is None else jagged
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"history: was {ids.dtype}, must be torch.int64 or torch.int32 row numbers")
    if ids.dim() != (2 if offsets is None else 1):
        must = "padded [B, N] with -1 for no item, or jagged with values [T]"
        raise ValueError(f"history: was {list(ids.shape)}, must be {must}")
    return ids.long(), offsets, ids.shape[0] if offsets is None else offsets.shape[0] - 1


def _pooling(pooling: str, top_k: int | None) -> Pooling:
    _checks.one_of(pooling, POOLINGS, "pooling")
    if pooling != "top_k":
        if top_k is not None:
            raise ValueError(f"top_k: was {top_k}, must be None with pooling={pooling!r}")
        return Pooling(pooling)
    if top_k is None or not _checks.is_count(top_k) or top_k < 1:
        raise ValueError(f"top_k: was {top_k!r}, must be an integer of at least 1 with pooling='top_k'")
    return Pooling(pooling, int(top_k))


def _bias(biases: Biases | None, ids: Tensor, num_heads: int, target: Tensor) -> Tensor | None:
    """What is added to the scores of each place and head, shaped as ``ids`` and ``H`` wide, in the accumulation dtype."""
    if biases is not None and not isinstance(biases, (tuple, list)):
        raise ValueError(f"biases: was {type(biases).__name__}, must be a list of (table [H, buckets], buckets) or None")
    bias = None
    for i, pair in enumerate(biases or ()):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"biases[{i}]: was {type(pair).__name__}, must be (table [H, buckets], buckets)")
        table, buckets = pair
        _checks.tensor(buckets, f"biases[{i}][1] (buckets)")
        _checks.shape(table, [num_heads, "buckets"], f"biases[{i}][0] (table)")
        _checks.floating(table, f"biases[{i}][0] (table)")
        if buckets.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"biases[{i}][1] (buckets): was {buckets.dtype}, must be torch.int64 or torch.int32")
        _checks.shape(buckets, list(ids.shape), f"biases[{i}][1] (buckets)")
        named = {f"biases[{i}][0] (table)": table, f"biases[{i}][1] (buckets)": buckets}
        _checks.same_device("target", target, named)
        rows = torch.ops.em3.bias_rows(buckets.long(), table.shape[1], f"biases[{i}][1] (buckets)")
        wide = F.pad(table.to(score_dtype(target.dtype)), (0, 1)).t()  # [buckets + 1, H], zeros for no bias
        added = wide.index_select(0, rows.reshape(-1)).view(*ids.shape, num_heads)
        bias = added if bias is None else bias + added
    return bias


def _parse_lora(lora: Any, name: str) -> Lora | None:
    if lora is None:
        return None
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise ValueError(f"{name}: was {type(lora).__name__}, must be (A [R, C], B [D, R], scaling) or None")
    if not _checks.is_number(lora[2]):
        raise ValueError(f"{name}[2] (scaling): was {type(lora[2]).__name__}, must be a number")
    return lora[0], lora[1], float(lora[2])


def _check(target: Tensor, ids: Tensor, offsets: Tensor | None, bank: Tensor, batch: int, w_q: Tensor, w_k: Tensor,
           w_v: Tensor, w_o: Tensor, lora_k: Lora | None, lora_v: Lora | None, num_heads: int) -> None:  # fmt: skip
    if target.dim() not in (2, 3) or target.shape[0] != batch:
        raise ValueError(f"target: was {list(target.shape)}, must be [{batch}, D] or [{batch}, M, D] like history")
    if bank.dim() != 2:
        raise ValueError(f"bank: was {list(bank.shape)}, must be [n, C]")
    _checks.floating(bank, "bank")
    d, c = target.shape[-1], bank.shape[1]
    _checks.divides(num_heads, d, "target")
    for name, tensor, shape in (("w_q", w_q, [d, d]), ("w_k", w_k, [d, c]), ("w_v", w_v, [d, c]), ("w_o", w_o, [d, d])):
        _checks.shape(tensor, shape, name)
    named: dict[str, Tensor | None] = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    for name, lora in (("lora_k", lora_k), ("lora_v", lora_v)):
        if lora is not None:
            _checks.shape(lora[0], ["R", c], f"{name}[0] (A)")
            _checks.shape(lora[1], [d, lora[0].shape[0]], f"{name}[1] (B)")
            if not lora[0].shape[0]:
                raise ValueError(f"{name}[0] (A): was {list(lora[0].shape)}, must be of a rank R of at least 1")
            named |= {f"{name}[0] (A)": lora[0], f"{name}[1] (B)": lora[1]}
    _checks.same_device_and_dtype("target", target, named)
    _checks.same_device("target", target, {"bank": bank, "history": ids, "history.offsets": offsets})
