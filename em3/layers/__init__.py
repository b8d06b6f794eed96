"""The operations as modules: parameters and their initialisation, no mathematics."""

from .contrastive_loss import ContentIDContrastiveLoss
from .qformer_attention import QFormerAttention

__all__ = ["ContentIDContrastiveLoss", "QFormerAttention"]
