"""Checks shared by the operations. Every message names the argument, what it was and what it must be.

Shapes and dtypes are checked in the public functions, where ``torch.compile`` can fold them away. The *content* of
offsets, row numbers and adapter indices is checked inside the registered operators, before a backend runs: always on
the CPU; on a GPU only under :func:`debug_checks`, since looking there waits for the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor


class _Debug(threading.local):
    on = False


_debug = _Debug()

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Check the content of offsets and indices on the GPU too, at the price of waiting for the device in each call.

    It holds for the thread that enters it. The backward of tensors on a GPU runs in a thread of PyTorch's own, so it
    is the forward that is checked there.
    """
    before, _debug.on = _debug.on, True
    try:
        yield
    finally:
        _debug.on = before


def is_number(given: Any) -> bool:
    """Python's or numpy's, and no truth value."""
    return isinstance(given, Real) and not isinstance(given, bool)


def is_count(given: Any) -> bool:
    """An integer of Python or numpy, and no truth value."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def probability(given: Any, name: str) -> None:
    if not is_number(given) or not 0 <= given <= 1:
        raise ValueError(f"{name}: was {given!r}, must be a probability from 0 to 1")


def tensor(given: Any, name: str, must: str = "") -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: was {type(given).__name__}, must be a tensor{must}")


def shape(tensor: Tensor, expected: Sequence[int | str], name: str) -> None:
    """``expected`` holds sizes, or a dimension's letter where any size will do."""
    fits = isinstance(tensor, Tensor) and tensor.dim() == len(expected)
    if fits:  # a generator in all() takes as long as all the rest
        for size, want in zip(tensor.shape, expected, strict=True):
            fits = fits and (isinstance(want, str) or size == want)
    if not fits:
        must = ", ".join(str(want) for want in expected)  # not before: torch.compile cannot trace it
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: was {type(tensor).__name__}, must be a tensor [{must}]")
        raise ValueError(f"{name}: was {list(tensor.shape)}, must be [{must}]")


def floating(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        must = "torch.float32, torch.bfloat16, torch.float16 or torch.float64"
        raise ValueError(f"{name}: was {tensor.dtype}, must be {must}")


def same_device_and_dtype(first_name: str, first: Tensor, others: dict[str, Tensor | None]) -> None:
    floating(first, first_name)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(f"{name}: was on {tensor.device}, must be on {first.device} like {first_name}")
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name}: was {tensor.dtype}, must be {first.dtype} like {first_name} "
                "(convert it, or call under torch.autocast)"
            )


