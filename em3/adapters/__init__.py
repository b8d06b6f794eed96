"""em3 in other packages' models: their weights in em3's layers, em3's operations in their modules.

Nothing of theirs is imported here: whoever has a model of a package has imported it.
"""

from .patching import patch, unpatch
from .qformer import fusion_qformer_from, qformer_attention_from

__all__ = ["fusion_qformer_from", "patch", "qformer_attention_from", "unpatch"]
