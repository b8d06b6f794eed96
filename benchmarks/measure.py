"""Time, error and the machine's own limits. Everything that is compared takes turns in one process."""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .forms import Call, Inputs, leaves, widened

PARTS = ("forward", "backward", "both")


class Clock:
    """Seconds between marks, on a GPU as the device itself counts them."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_gpu:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def step(call: Call, grad: Tensor | None, device: str) -> tuple[float, float]:
    """Seconds of one forward (as in training: its graph is recorded) and of its backward."""
    clock = Clock(device)
    clock.mark()
    out = call.forward()
    clock.mark()
    torch.autograd.grad(out, list(call.leaves.values()), grad)
    clock.mark()
    forward, backward = clock.seconds()
    return forward, backward


def alternate(calls: dict[str, Call], grad: Tensor | None, device: str, seconds: float, least: int) -> dict[str, np.ndarray]:
    """Seconds ``[rounds, 2]`` of forward and backward of each call; they take turns, so that a machine that slows down
    slows all of them. There are ``least`` rounds, and more until ``seconds`` are over.

    Each timed call finds the heap in its own steady state: freed memory is handed back and an untimed call of the same
    kind goes before. Else a call pays for handing back what its predecessors freed: 8 to 24 ms of system time after one
    that freed 60 MB, in the next call or the one after.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            trim()
            step(call, grad, device)
            times[name].append(step(call, grad, device))
        rounds += 1
    return {name: np.array(of) for name, of in times.items()}


def quantiles(times: np.ndarray) -> dict[str, list[float]]:
    """p20, median and p80 in seconds of forward, backward and both."""
    columns = dict(zip(PARTS, (times[:, 0], times[:, 1], times.sum(1)), strict=True))
    return {part: np.percentile(column, [20, 50, 80]).tolist() for part, column in columns.items()}


def faster(times: np.ndarray, than: np.ndarray, margin: float = 0.0) -> bool:
    """Of seconds ``[rounds]``, taken in turns: by more than the margin in the median, and at all in four rounds of five."""
    ratios = times / than
    return bool(np.median(ratios) < 1 - margin and np.percentile(ratios, 80) < 1)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def trim() -> None:
    """Hand freed memory back to the system, where the C library knows how (glibc)."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def results(call: Call, grad: Tensor | None) -> dict[str, Tensor]:
    """The output and the gradient of each leaf."""
    out = call.forward()
    gradients = torch.autograd.grad(out, list(call.leaves.values()), grad)
    return {"output": out.detach()} | dict(zip(call.leaves, gradients, strict=True))


def true_results(truth: Callable[[Inputs], Tensor], inputs: Inputs, grad: Tensor | None) -> dict[str, Tensor]:
    """What :func:`results` would give without rounding: in float64, of the same inputs."""
    wide = widened(inputs)
    return results(Call(lambda: truth(wide), leaves(wide)), None if grad is None else grad.double())


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """``||got - want|| / ||want||`` of the output and of each gradient that the form has (docs/design.md, Numerics).

    A gradient that is zero by mathematics is held against a third of the largest one, one without dimensions against
    four times it: its sum may cancel. Where there is nothing to hold it against, as in a contrast of one row, the
    difference counts as it is. NaN is infinitely far off: it compares as less than any error.
    """
    largest = max(float(w.norm()) for name, w in want.items() if name != "output")
    found = {}
    for name, value in got.items():
        true = want[name]
        floor = 0.0 if name == "output" else largest / 3 if true.dim() else 4 * largest
        off = float((value.double() - true).norm()) / (max(float(true.norm()), floor) or 1.0)
        found[name] = math.inf if math.isnan(off) else off
    return found


def limit(dtype: torch.dtype) -> float:
    """The largest error of a form that counts as the same function; twice the plain form's own where that is more."""
    return {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)


def copy_rate(device: str, repeats: int = 12) -> float:
    """Bytes a second, read and written together, of copying 256 MiB: more than any cache holds."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _least(lambda: target.copy_(source), device, repeats)


def product_rate(device: str, dtype: torch.dtype, repeats: int = 12) -> float:
    """FLOPs a second of the product of two square matrices, 2,048 wide on a CPU and 8,192 on a GPU."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _least(lambda: a @ b, device, repeats)


def _least(call: Callable[[], object], device: str, repeats: int) -> float:
    """A ceiling is what the machine can do at its best, so the fastest of several."""
    times = []
    for _ in range(repeats + 2):
        clock = Clock(device)
        clock.mark()
        call()
        clock.mark()
        times += clock.seconds()
    return min(times[2:])


def ceilings(device: str, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """What the machine itself can do: ``copy`` in bytes a second, and ``products`` in FLOPs a second for each dtype."""
    return {"copy": copy_rate(device), "products": {name_of(d): product_rate(device, d) for d in dtypes}}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
