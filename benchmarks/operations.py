"""One shape of one operation, measured: what each form needs, whether it is the same function, and how long it takes."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from em3 import tuning
from em3.tuning import table

from . import measure, memory
from .forms import Call, Form, Inputs, Operation, counted, leaves
from .registry import OPERATIONS
from .shapes import Shape

ABSORB, PROJECT = STRATEGIES = ("absorb", "project")
SLOW = 10.0  # seconds of a step, beyond which three rounds must do


@dataclass(frozen=True)
class Effort:
    """How long a shape is measured."""

    seconds: float  # for each form
    rounds: int  # at least
    compiled: bool  # whether torch.compile takes part, which works for seconds to minutes on each shape


FULL = Effort(seconds=3.0, rounds=7, compiled=True)
QUICK = Effort(seconds=1.0, rounds=5, compiled=False)


def measured(shape: Shape, device: str, dtype: torch.dtype, effort: Effort) -> list[dict[str, Any]]:
    """A row for every form: its numbers, or in ``status`` and ``reason`` why it has none.

    Forms are held against float64 before anything is timed; one that is wrong gets no time.
    """
    operation = OPERATIONS[shape.op]
    torch.manual_seed(zlib.crc32(f"{shape.op} {shape.dims} {dtype}".encode()))
    inputs = operation.make(shape.dims, device, dtype)
    grad = gradient(operation.ours(inputs, "auto"))
    want = measure.true_results(operation.truth, inputs, grad)
    forms = [form for form in operation.forms() if effort.compiled or not form.compiled]
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    slowest = 0.0
    for form in sorted(forms, key=lambda form: form.name != "plain"):  # its own error is the measure of the others
        row = rows[form.name] = _needs(form, shape, device, dtype)
        if row["status"] != "measured":
            continue
        start = time.perf_counter()
        row |= same_function(form, inputs, grad, want, limit_of(dtype, rows["plain"]), calls)
        if not form.compiled:
            slowest = max(slowest, time.perf_counter() - start)
    rounds = 3 if slowest > SLOW else effort.rounds
    times = measure.alternate(calls, grad, device, effort.seconds * len(calls), rounds)
    for name, of_form in times.items():
        rows[name] |= {"seconds": measure.quantiles(of_form), "rounds": len(of_form)}
    about = {"suite": "operations", "op": shape.op, "shape": shape.name, "label": shape.label, "dims": shape.dims,
             "source": shape.source, "sweep": shape.sweep, "device": device, "dtype": measure.name_of(dtype)}  # fmt: skip
    dims = counted(shape.dims, inputs)
    work = {form.name: form.work(dims) for form in forms}
    if operation.by is not None:  # em3's own arithmetic is the plain form's where that is what it chooses
        chosen = dict(zip(("em3", "em3 torch"), choice(operation, inputs), strict=True))
        work |= {name: operation.plain_work(dims) for name, strategy in chosen.items() if strategy == PROJECT}
    return [about | {"form": form.name, "work": work[form.name]._asdict()} | rows[form.name] for form in forms]


def choice(operation: Operation, inputs: Inputs) -> tuple[str, str]:
    """The strategy that a training step takes by itself: what was tuned on this machine, else the cost model's answer; and
    the cost model's, which is what the torch backend takes when it is asked for by name."""
    assert operation.by is not None
    trial = tuning.Trial({})
    tuning.try_out(trial)
    try:
        operation.by(inputs, "auto")
    finally:
        tuning.try_out(None)
    ((key, model),) = trial.asked[f"{operation.name}.strategy"].items()
    return table.load(next(iter(leaves(inputs).values())).device).get(key, model), model


def gradient(out: Tensor) -> Tensor | None:
    """What is handed to the backward: None for a loss, else random numbers of the output's shape."""
    return torch.randn_like(out) if out.dim() else None


def _needs(form: Form, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Whether the form can be had for this shape, and how much memory it takes."""
    missing = form.missing()
    if missing is not None:
        if missing != "not installed":
            return {"status": "not usable", "reason": missing}
        return {"status": missing, "reason": f"pip install {form.distribution or form.package}"}
    refused = form.refuses(shape.dims, device)
    if refused is None and form.dtypes is not None and dtype not in form.dtypes:
        refused = f"it computes in {' and '.join(map(measure.name_of, form.dtypes))} only"
    if refused is not None:
        return {"status": "not usable", "reason": refused}
    try:
        found = memory.peak(shape.op, shape.dims, form.name, device, measure.name_of(dtype), torch.get_num_threads())
    except memory.OutOfMemory as error:
        return {"status": "out of memory", "reason": str(error)}
    except RuntimeError as error:
        return {"status": "failed", "reason": str(error)}
    return {"status": "measured", "peak_bytes": found["peak"], "inputs_bytes": found["inputs"], "results_bytes": found["results"]}


def limit_of(dtype: torch.dtype, plain: dict[str, Any]) -> float:
    """Of the error: ten times the usual for the plain form itself, twice its own for the others where that is more; a plain
    form that is wrong is no measure of them."""
    usual = measure.limit(dtype)
    if plain.get("status") == "wrong":
        return usual
    return max(usual, 2 * plain["error"]) if "error" in plain else 10 * usual


def limit_beside(operation: Operation, inputs: Inputs, grad: Tensor | None, want: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The limit of an operation's other forms, by the plain form's error on these inputs."""
    plain = Form("plain", operation.plain, operation.plain_work)
    return limit_of(dtype, same_function(plain, inputs, grad, want, limit_of(dtype, {}), {}))


def same_function(form: Form, inputs: Inputs, grad: Tensor | None, want: dict[str, Tensor], limit: float,
                   calls: dict[str, Call]) -> dict[str, Any]:  # fmt: skip
    """The form's error against float64; if it passes, it joins ``calls``."""
    try:
        call = form.bind(inputs)
        errors = measure.errors(measure.results(call, grad), want)
    except Exception as error:  # of another package, of any kind: its row says so and the others are measured
        return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= limit:
        reason = f"{worst} is off by {errors[worst]:.1e} from float64, more than {limit:.1e}"
        return {"status": "wrong", "reason": reason}
    calls[form.name] = call
    return {"error": errors[worst], "error_of": worst, "without": sorted(want.keys() - errors.keys())}
