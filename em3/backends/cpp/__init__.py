"""The ``cpp`` backend: the compiled CPU kernels of csrc/cpu, called with pointers, sizes and strides.

``EM3_CPU_ISA`` (``baseline``, ``avx2`` or ``avx512``) forces an instruction set; without it the widest one that the
processor has is used.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from torch import Tensor

isa = os.environ.get("EM3_CPU_ISA", "")


@functools.cache
def unavailable() -> str | None:
    """None, or the reason why the compiled kernels cannot be used in this process."""
    from ...env import extension

    return extension()[1]


@functools.cache
def compiled() -> ModuleType:
    return importlib.import_module("em3._C")


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
