"""``contrastive_loss``: content and ID embeddings of a batch told apart by each other. Public function, operator."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks, _dispatch
from . import _contrastive_checks as check
from . import _contrastive_terms as terms
from . import _contrastive_whole as whole
from ._contrastive_scope import Alone, Scope, Shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def contrastive_loss(content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                     duplicates: str = "mask", logit_scale: float | Tensor, logit_bias: float | Tensor | None = None,
                     log_q: Tensor | None = None, weight: Tensor | None = None, negatives: Tensor | None = None,
                     kind: str = "infonce", label_smoothing: float = 0.0, direction: str = "both",
                     reduction: str = "mean", normalize: bool = True, group: ProcessGroup | None = None,
                     backend: str | None = None) -> Tensor:  # fmt: skip
    """In-batch contrast between the content and the ID embedding of each item, in memory linear in ``B``.

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

    ``label_smoothing`` = ``e`` moves the share ``e`` of the target from the positives to all candidates alike:
    ``loss_i = logsumexp_j L_ij - (1 - e) (mean over positives p of L_ip) - e (mean over candidates j of L_ij)``, which is
    torch's ``cross_entropy`` with that smoothing over the row's candidates. The positive itself is one of them, and so is
    every extra negative; duplicates that are masked are none and get no share.

    ``kind="sigmoid"`` is SigLIP's loss: each pair is told for itself to be of one item or not, by the logit
    ``L_ij = logit_scale * x_i . y_j + logit_bias - log_q_j``::

        content_to_id:  loss_i = softplus(-L_ii) + sum_j softplus(L_ij)    j over the other candidates
        id_to_content:  the same with L'_ij
        both:           the average of the two, whose mean over the batch is SigLIP's

    Masked duplicates are no pairs; with ``"positive"`` their pairs are positive too and each adds ``softplus(-L_ip)``.
    Extra negatives are pairs of ``content_to_id``, and so count half under ``"both"``. With ``log_q`` this is
    noise-contrastive estimation: a pair's logit, less the log-probability with which its candidate was sampled, is the logit
    of coming from the data and not from the sampler. The candidate is the column in ``content_to_id`` and the row in
    ``id_to_content``, so that a pair has two logits under ``"both"``; the own pair has the same in both. The number of
    negatives for each positive, of which the logit takes the logarithm too, is left to ``logit_bias``, as are probabilities
    that are known but for a factor. SigLIP itself has no ``log_q``: its balance is the bias alone.

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
    in dtype; what is one number a row is summed in float64. Embeddings in float64 are for checking: the torch backend serves
    them, takes up to four times as long as plain formulas where B is small (V=128, one thread: B=2 0.24 of their speed, B=128
    0.54), and with every option holds up to 13 times the inputs' size.

    Args:
        content, ids_embedding: ``[B, V]``; row ``i`` of both belongs to one item.
        item_ids: ``[B]``, int64 or int32, or None. Every value is an item: rows of -1 are one too.
        duplicates: ``"mask"``, ``"positive"`` or ``"keep"``.
        logit_scale: the factor of the similarities (the inverse of the temperature): a number, or a floating-point
            tensor with one element.
        logit_bias: what is added to every logit of ``kind="sigmoid"``, for which it must be given: a number, or a
            floating-point tensor with one element. SigLIP's starts at -10, its ``logit_scale`` at 10.
        log_q: ``[B]`` or None; finite and at most 0. More, as a probability has that was given for its logarithm, or -inf,
            that of an item which is never drawn, is an error: on the CPU always, on a GPU under ``em3.debug_checks()``
            only, since looking waits for the device.
        weight: ``[B]`` or None: a factor ``w_i >= 0`` of each row's loss, checked as ``log_q`` is.
        negatives: ``[K, V]`` or None: further ID embeddings that ``content_to_id`` contrasts with.
        kind: ``"infonce"`` or ``"sigmoid"``.
        label_smoothing: from 0 to 1, of ``kind="infonce"``.
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
        RuntimeError: if another rank died or did not come within the group's timeout (a ``RingError``, which says
            what was waited for, and of which rank).

    Sources: InfoNCE (van den Oord et al., arXiv 1807.03748), its symmetric form (CLIP, arXiv 2103.00020, figure 3),
    several positives (SupCon, arXiv 2004.11362, equation 2), logQ (Bengio and Senecal, "Adaptive Importance Sampling",
    2008; Yi et al., "Sampling-Bias-Corrected Neural Modeling", RecSys 2019), label smoothing (Szegedy et al., arXiv
    1512.00567, section 7), sigmoid (SigLIP, arXiv 2303.15343, section 3.2; with log_q: Gutmann and Hyvarinen,
    "Noise-Contrastive Estimation", 2010). EM3's task: arXiv 2404.06078.
    """
    _checks.outside_transforms("contrastive_loss")
    check.embeddings(content, ids_embedding, negatives)
    dtype = content.dtype
    if _checks.autocast_is_on(content.device):
        # A bf16 logit near 100 is off by 0.25: nothing is cast down here, half inputs are cast up.
        content, ids_embedding, negatives = (widened(t, content) for t in (content, ids_embedding, negatives))
        dtype = content.dtype
    check.tensors(content, ids_embedding, item_ids, logit_scale, logit_bias, log_q, weight, negatives)
    check.options(item_ids is not None, negatives is not None, duplicates, direction, normalize)
    check.kind_options(kind, logit_bias, label_smoothing)
    _checks.one_of(reduction, check.REDUCTIONS, "reduction")
    request = _dispatch.requested(backend)
    options = dict(duplicates=duplicates, kind=kind, label_smoothing=label_smoothing, direction=direction,
                   reduction=reduction, normalize=normalize)  # fmt: skip
    if group is None and whole.serves(content, request):
        found = whole.loss(
            content, ids_embedding, negatives, logit_scale, logit_bias, item_ids, log_q, weight, options, request
        )
        if found is not None:
            return found
    batch = prepared(
        content, ids_embedding, item_ids, logit_scale, logit_bias, log_q, negatives, duplicates, direction, kind,
        label_smoothing, normalize,
    )  # fmt: skip
    weight = widened(weight, content)
    scope: Scope = Alone(content.shape[0])
    if group is None:
        check.weights(weight)
    else:
        batch, scope = shared(group, batch, weight, options | plain(logit_scale=logit_scale, logit_bias=logit_bias))
    loss = terms.losses(batch, scope, request)
    return terms.reduced(loss, weight, reduction, scope).to(dtype)


def prepared(content: Tensor, ids_embedding: Tensor, item_ids: Tensor | None, logit_scale: float | Tensor,
             logit_bias: float | Tensor | None, log_q: Tensor | None, negatives: Tensor | None, duplicates: str,
             direction: str, kind: str, label_smoothing: float, normalize: bool) -> terms.Batch:  # fmt: skip
    """What is contrasted, from checked arguments: widened and normalised."""
    x, y = widened(content, content), widened(ids_embedding, content)  # [B, V]
    extra, log_q = widened(negatives, content), widened(log_q, content)
    if normalize:
        x, y, extra = terms.unit(x), terms.unit(y), None if extra is None else terms.unit(extra)
    scale, bias = _number(logit_scale, x), None if logit_bias is None else _number(logit_bias, x)
    return terms.Batch(x, y, extra, scale, bias, item_ids, log_q, duplicates, direction, kind, label_smoothing)


def _number(given: float | Tensor, like: Tensor) -> Tensor:
    """In float64, for its gradient is a sum of large terms of either sign, to be rounded once, at its end."""
    if isinstance(given, Tensor):
        return given.to(torch.float64).view(())
    return like.new_full((), given, dtype=torch.float64)


def plain(**numbers: float | Tensor | None) -> dict[str, Any]:
    """What ranks can compare of them before they meet: that one is a tensor, not its content."""
    return {name: "a tensor" if isinstance(number, Tensor) else number for name, number in numbers.items()}


def shared(group: Any, batch: terms.Batch, weight: Tensor | None, options: dict[str, Any]) -> tuple[terms.Batch, Shared]:
    """The batch among those of all ranks; ranks whose calls would not meet in the ring are told so before it begins."""
    check.process_group(group)
    batch = batch._replace(item_ids=None if batch.item_ids is None else batch.item_ids.long())
    words = [f"{name}={value!r}" for name, value in options.items()] + [f"embeddings in {batch.x.dtype}"]
    for name, tensor in dict(item_ids=batch.item_ids, log_q=batch.log_q, weight=weight).items():
        words.append(f"{name}, {'not given' if tensor is None else 'given'},")
    takers: dict[str, list[Tensor | None]] = {
        "content": [batch.x], "ids_embedding": [batch.y], "ids_embedding or negatives": [batch.y, batch.extra],
        "logit_scale": [batch.scale], "logit_bias": [batch.bias], "log_q": [batch.log_q], "weight": [weight],
    }  # fmt: skip
    for name, several in takers.items():
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in several)
        words.append(f"{name} with{'' if gradient else 'out'} a gradient")
    b, v = batch.x.shape
    extra = 0 if batch.extra is None else batch.extra.shape[0]
    wrong = check.refused(batch.offset, weight)
    words.append(f"log_q and weight with values that are {'allowed' if wrong is None else 'refused'}")
    if wrong is not None:
        with contextlib.suppress(ValueError):
            torch.ops.em3.ring_sizes(batch.x, [b, extra, v], words, group.group_name)
        raise wrong
    sizes = torch.ops.em3.ring_sizes(batch.x, [b, extra, v], words, group.group_name)
    return batch, Shared(sizes, group.group_name)


def widened(tensor: Tensor | None, like: Tensor) -> Any:
    """In the dtype that is computed in with ``like``: float32, or float64."""
    return None if tensor is None else tensor.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


