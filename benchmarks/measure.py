"""Timing and memory that hold on noisy machines: alternating medians in one process, high-water marks in fresh ones."""

from __future__ import annotations

import ctypes
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def medians(calls: dict[str, Callable[[], object]], seconds: float = 4.0, least: int = 7) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that a machine that slows down slows all of them.

    Each timed call finds the heap in its own steady state: freed memory is handed back and an untimed call of the same
    kind goes before. Else a call pays for handing back what its predecessors freed: 8 to 24 ms of system time after one
    that freed 60 MB, in the next call or the one after.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[next(iter(calls))]) < least:
        for name, call in calls.items():
            trim()
            call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def trim() -> None:
    """Hand freed memory back to the system, where the C library knows how (glibc)."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def same_function(results: dict[str, tuple[Tensor, ...]], tolerance: float = 1e-4) -> None:
    """A form that computes something else gets no time: gradients agree with the first one's, each by its norm.

    A gradient that is zero by mathematics is held against a tenth of the largest one.
    """
    first, *others = results
    largest = max(float(g.norm()) for g in results[first])
    for name in others:
        for i, (got, want) in enumerate(zip(results[name], results[first], strict=True)):
            error = float((got - want).norm()) / max(float(want.norm()), largest / 10)
            if not error <= tolerance:
                raise AssertionError(f"{name}: gradient {i} is off by {error:.1e} from that of {first}; no time for it")


def peak_memory(statement: str) -> float:
    """MiB by which ``statement`` raises the high-water mark of a fresh process; a line ``# measure`` parts set-up off."""
    setup, measured = statement.split("# measure\n")
    code = (
        "import json, torch\ntorch.set_num_threads(2)\n"
        "def mark(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name))\n"
        f"{setup}\nbefore = mark('VmRSS')\n{measured}\nprint(json.dumps((mark('VmHWM') - before) / 1024))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def row(op: str, shape: str, peer: str, times: dict[str, float], note: str = "") -> dict:
    """One line of the results: the peer's time, and how many times faster each of ours is."""
    base = times[peer]
    ours = {name: base / t for name, t in times.items() if name != peer}
    return {"op": op, "shape": shape, "peer": peer, "peer_ms": base * 1e3, "speedup": ours, "note": note}
