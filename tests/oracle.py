"""How every backend of every operation is held against the reference in float64 (docs/design.md, Numerics)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from em3.backends import cpp, triton
from em3.ops import _dispatch

HALF = (torch.bfloat16, torch.float16)


def backends(op: str, device: str = "cpu") -> list[Any]:
    """The operation's backends as pytest parameters; one that cannot work here is skipped, saying why."""
    params = []
    for name in _dispatch.BACKENDS[op]:
        reason = _dispatch.module(op, name).unavailable()
        if name == "triton" and reason is None:
            reason = triton.cannot_use(torch.device(device))
        if name == "cpp" and device != "cpu":
            reason = "the compiled kernels are for the CPU"
        params.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")))
    return params


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    if backend in ("cpp", "triton") and dtype == torch.float64:
        pytest.skip(f"the {backend} kernels compute in float32")


def force_isa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels on one instruction set; the test is skipped where it cannot be used."""
    if cpp.unavailable() is not None:
        pytest.skip(f"em3._C: {cpp.unavailable()}")
    reason = cpp.compiled().cpu_features()["isa"].get(name, "not compiled on this platform")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setattr(cpp, "isa", name)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` comes filled with NaN (the largest number for integers), so an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def moved(value: Any, device: str) -> Any:
    """A copy of a nest of lists and dicts on another device; leaves keep requires_grad."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return type(value)(moved(v, device) for v in value) if isinstance(value, (list, tuple)) else value


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A copy of a nest of lists and dicts with every floating-point leaf in ``dtype``; leaves keep requires_grad."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: convert(v, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(convert(v, dtype) for v in value)
    return value


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a nest that require a gradient, in order."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in leaves(v)] if isinstance(value, (list, tuple)) else []


def run(fn: Callable[..., Tensor], args: dict[str, Any], seed: int) -> list[Tensor]:
    """``fn(**args)`` and the gradient of every leaf of ``args``, for a random gradient that ``seed`` fixes."""
    out = fn(**args)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves(args), grad)]


def relative_error(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    """``||got - want|| / ||want||``; NaN anywhere gives NaN, which no comparison passes. ``scale`` floors the divisor."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    got, want = got.double(), want.double()
    return float((got - want).norm() / max(float(want.norm()), scale, 1e-30))


def check(fn: Callable[..., Tensor], reference: Callable[..., Tensor], args: dict[str, Any], dtype: torch.dtype,
          seed: int = 0) -> None:  # fmt: skip
    """``fn`` in ``dtype`` against ``reference`` in float64 on the same (already rounded) inputs, values and gradients.

    float32 to 1e-5, float64 to 1e-11, the half types to twice the error that the reference itself makes in that type
    (its error in this tensor, or its root mean square over all of them: in one small tensor it may be lucky; where that
    is not enough, its largest error over this draw and seven beside it). A draw for which the reference is over half the
    limit in float32 too (a softmax of scores near 100, a gradient that nearly cancels) gets as much.
    A gradient that is zero by mathematics (a key bias under one softmax, the queries of an item with one token) has no
    norm to be measured by; so no gradient is asked to be better than the same share of a third of the largest one, and
    no output better than that of a tensor with elements of 0.1 (the tests' inputs are of size 1).
    """
    rounded = convert(args, dtype)
    want = run(reference, convert(rounded, torch.float64), seed)
    with poisoned():
        got = run(fn, rounded, seed)
    scale = max((float(w.norm()) for w in want[1:]), default=0.0)
    # A gradient without dimensions (a logit scale's) is a sum over everything that may cancel: it is held against its terms.
    floors = [0.1 * want[0].numel() ** 0.5] + [scale / 3 if w.dim() else 4 * scale for w in want[1:]]
    errors = [relative_error(g, w, f) for g, w, f in zip(got, want, floors, strict=True)]
    least = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    limits = [least] * len(want)
    if dtype in HALF or (dtype == torch.float32 and not max(errors) <= least):
        own = _own_errors(reference, rounded, dtype, seed, floors)
        if any(e > max(2 * float(o), least) for e, o in zip(errors, own, strict=True)):
            beside = [_beside(rounded, 1 + k / 64) for k in range(1, 8)]
            own = torch.stack([own, *(_own_errors(reference, b, dtype, seed, floors) for b in beside)]).amax(0)
        limits = (2 * own).clamp(min=least).tolist()
    for i, (g, w, error, limit) in enumerate(zip(got, want, errors, limits, strict=True)):
        what = "output" if i == 0 else f"gradient {i - 1}"
        assert error <= limit, f"{what} {list(w.shape)}: relative error {error:.2e} over {limit:.2e} in {dtype}"
        assert g.dtype == dtype, f"{what}: dtype {g.dtype}, expected {dtype}"


def _own_errors(reference: Callable[..., Tensor], args: dict[str, Any], dtype: torch.dtype, seed: int,
                floors: list[float]) -> Tensor:  # fmt: skip
    """The errors of the reference in ``dtype``, none taken for less than their root mean square."""
    pairs = zip(run(reference, args, seed), run(reference, convert(args, torch.float64), seed), floors, strict=True)
    own = torch.tensor([relative_error(plain, want, floor) for plain, want, floor in pairs])
    return own.maximum(own.square().mean().sqrt())


def _beside(value: Any, factor: float) -> Any:
    """The same arguments, every floating-point one times ``factor``: other roundings."""
    if isinstance(value, Tensor):
        scaled = value.detach() * factor if value.is_floating_point() else value
        return scaled.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: _beside(v, factor) for k, v in value.items()}
    return type(value)(_beside(v, factor) for v in value) if isinstance(value, (list, tuple)) else value


def same_bits_twice(fn: Callable[..., Tensor], args: dict[str, Any]) -> None:
    first, second = run(fn, args, 0), run(fn, args, 0)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {i} differed between two identical calls"


def gradcheck(fn: Callable[..., Tensor], args: dict[str, Any]) -> None:
    """Numerical gradients in float64 of every leaf of ``args``."""
    inputs = leaves(args)

    def of_leaves(*tensors: Tensor) -> Tensor:
        replaced: Sequence[Tensor] = list(tensors)
        return fn(**_replace(args, iter(replaced)))

    assert torch.autograd.gradcheck(of_leaves, inputs, atol=1e-6, rtol=1e-5)


def _replace(value: Any, new: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(new) if value.requires_grad else value
    if isinstance(value, dict):
        return {k: _replace(v, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(v, new) for v in value)
    return value
