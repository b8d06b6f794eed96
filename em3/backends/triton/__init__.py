"""The ``triton`` backend: the kernels of em3.kernels, on CUDA GPUs.

With ``TRITON_INTERPRET=1`` a call that asks for this backend by name runs on the CPU, in Triton's interpreter, for tests.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def unavailable() -> str | None:
    """None, or the reason why Triton kernels cannot run in this process."""
    from ...env import triton_kernels

    return triton_kernels()


@functools.cache
def cannot_use(device: torch.device) -> str | None:
    """None, or the reason why they cannot run on this device's tensors."""
    if device.type == "cpu" and importlib.import_module("em3.kernels").interpreting():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it computes on CUDA GPUs and the tensors are on {device}" + (" of ROCm" if device.type == "cuda" else "")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, and {device} has {'.'.join(map(str, capability))}"
    return None


def kernel(op: str) -> ModuleType:
    """The operation's kernels; imports Triton."""
    return importlib.import_module(f"em3.kernels.{op}")
