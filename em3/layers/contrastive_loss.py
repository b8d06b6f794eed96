"""``ContentIDContrastiveLoss``: the content-ID contrast with its learnable temperature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ContentIDContrastiveLoss(nn.Module):
    """In-batch InfoNCE between content and ID embeddings with a learnable logit scale: EM3's CIC task.

    The scale is kept as its logarithm, as in CLIP (arXiv 2103.00020, section 2.5): it stays positive and a step changes
    it by a factor. A training step that finds it above ``max_logit_scale`` writes the maximum back to the parameter,
    so that it can come down again at once; a clamp inside the formula would leave it there without a gradient.

    Args:
        init_logit_scale: where the scale starts.
        max_logit_scale: the largest scale.
        duplicates, direction, reduction, normalize, backend: as in :func:`em3.ops.contrastive_loss`.

    Source: EM3 (arXiv 2404.06078); initial value and maximum are CLIP's.
    """

    def __init__(self, *, init_logit_scale: float = 1 / 0.07, max_logit_scale: float = 100.0, duplicates: str = "mask",
                 direction: str = "both", reduction: str = "mean", normalize: bool = True,
                 backend: str | None = None) -> None:  # fmt: skip
        super().__init__()
        if not 0 < init_logit_scale <= max_logit_scale:
            raise ValueError(
                f"init_logit_scale: was {init_logit_scale}, must be above 0 and at most max_logit_scale {max_logit_scale}"
            )
        self.init_logit_scale, self.max_logit_scale = init_logit_scale, max_logit_scale
        self.duplicates, self.direction, self.reduction = duplicates, direction, reduction
        self.normalize, self.backend = normalize, backend
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.init_logit_scale))

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the similarities, without dimensions."""
        return self.log_scale.exp().clamp(max=self.max_logit_scale)

    def forward(self, content: Tensor, ids_embedding: Tensor, *, item_ids: Tensor | None = None,
                log_q: Tensor | None = None, weight: Tensor | None = None, negatives: Tensor | None = None,
                group: ProcessGroup | None = None) -> Tensor:  # fmt: skip
        """``content, ids_embedding [B, V]`` and the rest as in the operation -> a tensor without dimensions, or ``[B]``.

        ``group`` is given here and not kept: a module that holds a process group cannot be copied or saved.
        """
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_logit_scale))
        return contrastive_loss(
            content, ids_embedding, item_ids=item_ids, duplicates=self.duplicates, logit_scale=self.logit_scale,
            log_q=log_q, weight=weight, negatives=negatives, direction=self.direction, reduction=self.reduction,
            normalize=self.normalize, group=group, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"init_logit_scale={self.init_logit_scale:.4g}, max_logit_scale={self.max_logit_scale:.4g}, "
            f"duplicates={self.duplicates!r}, direction={self.direction!r}, reduction={self.reduction!r}, "
            f"normalize={self.normalize}"
        )
