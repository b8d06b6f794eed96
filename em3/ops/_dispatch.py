"""Which backend serves a call.

One ordered list an operation, fastest first. A backend is one module with the operation's name in the backend's
package; adding one is one file and one word in ``BACKENDS``: tests, benchmarks and ``em3 env`` read that list.

Such a module has

- ``unavailable() -> None | str``: why it can never work on this machine,
- ``supports(*args) -> None | str``: why it cannot serve this call,
- ``wins(*args) -> bool``: whether it is the faster choice for this call where ``em3 tune`` has not measured (the
  threshold carries its measurement),
- ``forward(*args)`` and ``backward(*args)``, the operation itself on checked arguments.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from ..tuning import About, decide, silent

log = logging.getLogger("em3")

BACKENDS: dict[str, tuple[str, ...]] = {
    "qformer_attention": ("cpp", "triton", "torch"),
    "lora_linear": ("cpp", "triton", "torch"),
    "lora_target_attention": ("cpp", "triton", "torch"),
    "contrastive_loss": ("cpp", "triton", "torch"),
}
# To be raised with every change after which another backend, strategy or tile may be the fastest: what was tuned before
# is then ignored. Not a hash of the sources: a comment's change would cost every user their measurements.
VERSIONS: dict[str, int] = {"qformer_attention": 3, "lora_linear": 3, "lora_target_attention": 3, "contrastive_loss": 4}
NAMES = ("auto", *dict.fromkeys(name for names in BACKENDS.values() for name in names))

_PACKAGES = {"cpp": "em3.backends.cpp", "triton": "em3.backends.triton", "torch": "em3.backends.torch"}


class BackendError(RuntimeError):
    """An explicitly requested backend cannot serve the call; the message says why and what can."""


@functools.cache
def module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGES[backend]}.{op}")


def checked_name(name: str, source: str) -> str:
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source}: was {name!r}, must be one of {', '.join(NAMES)}{hint}")
    return name


_default: str = checked_name(os.environ.get("EM3_BACKEND", "auto") or "auto", "EM3_BACKEND")


# Not a context variable: torch.compile guards on both of these, and cannot trace that.
class _Used(threading.local):
    backend: str | None = None


_used = _Used()


def set_backend(name: str) -> None:
    """Ask for one backend in every later call of the process, or ``"auto"`` (the start value, or ``EM3_BACKEND``).

    Raises:
        ValueError: for an unknown name.
    """
    global _default
    _default = checked_name(name, "set_backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for one backend for the length of a ``with`` block, in the thread that enters it.

    Raises:
        ValueError: for an unknown name.
    """
    before = _used.backend
    _used.backend = checked_name(name, "use_backend")
    try:
        yield
    finally:
        _used.backend = before


def requested(backend: str | None) -> str:
    """The backend that a call asks for: its own argument, else that of ``use_backend``, else the process-wide one."""
    if backend is not None:
        return checked_name(backend, "backend")
    return _default if _used.backend is None else _used.backend


def choose(op: str, request: str, args: tuple[Any, ...], about: Callable[[], About]) -> ModuleType:
    """The backend's module for this call; ``about`` says what ``tuning.decide`` goes by, and is asked only where it may matter.

    Raises:
        BackendError: if a backend was asked for by name and cannot serve the call.
    """
    if request != "auto":
        if request not in BACKENDS[op]:
            raise BackendError(f"{op} has no backend {request!r}; it has {', '.join(BACKENDS[op])}")
        chosen = module(op, request)
        reason = chosen.unavailable() or chosen.supports(*args)
        if reason is not None:
            raise BackendError(f"backend {request!r} cannot serve this call of {op}: {reason}")
        return chosen
    passed_over: list[str] = []
    for name in BACKENDS[op]:
        candidate = module(op, name)
        reason = candidate.unavailable() or candidate.supports(*args)
        if reason is None and candidate.wins(*args):
            if not silent((args[0] if isinstance(args[0], Tensor) else args[0][0]).device):
                tuned = _tuned(op, name, args, about)
                if tuned is not None:
                    return tuned
            _say_once(op, name, "; ".join(passed_over))
            return candidate
        passed_over.append(f"{name}: {reason or 'slower for this shape'}")
    raise BackendError(f"no backend can serve this call of {op}: {'; '.join(passed_over)}")


def _tuned(op: str, model: str, args: tuple[Any, ...], about: Callable[[], About]) -> ModuleType | None:
    """Another backend than the first that claims to win, if it was measured to be faster and can serve the call."""
    if len(BACKENDS[op]) == 1:
        return None
    name = decide(f"{op}.backend", *about(), model)
    if name == model or (module(op, name).unavailable() or module(op, name).supports(*args)) is not None:
        return None
    _say_once(op, name, f"{model}: slower for this shape as `em3 tune` measured")
    return module(op, name)


def serves_projection(op: str, request: str) -> None:
    """The ``project`` strategy is PyTorch's own attention, whatever the device; refuse it to any other backend."""
    if request not in ("auto", "torch"):
        raise BackendError(
            f"backend {request!r} of {op} serves strategy='absorb' only; use strategy='auto', or backend='torch'"
        )


@functools.cache
def _say_once(op: str, name: str, passed_over: str) -> None:
    log.info("%s runs on %r%s", op, name, f" ({passed_over})" if passed_over else "")


def report() -> list[tuple[str, str, str | None]]:
    """``(op, backend, reason it is unusable or None)`` in the order of preference, for ``em3 env``."""
    return [(op, name, module(op, name).unavailable()) for op, names in BACKENDS.items() for name in names]
