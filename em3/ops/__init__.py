"""The operations: checks, strategy, dispatch and autograd. One module an operation; backends are found by ``_dispatch``."""

from .contrastive_loss import contrastive_loss
from .qformer_attention import qformer_attention

__all__ = ["contrastive_loss", "qformer_attention"]
