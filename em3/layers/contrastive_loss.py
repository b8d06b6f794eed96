"""``ContentIDContrastiveLoss``: the content-ID contrast with its learnable temperature, and bias."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import ContrastiveMetrics, _checks, contrastive_loss, contrastive_metrics
from ..ops import _contrastive_checks as check
from ..ops._contrastive_terms import DIRECTIONS
from . import _given

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Where the scale of each kind starts: CLIP's and SigLIP's.
INIT_LOGIT_SCALE = {"infonce": 1 / 0.07, "sigmoid": 10.0}
INIT_LOGIT_BIAS = -10.0  # SigLIP's


class ContentIDContrastiveLoss(nn.Module):
    """In-batch contrast between content and ID embeddings with a learnable logit scale: EM3's CIC task.

    The scale is kept as its logarithm, as in CLIP (arXiv 2103.00020, section 2.5): it stays positive and a step changes
    it by a factor. A training step that finds it above ``max_logit_scale`` writes the maximum back to the parameter,
    so that it can come down again at once; a clamp inside the formula would leave it there without a gradient.
    ``kind="sigmoid"`` has a learnable ``logit_bias`` too, which stands for how few of the pairs are positive.

    Args:
        init_logit_scale: where the scale starts; by default at ``1 / 0.07``, and at 10 for ``kind="sigmoid"``.
        max_logit_scale: the largest scale.
        init_logit_bias: where the bias of ``kind="sigmoid"`` starts, -10 by default; of that kind only.
        kind, label_smoothing, duplicates, direction, reduction, normalize, backend: as in
            :func:`em3.ops.contrastive_loss`.

    Source: EM3 (arXiv 2404.06078); initial values and the maximum are CLIP's, and SigLIP's (arXiv 2303.15343, section
    3.2) for its kind.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, *, init_logit_scale: float | None = None, max_logit_scale: float = 100.0,
                 init_logit_bias: float | None = None, kind: str = "infonce", label_smoothing: float = 0.0,
                 duplicates: str = "mask", direction: str = "both", reduction: str = "mean", normalize: bool = True,
                 backend: str | None = None) -> None:  # fmt: skip
        super().__init__()
        if kind == "sigmoid" and init_logit_bias is None:
            init_logit_bias = INIT_LOGIT_BIAS
        elif kind == "infonce" and init_logit_bias is not None:
            raise ValueError(f"init_logit_bias: was {init_logit_bias!r}, must be left out with kind='infonce', which has no bias")
        check.kind_options(kind, init_logit_bias, label_smoothing)
        _checks.one_of(duplicates, check.DUPLICATES, "duplicates")
        _checks.one_of(direction, DIRECTIONS, "direction")
        _checks.one_of(reduction, check.REDUCTIONS, "reduction")
        _given.choices("auto", backend)
        init_logit_scale = INIT_LOGIT_SCALE[kind] if init_logit_scale is None else init_logit_scale
        for name, value in dict(init_logit_scale=init_logit_scale, max_logit_scale=max_logit_scale).items():
            _given.number(name, value)
        if not 0 < max_logit_scale < math.inf:
            raise ValueError(f"max_logit_scale: was {max_logit_scale}, must be above 0 and finite")
        if init_logit_bias is not None:
            _given.number("init_logit_bias", init_logit_bias)
        if not 0 < init_logit_scale <= max_logit_scale:
            raise ValueError(
                f"init_logit_scale: was {init_logit_scale}, must be above 0 and at most max_logit_scale {max_logit_scale}"
            )
        self.init_logit_scale, self.max_logit_scale = init_logit_scale, max_logit_scale
        self.init_logit_bias, self.kind, self.label_smoothing = init_logit_bias, kind, label_smoothing
        self.duplicates, self.direction, self.reduction = duplicates, direction, reduction
        self.normalize, self.backend = normalize, backend
        self.log_scale = nn.Parameter(torch.empty(()))
        self.register_parameter("logit_bias", nn.Parameter(torch.empty(())) if kind == "sigmoid" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.init_logit_scale))
        if self.logit_bias is not None and self.init_logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.init_logit_bias)

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the similarities, without dimensions."""
        # Not behind the exponential: that of a parameter at its maximum may be rounded to a little more, and a clamp there
        # would leave it without a gradient.
        return self.log_scale.clamp(max=math.log(self.max_logit_scale)).exp()

    def forward(self, content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                log_q: Tensor | None = None, weight: Tensor | None = None, negatives: Tensor | None = None,
                group: ProcessGroup | None = None) -> Tensor:  # fmt: skip
        """``content, ids_embedding [B, V]`` and the rest as in the operation -> a tensor without dimensions, or ``[B]``.

        ``group`` is given here and not kept: a module that holds a process group cannot be copied or saved.
        """
        self._check(content)
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_logit_scale))
        return contrastive_loss(
            content, ids_embedding, item_ids=item_ids, duplicates=self.duplicates, logit_scale=self.logit_scale,
            logit_bias=self.logit_bias, log_q=log_q, weight=weight, negatives=negatives, kind=self.kind,
            label_smoothing=self.label_smoothing, direction=self.direction, reduction=self.reduction,
            normalize=self.normalize, group=group, backend=self.backend,
        )  # fmt: skip

    def metrics(self, content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                log_q: Tensor | None = None, weight: Tensor | None = None, negatives: Tensor | None = None,
                group: ProcessGroup | None = None) -> ContrastiveMetrics:  # fmt: skip
        """Accuracy@1 and the mean rank of the positive for what ``forward`` was given: :func:`em3.ops.contrastive_metrics`."""
        self._check(content)
        return contrastive_metrics(
            content, ids_embedding, item_ids=item_ids, duplicates=self.duplicates, logit_scale=self.logit_scale,
            log_q=log_q, weight=weight, negatives=negatives, direction=self.direction, normalize=self.normalize, group=group,
        )  # fmt: skip

    def _check(self, content: Tensor) -> None:
        _checks.tensor(content, "content", " [B, V]")
        _given.on_device(content, "content", self.log_scale)

    def extra_repr(self) -> str:
        of_kind = f"label_smoothing={self.label_smoothing}"
        if self.kind == "sigmoid":
            of_kind = f"init_logit_bias={self.init_logit_bias:.4g}"
        return (
            f"kind={self.kind!r}, {of_kind}, "
            f"init_logit_scale={self.init_logit_scale:.4g}, max_logit_scale={self.max_logit_scale:.4g}, "
            f"duplicates={self.duplicates!r}, direction={self.direction!r}, reduction={self.reduction!r}, "
            f"normalize={self.normalize}"
        )
