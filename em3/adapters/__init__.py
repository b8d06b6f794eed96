"""em3 in other packages' models: their weights in em3's layers, em3's operations in their modules.

Nothing of theirs is imported here: whoever has a model of a package has imported it.
"""

from .lora import load_lora, lora_state, read_lora, save_lora
from .patching import patch, unpatch
from .qformer import fusion_qformer_from, qformer_attention_from

__all__ = [
    "fusion_qformer_from",
    "load_lora",
    "lora_state",
    "patch",
    "qformer_attention_from",
    "read_lora",
    "save_lora",
    "unpatch",
]
