"""The operations: checks, strategy, dispatch and autograd. One module an operation; backends are found by ``_dispatch``."""

from .contrastive_loss import contrastive_loss
from .contrastive_metrics import ContrastiveMetrics, contrastive_metrics
from .lora_linear import lora_linear
from .lora_target_attention import lora_target_attention
from .qformer_attention import qformer_attention
from .qformer_attention_weights import qformer_attention_weights

__all__ = [
    "ContrastiveMetrics",
    "contrastive_loss",
    "contrastive_metrics",
    "lora_linear",
    "lora_target_attention",
    "qformer_attention",
    "qformer_attention_weights",
]
