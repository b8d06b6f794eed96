"""Where the automatic choice is made: what ``em3 tune`` measured for shapes like this one, else the cost model's answer.

A *decision* is named ``op.what``: which backend serves, whether keys and values are formed, how large a tile is. Whoever
has to decide asks :func:`decide`, so that there is one place where a shape becomes a choice. ``table.py`` reads and writes
the file of what was measured, ``em3.benchmarks.tune`` measures. ``EM3_TUNING=0`` leaves all answers to the cost models.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, torch.dtype, int, str, tuple[int, ...]]  # decision, dtype, threads, kind, buckets
Table = dict[Key, str]
About = tuple[Tensor, str, Sequence[int]]  # what decide goes by: like, kind, dims

# The largest number of each bucket, floor(2^(k + 1/2)).
_EDGES = tuple(math.isqrt(2 << 2 * k) for k in range(48))


class Trial:
    """Answers in place of the table while a candidate is tried, and remembers what was asked.

    Attributes:
        asked: for each decision the keys that were asked for, with the cost model's answer.
    """

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.asked: dict[str, dict[Key, str]] = {}

    def answer(self, key: Key, model: str) -> str:
        self.asked.setdefault(key[0], {})[key] = model
        return self.answers.get(key[0], model)


# Of the process and not of a thread: on a GPU the backward asks from a thread of PyTorch's own.
_trial: Trial | None = None
# Filled at the first question about a device. No lock, which a fork could leave locked: two threads may both read the
# file, and the first one's table is kept.
_tables: dict[torch.device, Table] = {}


def decide(decision: str, like: Tensor, kind: str, dims: Sequence[int], model: str) -> str:
    """The measured answer for shapes like this one, or ``model``, the cost model's.

    An answer holds for the decision, the device and dtype of ``like``, torch's number of threads (on a CPU), the very
    ``kind``, and dimensions that all round to the same powers of two as the measured ones: 182 to 362 count as 256.

    A graph of ``torch.compile`` keeps the answers it was traced with; where a dimension is dynamic it is traced anew for
    another bucket, and only if there is a table at all.

    Args:
        decision: one of ``table.decisions()``.
        like: a tensor of the call's device and dtype.
        kind: what else changes the answer, in a word or two, such as ``"frozen jagged"``.
        dims: in an order that is the decision's own.
        model: the answer where nothing was measured.
    """
    device = like.device
    if torch.compiler.is_compiling():
        if not _in_use(device):
            return model
        return _measured(decision, device, like.dtype, kind, tuple([_traced_bucket(n) for n in dims])) or model
    if _trial is not None:
        return _trial.answer((decision, like.dtype, threads_of(device), kind, tuple(map(bucket, dims))), model)
    table = _tables.get(device)
    if table is None:
        table = _loaded(device)
    if not table:
        return model
    # In line, for a call asks three times and a function call for each dimension would cost as much as the rest.
    buckets = tuple([(n * n).bit_length() >> 1 for n in dims])
    threads = torch.get_num_threads() if like.is_cpu else 0  # as threads_of, which takes 0.5 us
    return table.get((decision, like.dtype, threads, kind, buckets)) or model


def silent(device: torch.device) -> bool:
    """Whether :func:`decide` has nothing but the cost model's answers for a device. True in time to be asked before its
    arguments are made, which takes longer than all else that it does then."""
    return _trial is None and _tables.get(device) == {} and not torch.compiler.is_compiling()


def gradients(tokens: Sequence[Tensor]) -> str:
    """The kind of a call by its gradients: ``"inference"``, else ``"trained"`` if a token takes one, else ``"frozen"``."""
    if not torch.is_grad_enabled():
        return "inference"
    return "trained" if any(x.requires_grad for x in tokens) else "frozen"


def layout(tokens: Tensor, offsets: Tensor | None, like: Tensor) -> str:
    """The kind of a call by how its tokens come: padded or jagged, and the dtype they are stored in if it is not ``like``'s."""
    form = "padded" if offsets is None else "jagged"
    return form if tokens.dtype == like.dtype else f"{form} {tokens.dtype}"


def bucket(n: int) -> int:
    """``log2 n`` rounded to the nearest whole number; 0 for 0."""
    return (n * n).bit_length() >> 1


def _traced_bucket(n: int) -> int:
    """The same of a size that may be symbolic: the comparisons become the guards that hold for the whole bucket."""
    for k, edge in enumerate(_EDGES):
        if n <= edge:
            return k
    return len(_EDGES)


def threads_of(device: torch.device) -> int:
    """The part of a key that says how many threads compute; 0 on a GPU, where they make no difference."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def try_out(trial: Trial | None) -> None:
    """Every later decision of the process is the trial's, until None is given."""
    global _trial
    _trial = trial


def forget() -> None:
    """Read the files anew at the next decision."""
    _tables.clear()


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compiler.assume_constant_result`` does: the function runs while a graph is traced and its result is a
    constant there. That decorator itself would import torch's compiler, half a second, with em3."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def _loaded(device: torch.device) -> Table:
    # By name: it imports the operations, which import this.
    table: Table = importlib.import_module(f"{__name__}.table").load(device)
    return _tables.setdefault(device, table)


@_constant
def _in_use(device: torch.device) -> bool:
    return bool(_tables[device] if device in _tables else _loaded(device))


@_constant
def _measured(decision: str, device: torch.device, dtype: torch.dtype, kind: str, buckets: tuple[int, ...]) -> str | None:
    return _tables[device].get((decision, dtype, threads_of(device), kind, buckets))
