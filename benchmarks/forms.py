"""What one operation is measured with: its inputs, its truth, the forms that compete, and what their arithmetic costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em3.ops import _dispatch

Dims = dict[str, Any]
Inputs = dict[str, Any]


class Work(NamedTuple):
    """What a call must do at least in a given form: FLOPs (a multiply-add is two), and elements read or written."""

    forward_flops: float
    backward_flops: float
    forward_elements: float
    backward_elements: float


class Call(NamedTuple):
    """A form bound to its inputs: the function that is timed, and the tensors whose gradients are asked for."""

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """One way to compute the operation."""

    name: str
    bind: Callable[[Inputs], Call]  # what it prepares is not timed
    work: Callable[[Dims], Work]
    package: str | None = None  # without which it cannot be
    distribution: str | None = None  # what pip calls it, if something else
    # Why it does not do this shape on this device, None if it does.
    refuses: Callable[[Dims, str], str | None] = lambda dims, device: None
    compiled: bool = False  # torch.compile works in its first call with a shape
    dtypes: tuple[torch.dtype, ...] | None = None  # in which it computes, None for all

    def missing(self) -> str | None:
        """Why the form cannot be measured here whatever the shape."""
        if self.package is None:
            return None
        try:
            importlib.import_module(self.package)
        except Exception as error:  # a package may fail in its own import in any way
            if isinstance(error, ModuleNotFoundError) and error.name == self.package:
                return "not installed"
            return f"cannot be imported: {' '.join(str(error).split())}"
        return None


@dataclass(frozen=True)
class Operation:
    """An operation's entry in the benchmarks.

    Attributes:
        name: as in ``em3.ops``.
        make: ``(dims, device, dtype)`` -> arguments of ``ours``; draws from torch's random state.
        truth: the same function in plain PyTorch, differentiable, run in float64.
        plain: as a user would write it.
        ours: ``(inputs, backend)`` -> output.
        plain_work, our_work: of the textbook formulation, and of em3's.
        peers: forms of other packages.
        by: ``(inputs, strategy)`` -> output, of an operation that has the strategies absorb and project.
        laid_out: ``(dims, inputs)`` -> the same inputs in every layout that the automatic choice tells apart.
    """

    name: str
    make: Callable[[Dims, str, torch.dtype], Inputs]
    truth: Callable[[Inputs], Tensor]
    plain: Callable[[Inputs], Call]
    ours: Callable[[Inputs, str], Tensor]
    plain_work: Callable[[Dims], Work]
    our_work: Callable[[Dims], Work]
    peers: tuple[Form, ...] = ()
    by: Callable[[Inputs, str], Tensor] | None = None
    laid_out: Callable[[Dims, Inputs], Sequence[Inputs]] = lambda dims, inputs: [inputs]

    def forms(self) -> Iterator[Form]:
        """All that competes: em3 as a call without further words gets it, each of its backends, then the others."""
        for backend in ("auto", *_dispatch.BACKENDS[self.name]):
            yield Form(our_name(backend), self._ours(backend), self.our_work, refuses=self._refuses(backend))
        yield Form("plain", self.plain, self.plain_work)
        yield Form("compile", self._compiled, self.plain_work, compiled=True)
        yield from self.peers

    def _ours(self, backend: str) -> Callable[[Inputs], Call]:
        return lambda inputs: Call(lambda: self.ours(inputs, backend), leaves(inputs))

    def _refuses(self, backend: str) -> Callable[[Dims, str], str | None]:
        if backend == "auto":
            return lambda dims, device: None
        return lambda dims, device: _dispatch.module(self.name, backend).unavailable()

    def _compiled(self, inputs: Inputs) -> Call:
        torch.compiler.reset()  # what it compiled for the shapes before is of no use, and after eight it gives up
        call = self.plain(inputs)
        return Call(torch.compile(call.forward, dynamic=False), call.leaves)


def our_name(backend: str) -> str:
    return "em3" if backend == "auto" else f"em3 {backend}"


def leaves(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a nest that require a gradient, by the path to each."""
    if isinstance(value, Tensor):
        return {name: value} if value.requires_grad else {}
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = [(f"{name}.{key}" if name else key, v) for key, v in value.items()]
    elif isinstance(value, (list, tuple)):
        inner = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    return {key: tensor for path, v in inner for key, tensor in leaves(v, path).items()}


def widened(value: Any) -> Any:
    """A copy of a nest with every floating-point tensor in float64; leaves keep requires_grad."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: widened(v) for key, v in value.items()}
    return type(value)(widened(v) for v in value) if isinstance(value, (list, tuple)) else value


def nbytes(value: Any) -> int:
    """Memory of all tensors of a nest."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(nbytes(v) for v in value) if isinstance(value, (list, tuple)) else 0


def lengths(count: int, mean: int, skewed: bool) -> Tensor:
    """Lengths ``[count]`` of a batch's sequences: all equal, or log-normal with every sixteenth one empty.

    ``sigma = 1`` is the spread of the histories of MovieTweetings; the longest is ``4 * mean``.
    """
    if not skewed:
        return torch.full((count,), mean)
    drawn = torch.empty(count).log_normal_(0, 1)
    drawn = (drawn * (mean / drawn.mean())).round().clamp(1, 4 * mean).long()
    drawn[15::16] = 0
    return drawn


def offsets(of: Tensor) -> Tensor:
    """Lengths ``[B]`` -> offsets ``[B + 1]``."""
    return torch.nn.functional.pad(of.cumsum(0), (1, 0))


def counted(dims: Dims, inputs: Inputs) -> Dims:
    """The dimensions by which arithmetic is counted: of skewed lengths N is the mean of those that were drawn, 0.87 of the
    one that was asked for, since the tail is cut off and some are empty. Padding counts for nobody."""
    if dims.get("lengths") != "skewed":
        return dims
    ends = inputs["offsets"]
    drawn = [float(of[-1]) / dims["B"] for of in (ends if isinstance(ends, list) else [ends])]
    return dims | {"N": drawn if isinstance(ends, list) else drawn[0]}


def padding(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets ``[B + 1]`` -> where each place of ``[B, N]`` reads in the values (anywhere if padded), and which are real."""
    size = bounds.diff()
    place = torch.arange(int(size.max()), device=bounds.device)
    real = place < size[:, None]
    return (place + bounds[:-1, None]) * real, real
