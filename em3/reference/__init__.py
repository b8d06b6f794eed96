"""The oracle of every test: each operation in plain PyTorch, in the formulation of the textbooks, short and slow.

Nothing here is tiled, absorbed or fused; differentiate it with autograd, and run it in float64 for the truth.
"""

from . import padding
from .contrastive_loss import contrastive_loss, contrastive_metrics
from .lora_linear import lora_linear
from .lora_target_attention import lora_target_attention
from .qformer_attention import qformer_attention, qformer_attention_weights

__all__ = [
    "contrastive_loss",
    "contrastive_metrics",
    "lora_linear",
    "lora_target_attention",
    "padding",
    "qformer_attention",
    "qformer_attention_weights",
]
