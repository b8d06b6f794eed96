"""The operations as modules: parameters and their initialisation, no mathematics of their own."""

from .contrastive_loss import ContentIDContrastiveLoss
from .fusion_qformer import FusionQFormer
from .lora_linear import LoRALinear
from .lora_target_attention import LoRATargetAttention
from .mean_tokens import MeanTokens
from .qformer_attention import QFormerAttention

__all__ = [
    "ContentIDContrastiveLoss",
    "FusionQFormer",
    "LoRALinear",
    "LoRATargetAttention",
    "MeanTokens",
    "QFormerAttention",
]
