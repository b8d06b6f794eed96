"""The operations as modules: parameters and their initialisation, no mathematics."""

from .qformer_attention import QFormerAttention

__all__ = ["QFormerAttention"]
