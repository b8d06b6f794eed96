"""``contrastive_loss``: content and ID embeddings of a batch told apart by each other. Public function, operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tuning import About
from . import _checks, _dispatch

DUPLICATES = ("mask", "positive", "keep")
DIRECTIONS = ("both", "content_to_id", "id_to_content")
REDUCTIONS = ("mean", "sum", "none")


def contrastive_loss(content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                     duplicates: str = "mask", logit_scale: float | Tensor, log_q: Tensor | None = None,
                     weight: Tensor | None = None, negatives: Tensor | None = None, direction: str = "both",
                     reduction: str = "mean", normalize: bool = True, backend: str | None = None) -> Tensor:  # fmt: skip
    """In-batch InfoNCE between the content and the ID embedding of each item, in memory linear in ``B``.

    With ``x`` and ``y`` the rows of ``content`` and ``ids_embedding``, each divided by its length if ``normalize``,
    and the corrected logit of a candidate ``L_ij = logit_scale * x_i . y_j - log_q_j``::

        content_to_id:  loss_i = logsumexp_j L_ij - L_ii              j over the batch's rows and the extra negatives
        id_to_content:  loss_i = logsumexp_j L'_ij - L'_ii            L'_ij = logit_scale * y_i . x_j - log_q_j
        both:           the average of the two

    Rows with equal ``item_ids`` hold the same item. ``duplicates`` says what the *other* rows of row ``i``'s item are:

    - ``"mask"``: no candidates of row ``i``. Where nothing else is left, the loss is 0.
    - ``"positive"``: positives like itself, ``loss_i = logsumexp_j L_ij - mean over positives p of L_ip`` (SupCon's
      ``L_out``; every row stays a candidate).
    - ``"keep"``: negatives like any other row; ``item_ids`` then make no difference.

    Without ``item_ids`` every row is an item of its own, and ``"positive"`` is an error.

    ``log_q`` is the logarithm of the probability with which the sampler puts each item into the batch. Subtracting it,
    from the positive's logit too, makes in-batch negatives stand for the whole catalogue (sampled softmax). Extra
    negatives are taken as they are, with ``log_q = 0``, and are never masked: they carry no item ids.

    A row no longer than 1e-12 counts as the zero vector under ``normalize``: its logits are 0, its gradient is zero.
    All arithmetic on embeddings is in float32 (float64 for float64), under autocast too, where the arguments may differ
    in dtype; what is one number a row is summed in float64.

    Args:
        content, ids_embedding: ``[B, V]``; row ``i`` of both belongs to one item.
        item_ids: ``[B]``, int64 or int32, or None.
        duplicates: ``"mask"``, ``"positive"`` or ``"keep"``.
        logit_scale: the factor of the similarities (the inverse of the temperature): a number, or a floating-point
            tensor with one element.
        log_q: ``[B]`` or None.
        weight: ``[B]`` or None: a factor ``w_i >= 0`` of each row's loss.
        negatives: ``[K, V]`` or None: further ID embeddings that ``content_to_id`` contrasts with.
        direction: ``"both"``, ``"content_to_id"`` or ``"id_to_content"``.
        reduction: ``"mean"`` = ``sum(w l) / sum(w)`` (0 if that sum is 0), ``"sum"`` = ``sum(w l)``, ``"none"`` = ``w l``.
        normalize: whether similarities are cosines.
        backend: ``"auto"`` or a backend's name; the process-wide choice (``em3.set_backend``) by default.

    Returns:
        A tensor without dimensions, or ``[B]`` for ``"none"``, of the embeddings' dtype (under autocast: float32, or
        float64). Gradients flow to every floating-point argument that requires them; second-order ones are an error.

    Raises:
        ValueError: naming the argument, what it was and what it must be.
        em3.BackendError: if the backend asked for cannot serve the call.

    Sources: InfoNCE (van den Oord et al., arXiv 1807.03748), its symmetric form (CLIP, arXiv 2103.00020, figure 3),
    several positives (SupCon, arXiv 2004.11362, equation 2), logQ (Bengio and Senecal, "Adaptive Importance Sampling",
    2008; Yi et al., "Sampling-Bias-Corrected Neural Modeling", RecSys 2019). EM3's task: arXiv 2404.06078.
    """
    dtype = content.dtype
    if _checks.autocast_is_on(content.device):
        # A bf16 logit near 100 is off by 0.25: nothing is cast down here, half inputs are cast up.
        content, ids_embedding, negatives = (_widened(t, content) for t in (content, ids_embedding, negatives))
        dtype = content.dtype
    _check(content, ids_embedding, item_ids, logit_scale, log_q, weight, negatives)
    _check_options(item_ids is not None, negatives is not None, duplicates, direction, reduction)

    x, y = _widened(content, content), _widened(ids_embedding, content)  # [B, V]
    extra, log_q, weight = (_widened(t, content) for t in (negatives, log_q, weight))
    # In float64, for its gradient is a sum of large terms of either sign, to be rounded once, at its end.
    if isinstance(logit_scale, Tensor):
        scale = logit_scale.to(torch.float64).view(())
    else:
        scale = x.new_full((), logit_scale, dtype=torch.float64)
    if normalize:
        x, y, extra = _unit(x), _unit(y), None if extra is None else _unit(extra)
    loss = _losses(x, y, extra, scale, item_ids, duplicates, log_q, direction, _dispatch.requested(backend))
    return _reduced(loss, weight, reduction).to(dtype)


def _losses(x: Tensor, y: Tensor, extra: Tensor | None, scale: Tensor, item_ids: Tensor | None, duplicates: str,
            log_q: Tensor | None, direction: str, request: str) -> Tensor:  # fmt: skip
    """``loss_i [B]`` in float64, from the logsumexp over the *other* candidates ``n_i``.

    With the positive's logit ``p_i``, ``logsumexp(p_i, n_i) - p_i = log(1 + exp(n_i - p_i))``. Here the positive cancels
    exactly, so that a loss of 1e-4 keeps its digits where logits are near 100.
    """
    offset = None if log_q is None else -log_q  # [M], M = B + K candidates
    candidates = y if extra is None else torch.cat([y, extra])  # [M, V]
    if offset is not None and extra is not None:
        offset = torch.cat([offset, offset.new_zeros(extra.shape[0])])
    asked = [direction in ("both", way) for way in DIRECTIONS[1:]]
    masked = item_ids if duplicates == "mask" else None
    statistics = torch.ops.em3.contrastive_loss(x, candidates, scale, masked, offset, *asked, request)
    if duplicates == "positive":
        # Here the positives cancel each other; where all rows are one item, all but entirely.
        x, y = x.double(), y.double()
    positive = scale * (x * y).sum(-1, dtype=scale.dtype)  # [B]
    if log_q is not None:
        positive = positive - log_q
    # At the threshold log(1 + e^40) is 40 in float64 too; the default of 20 is off by 2e-9.
    ways = [F.softplus(n - positive, threshold=40) for n, a in zip(statistics, asked, strict=True) if a]
    loss = sum(ways[1:], ways[0]) / len(ways)
    if duplicates != "positive" or item_ids is None:
        return loss
    group, count = _groups(item_ids)
    spread_y, spread_x = y - _mean_of_group(y, group, count), x - _mean_of_group(x, group, count)  # [B, V]
    excess = {"content_to_id": x * spread_y, "id_to_content": y * spread_x, "both": (x * spread_y + y * spread_x) / 2}
    loss = loss + scale * excess[direction].sum(-1)
    return loss if log_q is None else loss - (log_q - _mean_of_group(log_q, group, count))


def _groups(item_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's item as a number under ``B``, and that item's rows, ``[B]`` each; no shape depends on the content."""
    ids, order = item_ids.sort(stable=True)
    first = torch.cat([ids[:1] != ids[:1], ids[1:] != ids[:-1]])
    group = torch.empty_like(order).scatter(0, order, first.cumsum(0))
    count = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
    return group, count[group]


