"""The ``cpp`` backend: the compiled CPU kernels of csrc/cpu.

They are called with the tensors themselves, and check the dtype, shape, strides and device of each (csrc/tensor.h).
``EM3_CPU_ISA`` (``baseline``, ``avx2``, ``avx512`` or ``avx512_bf16``) forces an instruction set; without it the widest one
that the processor has is used.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

isa = os.environ.get("EM3_CPU_ISA", "")


def unavailable() -> str | None:
    """None, or the reason why the compiled kernels cannot be used in this process."""
    return _why_not(isa)


@functools.cache
def _why_not(isa: str) -> str | None:
    from ...env import extension

    module, reason = extension()
    if module is None or not isa:
        return reason
    sets = module.cpu_features()["isa"]
    if isa not in sets:
        return f"EM3_CPU_ISA={isa}: must be one of {', '.join(sets)}"
    return None if sets[isa] is None else f"EM3_CPU_ISA={isa}: {sets[isa]}"


def multiplies_bf16() -> bool:
    """Whether the instruction set has products of numbers in bf16."""
    return _widest(isa) == "avx512_bf16"


@functools.cache
def _widest(isa: str) -> str:
    widest: str = isa or compiled().cpu_features()["default"]
    return widest


@functools.cache
def compiled() -> ModuleType:
    return importlib.import_module("em3._C")
