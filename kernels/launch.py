"""What the launches of every kernel share: the table of tiles, and what is to be known of the device."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# All that a thread can have: where the assembler chooses, it may spill a few for the sake of more programs at a time.
REGISTERS = 255


@functools.cache
def table(op: str) -> dict[str, Any]:
    """The tiles of an operation's kernels."""
    tiles: dict[str, Any] = json.loads((Path(__file__).parent / f"{op}.json").read_text())
    return tiles


def waves(device: torch.device) -> int:
    """Programs that a launch aims at: two for each multiprocessor."""
    if device.type != "cuda":  # the interpreter
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision() -> str:
    """Of float32 products; the half types are multiplied as they are and summed in float32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device that a launch goes to."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
