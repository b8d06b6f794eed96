"""Processes of a gloo group that live as long as a test module, and a loss whose batch is spread over them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import em3
from tests import oracle


class Ranks:
    """``count`` processes, each a rank; the first ``W`` of them are a group of their own for every ``W``.

    Args:
        store: a file that is not there yet.
        timeout: of the groups, in seconds.
    """

    def __init__(self, count: int, store: str, timeout: float = 60) -> None:
        context = multiprocessing.get_context("spawn")
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        pipes = [context.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, count, store, timeout, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(20)
            process.kill()

    def tell(self, function: Callable[..., Any], each: list[tuple[Any, ...]]) -> None:
        """Begin ``function(rank's memory, group, *its arguments)`` on as many ranks as there are arguments."""
        for pipe, args in zip(self.pipes, each, strict=False):
            # Bytes, not torch's shared memory: a rank may die and leave nothing behind.
            pipe.send_bytes(pickle.dumps((function, len(each), args)))

    def answers(self, which: Iterable[int]) -> list[Any]:
        """What these ranks returned, or the exception that was raised; None of one that died."""
        return [_received(self.pipes[rank]) for rank in which]

    def run(self, function: Callable[..., Any], each: list[tuple[Any, ...]]) -> list[Any]:
        self.tell(function, each)
        found = self.answers(range(len(each)))
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
        return found


def _received(pipe: Any) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None


def _serve(rank: int, count: int, store: str, timeout: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
    groups = [dist.new_group(range(n), timeout=limit) for n in range(1, count + 1)]
    memory: dict[str, Any] = {}
    while True:
        try:
            function, n, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = function(memory, groups[n - 1], *args)
        except Exception as error:
            answer = type(error)(str(error))
        pipe.send_bytes(pickle.dumps(answer))


def forward(memory: dict[str, Any], group: Any, args: dict[str, Any]) -> Tensor:
    memory["leaves"] = oracle.leaves(args)
    memory["loss"] = em3.ops.contrastive_loss(**args, group=group)
    return memory["loss"].detach()


def backward(memory: dict[str, Any], group: Any, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(memory["loss"], memory["leaves"], upstream))


def spread(ranks: Ranks, sizes: list[int], extras: list[int]) -> Callable[..., Tensor]:
    """``contrastive_loss`` of the whole batch, computed by ranks that hold ``sizes`` rows and ``extras`` negatives each.

    What comes of "mean" is the mean over the ranks, as DDP makes it, and so is its gradient.
    """

    def whole(**args: Any) -> Tensor:
        return _Spread.apply(ranks, sizes, extras, args, *oracle.leaves(args))

    return whole


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sizes: list[int], extras: list[int], args: dict[str, Any], *leaves: Tensor) -> Tensor:
        ctx.ranks, ctx.args, ctx.cuts = ranks, args, {"negatives": extras}
        ctx.sizes, ctx.reduction = sizes, args.get("reduction", "mean")
        each: list[dict[str, Any]] = [{} for _ in sizes]
        for name, value in args.items():
            for mine, part in zip(each, _parts(ctx, name, value), strict=True):
                mine[name] = part
        found = ranks.run(forward, [(mine,) for mine in each])
        if ctx.reduction == "none":
            return torch.cat(found)
        return sum(found) / (len(found) if ctx.reduction == "mean" else 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        upstream = grad.split(ctx.sizes) if ctx.reduction == "none" else [grad] * len(ctx.sizes)
        if ctx.reduction == "mean":
            upstream = [g / len(ctx.sizes) for g in upstream]
        grads = ctx.ranks.run(backward, [(g,) for g in upstream])
        names = [name for name, value in ctx.args.items() if oracle.leaves(value)]
        joined = [sum(parts) if name.startswith("logit_") else torch.cat(parts) for name, parts in zip(names, zip(*grads, strict=True), strict=True)]
        return None, None, None, None, *joined


def _parts(ctx: Any, name: str, value: Any) -> list[Any]:
    """What each rank gets of an argument."""
    if not isinstance(value, Tensor) or not value.dim():
        return [oracle.moved(value, "cpu")] * len(ctx.sizes)
    parts = value.detach().split(ctx.cuts.get(name, ctx.sizes))
    return [part.clone().requires_grad_(value.requires_grad) for part in parts]
