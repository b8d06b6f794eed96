"""The operations as modules: parameters and their initialisation, no mathematics."""

from .contrastive_loss import ContentIDContrastiveLoss
from .lora_linear import LoRALinear
from .lora_target_attention import LoRATargetAttention
from .qformer_attention import QFormerAttention

__all__ = ["ContentIDContrastiveLoss", "LoRALinear", "LoRATargetAttention", "QFormerAttention"]