def _mean_of_group(rows: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """``[B, ...]``: in place of each row the mean of the rows of its item."""
    sums = torch.zeros_like(rows).index_add(0, group, rows)[group]
    return sums / count.view(-1, *[1] * (rows.dim() - 1))


def _unit(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norm > 1e-12, norm, torch.inf)


def _reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        loss = weight * loss
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None:
        return loss.sum() / max(1, loss.shape[0])
    mass = weight.sum()
    return loss.sum() / torch.where(mass == 0, torch.inf, mass)


def _widened(tensor: Tensor | None, like: Tensor) -> Any:
    return None if tensor is None else tensor.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _check(content: Tensor, ids_embedding: Tensor, item_ids: Tensor | None, logit_scale: float | Tensor,
           log_q: Tensor | None, weight: Tensor | None, negatives: Tensor | None) -> None:  # fmt: skip
    _checks.shape(content, ["B", "V"], "content")
    b, v = content.shape
    _checks.shape(ids_embedding, [b, v], "ids_embedding")
    if negatives is not None:
        _checks.shape(negatives, ["K", v], "negatives")
    _checks.same_device_and_dtype("content", content, {"ids_embedding": ids_embedding, "negatives": negatives})
    if item_ids is not None:
        _checks.shape(item_ids, [b], "item_ids")
        if item_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"item_ids: was {item_ids.dtype}, must be torch.int64 or torch.int32")
    numbers = {"log_q": log_q, "weight": weight}
    for name, tensor in numbers.items():
        if tensor is not None:
            _checks.shape(tensor, [b], name)
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale: was {list(logit_scale.shape)}, must be a number or a tensor with one element")
        numbers["logit_scale"] = logit_scale
    elif not isinstance(logit_scale, (int, float)):
        raise ValueError(f"logit_scale: was {type(logit_scale).__name__}, must be a number or a tensor with one element")
    for name, tensor in numbers.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: was {tensor.dtype}, must be of a floating-point dtype")
    _checks.same_device("content", content, numbers | {"item_ids": item_ids})


