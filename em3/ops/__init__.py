"""The operations: checks, strategy, dispatch and autograd. One module an operation; backends are found by ``_dispatch``."""

from .qformer_attention import qformer_attention

__all__ = ["qformer_attention"]
