"""What the interpreter costs: calls so small that their arithmetic takes no time, and ``import em3``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .forms import Call, Dims
from .operations import gradient
from .registry import OPERATIONS

TINY: dict[str, Dims] = {
    "qformer_attention": {"B": 1, "N": [2], "C": [8], "D": 8, "H": 2, "Q": 1, "tokens": "frozen", "lengths": "full"},
    "lora_linear": {"T": 2, "C": 8, "D": 8, "R": 2, "G": 0},
    "lora_target_attention": {"B": 1, "N": 2, "C": 8, "D": 8, "H": 2, "R": 2, "Q": 1, "bank": 4, "lengths": "full"},
    "contrastive_loss": {"B": 2, "V": 8},
}
CALLS, ROUNDS = 50, 15


def of_operation(op: str, device: str) -> list[dict[str, Any]]:
    """Microseconds a call of em3, of its torch backend and of the plain form."""
    operation = OPERATIONS[op]
    torch.manual_seed(0)
    inputs = operation.make(TINY[op], device, torch.float32)
    forms = {form.name: form for form in operation.forms()}
    calls = {name: forms[name].bind(inputs) for name in ("em3", "em3 torch", "plain")}
    grad = gradient(calls["em3"].forward())
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append([_each(part, device) for part in _parts(call, grad)])
    rows = []
    for name, of_form in times.items():
        columns = zip(("inference", "both"), np.array(of_form).T, strict=True)
        found = {part: (np.percentile(column, [20, 50, 80]) * 1e6).tolist() for part, column in columns}
        rows.append({"suite": "overhead", "op": op, "form": name, "label": f"{op}, tiny", "microseconds": found})
    return rows


def _parts(call: Call, grad: torch.Tensor | None) -> tuple[Callable[[], object], Callable[[], object]]:
    def inference() -> None:
        with torch.no_grad():
            call.forward()

    return inference, lambda: torch.autograd.grad(call.forward(), list(call.leaves.values()), grad)


def _each(call: Callable[[], object], device: str) -> float:
    """Seconds of the host: on a GPU how long a call keeps the thread that launches its kernels."""
    call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    host = (time.perf_counter() - start) / CALLS
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return host


def of_import(runs: int = 5) -> list[dict[str, Any]]:
    """What ``import em3`` adds to ``import torch``, in fresh processes."""
    code = "import time, torch; a = time.perf_counter(); import em3; print(time.perf_counter() - a)"
    words = [sys.executable, "-c", code]
    times = [float(subprocess.run(words, capture_output=True, text=True, check=True).stdout) * 1e6 for _ in range(runs)]
    quantiles = np.percentile(times, [20, 50, 80]).tolist()
    return [{"suite": "overhead", "op": "import", "form": "em3", "label": "import em3, above import torch",
             "microseconds": {"both": quantiles}}]  # fmt: skip
