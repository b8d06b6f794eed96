"""Peak memory of one forward and backward, above its inputs: in a process of its own, so that nothing else is counted.

On a CPU it is the high-water mark of the process; on a GPU the allocator's. The process may use no more than what was
free when it began: a form that does not fit fails there instead of taking the machine with it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from . import registry
from .forms import Dims, nbytes
from .measure import trim

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SPARE = 2**30  # left to the system


class OutOfMemory(RuntimeError):
    """The form needs more memory than the machine has."""


def peak(op: str, dims: Dims, form: str, device: str, dtype: str, threads: int) -> dict[str, float | None]:
    """``{"peak": bytes above the inputs, "inputs": bytes, "results": bytes}``; the peak is None where the system does not
    tell (no /proc). Results are the gradients, which no form can do without: the least that the peak can be.

    Raises:
        OutOfMemory: the form does not fit.
        RuntimeError: it failed otherwise.
    """
    about = {"op": op, "dims": dims, "form": form, "device": device, "dtype": dtype, "threads": threads}
    if torch.device(device).type == "cuda":  # its allocator counts exactly, so that no new process is needed
        try:
            return _measure(about)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"needs more memory than {torch.cuda.get_device_name(device)} has") from error
        except Exception as error:  # of another package, of any kind, as from the other process below
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
    words = [sys.executable, "-m", "em3.benchmarks.memory", json.dumps(about)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
        return found
    told = done.stderr.strip().splitlines()
    last = told[-1] if told else f"exit status {done.returncode}"
    # The words of torch's allocator and of Python's.
    if "not enough memory" in done.stderr or "can't allocate memory" in done.stderr or "MemoryError" in last:
        raise OutOfMemory(f"needs more memory than the {psutil.virtual_memory().available / 2**30:.0f} GiB that are free")
    raise RuntimeError(last)


def _measure(about: dict[str, Any]) -> dict[str, float | None]:
    device, dtype = about["device"], getattr(torch, about["dtype"])
    torch.set_num_threads(about["threads"])
    operation = registry.OPERATIONS[about["op"]]
    form = registry.form(operation, about["form"])

    def bound(dims: Dims) -> tuple[Any, Any]:
        torch.manual_seed(0)
        inputs = operation.make(dims, device, dtype)
        return form.bind(inputs), inputs

    def run(call: Any) -> None:
        out = call.forward()
        torch.autograd.grad(out, list(call.leaves.values()), torch.ones_like(out))

    # Libraries load and set themselves up in a first call, which should not count. What a form keeps for later calls
    # should, so it is a small one; but a compiled form compiles for the very shape, and keeps nothing.
    call, inputs = bound(about["dims"])
    run(call if form.compiled else bound(registry.smallest(about["op"], about["dims"]))[0])
    sizes = {"inputs": nbytes(inputs), "results": nbytes(call.leaves)}
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(call)
        return {"peak": torch.cuda.max_memory_allocated(device) - before, **sizes}
    return {"peak": raised_by(lambda: run(call)), **sizes}


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """What runs inside may take no more than what is free when it begins: where that does not do, it fails there, instead
    of being killed by the system. On what is allocated, not on addresses, of which torch reserves many more than it uses."""
    if not STATUS.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    free = max(0, psutil.virtual_memory().available - SPARE)
    resource.setrlimit(resource.RLIMIT_DATA, (_mark("VmData") + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def raised_by(call: Callable[[], object]) -> int | None:
    """Bytes by which a call raises this process's memory at its highest; None where the system does not tell."""
    trim()
    if not RESET.exists():
        call()  # whether it fits
        return None
    RESET.write_text("5")  # the high-water mark begins anew at what is resident now
    before = _mark("VmRSS")
    call()
    return _mark("VmHWM") - before


def _mark(name: str) -> int:
    """VmRSS, VmHWM or VmData of this process in bytes."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) * 1024


if __name__ == "__main__":
    with bounded():
        print(json.dumps(_measure(json.loads(sys.argv[1]))))
