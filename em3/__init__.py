"""em3: fused kernels that let a click-through ranking loss train a multimodal item encoder.

The dimension letters of the whole project: ``B`` items or users in the batch, ``N`` tokens or history length, ``T``
all tokens of a jagged batch, ``Q`` queries, ``H`` heads, ``D`` model width, ``E = D / H`` head width, ``C`` width of a
token stream, ``R`` LoRA rank, ``G`` adapters, ``V`` width of the contrastive space.
"""

from typing import Any

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("em3 needs torch, 2.10 or newer, which is not installed: pip install torch") from error

from . import adapters, ops, reference
from ._version import __version__
from .adapters import patch, unpatch
from .data.content_bank import ContentBank
from .jagged import Jagged
from .layers import ContentIDContrastiveLoss, FusionQFormer, LoRALinear, LoRATargetAttention, QFormerAttention
from .models import EM3
from .ops._checks import debug_checks
from .ops._dispatch import BackendError, set_backend, use_backend

__all__ = [
    "EM3",
    "BackendError",
    "ContentBank",
    "ContentIDContrastiveLoss",
    "FusionQFormer",
    "Jagged",
    "LoRALinear",
    "LoRATargetAttention",
    "QFormerAttention",
    "__version__",
    "adapters",
    "debug_checks",
    "env_report",
    "ops",
    "patch",
    "reference",
    "set_backend",
    "unpatch",
    "use_backend",
]


def env_report() -> Any:
    """What is built, what is usable and why not; ``str()`` of it is the text of ``em3 env``."""
    from . import env  # not needed by anyone who only computes, so not imported with em3

    return env.env_report()
