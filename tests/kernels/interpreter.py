"""Triton 3.6's interpreter made good. Import it with TRITON_INTERPRET=1, before any kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_patch_lang_tensor, _create_dot = interpreter._patch_lang_tensor, Builder.create_dot
_cast_impl = Builder.cast_impl
_exchanged: set[Any] = set()  # functions; what is exchanged for them stays so


def _patched_tensor(tensor: Any, scope: Any) -> None:
    """Its scalars are arrays of one element, which numpy 2.4 no longer takes for the bounds of a loop."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """It multiplies the bits of bfloat16 as if they were integers, and takes ten times as long for float16 as for float32."""
    return _create_dot(self, *(_in_float32(x) if x.dtype.scalar in (tl.bfloat16, tl.float16) else x for x in (a, b)), *others)


def _in_float32(x: Any) -> Any:
    return Handle(_widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32), tl.float32)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    """It cuts float32 off to bfloat16; a GPU rounds to the nearest, ties to even."""
    if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
        return Handle(_widened(src.data), tl.float32)
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _cast_impl(self, src, dst_type)
    bits = src.data.astype(np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _called(self: Any, *args: Any, **kwargs: Any) -> Any:
    """At every call of a function from a kernel it exchanges the language anew, which takes most of the time."""
    if self.fn not in _exchanged:
        interpreter._patch_lang(self.fn)
        _exchanged.add(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


interpreter._patch_lang_tensor = _patched_tensor
interpreter.InterpretedFunction.__call__ = _called
Builder.create_dot = _dot
Builder.cast_impl = Builder.create_fp_ext = Builder.create_fp_trunc = _cast
