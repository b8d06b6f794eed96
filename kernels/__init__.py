"""Triton kernels and their launchers: one file an op, named as in em3/ops, with its tuning table (JSON) beside it; ``launch.py``
is what all of them share.

The folder lies at the top of the source tree and is installed as `em3.kernels`. This module imports no
Triton, so that `import em3` stays quick and works where Triton is missing; the files beside it do, and the backends in
em3/backends/triton import those when they are called.
"""

from __future__ import annotations

import importlib.util
import os

# Proved and counted, but timed on no GPU yet.
UNMEASURED = ("qformer_attention", "lora_linear", "lora_target_attention", "contrastive_loss")


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU; it is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """None where Triton kernels can run in this process, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():  # that needs no GPU
        return None
    import torch

    if not torch.cuda.is_available():
        return "no GPU is available to torch (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None