def same_device(first_name: str, first: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: was on {tensor.device}, must be on {first.device} like {first_name}")


def divides(num_heads: int, width: int, name: str) -> None:
    if not is_count(num_heads) or num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: was {num_heads!r}, must be at least 1 and divide the width {width} of {name}")


def one_of(value: str, allowed: Sequence[str], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: was {value!r}, must be one of {', '.join(map(repr, allowed))}")


def looks(tensor: Tensor) -> bool:
    """Whether the content of an index tensor may be looked at."""
    if tensor.device.type == "meta":
        return False
    return tensor.numel() > 0 and (_debug.on or tensor.device.type == "cpu")


def readable(tensor: Tensor) -> bool:
    """Whether Python code may go by the content of a tensor: on the CPU, with data, and not while a graph is traced."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def offsets_content(offsets: Tensor, total: int, name: str) -> None:
    """``offsets`` start at 0, never decrease and stay within ``total`` rows."""
    if not looks(offsets):
        return
    read = offsets.detach().cpu().numpy()  # numpy's calls take a fifth of torch's time, and small batches feel it
    first, last = int(read[0]), int(read[-1])
    if first != 0:
        raise ValueError(f"{name}: began with {first}, must begin with 0")
    falls = read[1:] < read[:-1]
    if falls.any():
        where = int(falls.argmax())
        raise ValueError(
            f"{name}: fell from {int(read[where])} to {int(read[where + 1])} at entry {where + 1}, "
            "must not decrease"
        )
    if last > total:
        raise ValueError(f"{name}: ended at {last}, must not run past the {total} rows of the values")


def index_content(index: Tensor, low: int, count: int, name: str, of: str) -> None:
    """Every entry of ``index`` lies in ``low .. count - 1``."""
    if not looks(index):
        return
    smallest, largest = (int(v) for v in torch.aminmax(index))
    if smallest < low or largest >= count:
        was = smallest if smallest < low else largest
        if low == -1 and not count:
            raise ValueError(f"{name}: held {was}, must be -1 (none): there is no {of}")
        missing = " (-1 = none)" if low == -1 else ""
        raise ValueError(f"{name}: held {was}, must be from {low}{missing} to {count - 1}, the last {of}")


def outside_transforms(op: str) -> None:
    """The operators have no rules for ``torch.func``, which would complain of their inside."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"em3.ops.{op} cannot be called under transforms of torch.func (grad, vmap, jvp), for which it has no rules; take "
            f"gradients by torch.autograd, or call em3.reference.{op}"
        )


def no_second_order(op: str) -> None:
    """Make a gradient of the gradients of ``em3::op`` an error; without this it would be zero, silently."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        no_gradient_of_a_gradient(op)

    torch.library.register_autograd(f"em3::{op}_backward", refuse)


def no_gradient_of_a_gradient(op: str) -> NoReturn:
    raise RuntimeError(f"em3.ops.{op} has no second-order gradients")


class _Anchor(torch.autograd.Function):
    """Nothing, behind the graph of some tensors."""

    @staticmethod
    def forward(ctx: Any, op: str, *tensors: Tensor | None) -> Tensor:
        ctx.op = op
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        no_gradient_of_a_gradient(ctx.op)


def anchor(op: str, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """What ties gradients to the inputs that they are of and, unlike these, holds no memory between forward and backward;
    None where no gradient is asked for."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return None
    found: Tensor = _Anchor.apply(op, *tensors)
    return found


class NoSecondOrder(torch.autograd.Function):
    """First-order gradients that have none of their own, of an operation that is one step of autograd: ``op``, the upstream
    gradient, an anchor of the inputs and the gradients -> the gradients. Without this the next ones would be zero, or wrong,
    silently.

    They depend on the inputs even where the upstream gradient is a constant, as that of ``loss.backward()`` is.
    """

    @staticmethod
    def forward(ctx: Any, op: str, upstream: Tensor, anchor: Tensor, *grads: Tensor | None) -> Any:
        ctx.op = op
        return tuple(None if g is None else g.clone() for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_gradient_of_a_gradient(ctx.op)


def autocast_is_on(device: torch.device) -> bool:
    """Also for a device that knows no autocast, such as ``meta``."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def eager_on_cpu(weights: Sequence[Tensor | None], values: Sequence[Tensor]) -> bool:
    """Whether a call is an eager one of plain tensors on the CPU, the queries and weights in float32."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    given = [t for t in weights if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in (*given, *values))
    return plain and all(t.dtype == torch.float32 for t in given) and not autocast_is_on(values[0].device)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside an operator the dtypes are settled: autocast must not round a backend's float32 sums."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else contextlib.nullcontext()


def autocast(*tensors: Tensor | None, device: torch.device) -> list[Any]:
    """The tensors in autocast's dtype where autocast is on for the device, as they are otherwise."""
    if not autocast_is_on(device):
        return list(tensors)
    return [t.to(settled(t.dtype, device)) if isinstance(t, Tensor) else t for t in tensors]


def settled(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What autocast makes of ``dtype`` where it is on for the device."""
    # float64 stays as it is, like under autocast everywhere else.
    return torch.get_autocast_dtype(device.type) if dtype in FLOATS[:3] and autocast_is_on(device) else dtype