def _check_options(has_ids: bool, has_negatives: bool, duplicates: str, direction: str, reduction: str) -> None:
    _checks.one_of(duplicates, DUPLICATES, "duplicates")
    _checks.one_of(direction, DIRECTIONS, "direction")
    _checks.one_of(reduction, REDUCTIONS, "reduction")
    if duplicates == "positive" and not has_ids:
        raise ValueError("item_ids: was None, must be given for duplicates='positive', which asks which rows are one item")
    if has_negatives and direction == "id_to_content":
        raise ValueError(
            "negatives: were given with direction='id_to_content', which contrasts with content rows and would ignore "
            "these ID embeddings; must be None, or use direction='both' or 'content_to_id'"
        )


# The registered operator is the part that must never hold B x B numbers. With S = scale x y^T, candidates j != i that are
# not of row i's item (item_ids), and offsets of the M = B + K candidates:
#   row_i = logsumexp_j (S_ij + offset_j), j < M;  col_j = logsumexp_i (S_ij + offset_i), i < B, for j < B.
# -inf where no candidate is left; empty where not asked for. x and y come in float32 or float64, scale in float64.
torch.library.define(
    "em3::contrastive_loss",
    "(Tensor x, Tensor y, Tensor scale, Tensor? item_ids, Tensor? offset, bool rows, bool cols, str backend)"
    " -> (Tensor row, Tensor col)",
)
torch.library.define(
    "em3::contrastive_loss_backward",
    "(Tensor? drow, Tensor? dcol, Tensor x, Tensor y, Tensor scale, Tensor? item_ids, Tensor? offset, Tensor row,"
    " Tensor col, bool[] need, str backend) -> (Tensor dx, Tensor dy, Tensor dscale, Tensor doffset)",
)


@torch.library.impl("em3::contrastive_loss", "default")
def _forward(x, y, scale, item_ids, offset, rows, cols, backend):
    args = (x, y, scale, item_ids, offset, rows, cols)
    with _checks.no_autocast(x.device):
        return _dispatch.choose("contrastive_loss", backend, args, _about(x, y, item_ids)).forward(*args)


@torch.library.impl("em3::contrastive_loss_backward", "default")
def _backward(drow, dcol, x, y, scale, item_ids, offset, row, col, need, backend):
    args = (x, y, scale, item_ids, offset, row.shape[0] > 0, col.shape[0] > 0)
    chosen = _dispatch.choose("contrastive_loss", backend, args, _about(x, y, item_ids))
    with _checks.no_autocast(x.device):
        return chosen.backward(drow, dcol, x, y, scale, item_ids, offset, row, col, need)


def _about(x: Tensor, y: Tensor, item_ids: Tensor | None) -> About:
    """What the choice of a backend depends on."""
    return x, "plain" if item_ids is None else "ids", (x.shape[0], *y.shape)


@torch.library.register_fake("em3::contrastive_loss")
def _forward_fake(x, y, scale, item_ids, offset, rows, cols, backend):
    return x.new_empty(x.shape[0] if rows else 0), x.new_empty(x.shape[0] if cols else 0)


@torch.library.register_fake("em3::contrastive_loss_backward")
def _backward_fake(drow, dcol, x, y, scale, item_ids, offset, row, col, need, backend):
    wanted = zip((x, y, scale, offset), need, strict=True)
    return tuple(t.new_empty(t.shape) if n else x.new_empty(0) for t, n in wanted)


def _setup_context(ctx, inputs, output):
    x, y, scale, item_ids, offset, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, scale, item_ids, offset, *output)


def _autograd(ctx, drow, dcol):
    x, y, scale, item_ids, offset, row, col = ctx.saved_tensors
    # A direction that was not asked for has an empty statistic, and so an empty gradient.
    drow, dcol = (None if d is None or not d.numel() else d.contiguous() for d in (drow, dcol))
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = torch.ops.em3.contrastive_loss_backward(
        drow, dcol, x, y, scale, item_ids, offset, row, col, need, ctx.backend
    )
    dx, dy, dscale, doffset = (g if n else None for g, n in zip(grads, need, strict=True))
    return dx, dy, dscale, None, doffset, None, None, None


torch.library.register_autograd("em3::contrastive_loss", _autograd, setup_context=_setup_context)
_checks.no_second_order("contrastive_loss")
