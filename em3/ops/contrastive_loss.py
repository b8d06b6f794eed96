"""``contrastive_loss``: content and ID embeddings of a batch told apart by each other. Public function, operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks, _dispatch
from . import _contrastive_terms as terms
from ._contrastive_scope import Alone, Scope, Shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DUPLICATES = ("mask", "positive", "keep")
REDUCTIONS = ("mean", "sum", "none")


def contrastive_loss(content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                     duplicates: str = "mask", logit_scale: float | Tensor, log_q: Tensor | None = None,
                     weight: Tensor | None = None, negatives: Tensor | None = None, direction: str = "both",
                     reduction: str = "mean", normalize: bool = True, group: ProcessGroup | None = None,
                     backend: str | None = None) -> Tensor:  # fmt: skip
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

    With ``group``, the batch is that of all ranks of a process group, concatenated: negatives, duplicates and means are
    those of the whole, and each rank gets the losses of its own rows. Ranks may hold different numbers of rows and extra
    negatives, or none; other options, and which tensors are given and take gradients, must be the same. ``"mean"`` is then
    ``W sum(w l) / sum over all ranks of w`` for ``W`` ranks, so that *the mean over the ranks is the loss of the whole
    batch, and the gradient that DistributedDataParallel averages is its gradient*; of ``"sum"`` and ``"none"``, whose
    losses are those of the own rows, DDP's average is ``1/W`` of the whole batch's gradient. What a rank's backward
    returns is the gradient, to its own tensors, of the sum of all ranks' losses (of ``logit_scale`` a share, which DDP
    adds to the others' like any parameter's; its value must be the same everywhere). So forward and backward are both
    collectives: every rank runs both, with ``torch.autograd.grad`` on the same inputs. The shards go around in a ring and
    are received while the previous one is worked on; no more than two are there beside the rank's own.

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
        group: a ``torch.distributed`` process group of which every rank makes this call, such as
            ``torch.distributed.group.WORLD``; None for the batch of this process alone.
        backend: ``"auto"`` or a backend's name; the process-wide choice (``em3.set_backend``) by default.

    Returns:
        A tensor without dimensions, or ``[B]`` for ``"none"``, of the embeddings' dtype (under autocast: float32, or
        float64). Gradients flow to every floating-point argument that requires them; second-order ones are an error.

    Raises:
        ValueError: naming the argument, what it was and what it must be; on every rank, if ranks differ in what must agree.
        em3.BackendError: if the backend asked for cannot serve the call.
        RuntimeError: if another rank died or did not come within the group's timeout (a ``RingError``, which names it).

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
    if group is not None:
        _check_group(group)
        item_ids = None if item_ids is None else item_ids.long()

    x, y = _widened(content, content), _widened(ids_embedding, content)  # [B, V]
    extra, log_q, weight = (_widened(t, content) for t in (negatives, log_q, weight))
    # In float64, for its gradient is a sum of large terms of either sign, to be rounded once, at its end.
    if isinstance(logit_scale, Tensor):
        scale = logit_scale.to(torch.float64).view(())
    else:
        scale = x.new_full((), logit_scale, dtype=torch.float64)
    if normalize:
        x, y, extra = terms.unit(x), terms.unit(y), None if extra is None else terms.unit(extra)
    batch = terms.Batch(x, y, extra, scale, item_ids, log_q, duplicates, direction)
    scope: Scope = Alone(content.shape[0])
    if group is not None:
        options = dict(duplicates=duplicates, direction=direction, reduction=reduction, normalize=normalize)
        scope = _shared(group, batch, weight, options)
    loss = terms.infonce(batch, scope, _dispatch.requested(backend))
    return terms.reduced(loss, weight, reduction, scope).to(dtype)


def _shared(group: Any, batch: terms.Batch, weight: Tensor | None, options: dict[str, Any]) -> Shared:
    """The sizes of all ranks; those whose calls would not meet in the ring are told so before it begins."""
    words = [f"{name}={value!r}" for name, value in options.items()] + [f"embeddings in {batch.x.dtype}"]
    for name, tensor in dict(item_ids=batch.item_ids, log_q=batch.log_q, weight=weight).items():
        words.append(f"{name}, {'not given' if tensor is None else 'given'},")
    takers: dict[str, list[Tensor | None]] = {
        "content": [batch.x], "ids_embedding or negatives": [batch.y, batch.extra], "logit_scale": [batch.scale],
        "log_q": [batch.log_q], "weight": [weight],
    }  # fmt: skip
    for name, several in takers.items():
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in several)
        words.append(f"{name} with{'' if gradient else 'out'} a gradient")
    b, v = batch.x.shape
    extra = 0 if batch.extra is None else batch.extra.shape[0]
    return Shared(torch.ops.em3.ring_sizes(batch.x, [b, extra, v], words, group.group_name), group.group_name)


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


def _check_group(group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"group: was {type(group).__name__}, must be a torch.distributed.ProcessGroup that this process belongs to, such as "
            "torch.distributed.group.WORLD after init_process_group"
        )


def _check_options(has_ids: bool, has_negatives: bool, duplicates: str, direction: str, reduction: str) -> None:
    _checks.one_of(duplicates, DUPLICATES, "duplicates")
    _checks.one_of(direction, terms.DIRECTIONS, "direction")
    _checks.one_of(reduction, REDUCTIONS, "reduction")
    if duplicates == "positive" and not has_ids:
        raise ValueError("item_ids: was None, must be given for duplicates='positive', which asks which rows are one item")
    if has_negatives and direction == "id_to_content":
        raise ValueError(
            "negatives: were given with direction='id_to_content', which contrasts with content rows and would ignore "
            "these ID embeddings; must be None, or use direction='both' or 'content_to_id'"
        )
