"""Token sequences of unequal length, and the one place where every accepted form of them is taken apart.

A *stream* is a batch of token sequences: a padded tensor ``[B, N, C]`` with an optional boolean mask ``[B, N]``
(True = a real token), or a jagged one: anything with ``.values()`` and ``.offsets()``. That covers ``torch.nested``
in the jagged layout, TorchRec's ``JaggedTensor`` and :class:`Jagged`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Jagged:
    """``B`` sequences of unequal length stored end to end.

    Args:
        values: ``[T, ...]``, the rows of all sequences one after the other.
        offsets: ``[B + 1]`` int64 or int32, starting at 0; sequence ``b`` is ``values[offsets[b]:offsets[b + 1]]``.

    Raises:
        ValueError: if ``offsets`` is not a one-dimensional integer tensor with at least one entry.
    """

    def __init__(self, values: Tensor, offsets: Tensor) -> None:
        check_offsets_form(offsets, "offsets")
        if not isinstance(values, Tensor):
            raise ValueError(f"values: was {type(values).__name__}, must be a tensor [T, ...]")
        if values.dim() < 1:
            raise ValueError("values: was a 0-dimensional tensor, must be [T, ...]")
        self._values = values
        self._offsets = offsets

    def values(self) -> Tensor:
        return self._values

    def offsets(self) -> Tensor:
        return self._offsets

    def to(self, *args: Any, **kwargs: Any) -> Jagged:
        """The same elsewhere, or with values of another dtype: arguments as of ``torch.Tensor.to``; offsets keep their dtype."""
        values = self._values.to(*args, **kwargs)
        return type(self)(values, self._offsets.to(values.device, non_blocking=bool(kwargs.get("non_blocking"))))

    @classmethod
    def from_sequences(cls, sequences: list[Tensor]) -> Jagged:
        """Join ``B >= 1`` tensors ``[N_b, ...]`` that agree in everything but their length."""
        if not isinstance(sequences, (list, tuple)) or not sequences:
            was = "empty" if isinstance(sequences, (list, tuple)) else type(sequences).__name__
            raise ValueError(f"sequences: was {was}, must be a list of at least one tensor [N_b, ...]")
        for i, s in enumerate(sequences):
            if not isinstance(s, Tensor) or not s.dim() or s.shape[1:] != sequences[0].shape[1:]:
                was = str(list(s.shape)) if isinstance(s, Tensor) else type(s).__name__
                rest = ", ".join(map(str, sequences[0].shape[1:])) if i else "..."
                raise ValueError(f"sequences[{i}]: was {was}, must be a tensor [N, {rest}]")
        lengths = torch.tensor([0] + [len(s) for s in sequences], device=sequences[0].device)
        return cls(torch.cat(sequences), lengths.cumsum(0))

    def __repr__(self) -> str:
        return f"Jagged(values={tuple(self._values.shape)}, items={self._offsets.shape[0] - 1})"


class Stream(NamedTuple):
    """A stream taken apart: ``offsets`` is None for a padded one, ``mask`` has the shape of ``values`` less the width."""

    values: Tensor  # [B, N, C] or [T, C]
    offsets: Tensor | None  # [B + 1] int64
    mask: Tensor | None  # [B, N] bool


def num_items(stream: Stream) -> int:
    """``B``. A function, for torch.compile of torch 2.10 cannot trace a property of a named tuple."""
    return stream.values.shape[0] if stream.offsets is None else stream.offsets.shape[0] - 1


def check_offsets_form(offsets: Any, name: str) -> None:
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in _INTEGERS:
        was = f"{offsets.dtype} {tuple(offsets.shape)}" if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ValueError(f"{name}: was {was}, must be an int64 or int32 tensor [B + 1]")


def split_jagged(source: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """``(values, offsets)`` of anything jagged, None for a plain tensor.

    Raises:
        ValueError: for nested tensors in another layout, transposed, or with holes between their sequences.
    """
    if isinstance(source, Tensor):
        if not source.is_nested:
            return None
        if source.layout != torch.jagged:
            raise ValueError(f"{name}: was a nested tensor of layout {source.layout}, must have layout=torch.jagged")
        if source._ragged_idx != 1:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: was a nested tensor with its ragged dimension moved, must be [B, ragged, ...]")
        if source.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: was a nested tensor with holes, must be contiguous: call .contiguous() on it")
    elif not (callable(getattr(source, "values", None)) and callable(getattr(source, "offsets", None))):
        raise ValueError(
            f"{name}: was {type(source).__name__}, must be a padded tensor, or jagged: something with .values() and "
            ".offsets() such as em3.Jagged, a torch.nested tensor or a TorchRec JaggedTensor"
        )
    values, offsets = source.values(), source.offsets()
    check_offsets_form(offsets, f"{name}.offsets()")
    return values, offsets.long()


def parse_stream(source: Any, mask: Tensor | None, name: str, mask_name: str) -> Stream:
    """Take one stream apart and check everything that its shapes and dtypes alone can show."""
    jagged = split_jagged(source, name)
    if jagged is not None:
        values, offsets = jagged
        if values.dim() != 2:
            raise ValueError(f"{name}.values(): was {list(values.shape)}, must be [T, C]")
        if mask is not None:
            raise ValueError(f"{mask_name}: was given for a jagged stream, must be None: leave the tokens out instead")
        return Stream(values, offsets, None)
    if source.dim() != 3:
        raise ValueError(f"{name}: was {list(source.shape)}, must be padded [B, N, C] or jagged")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == source.shape[:2]):
        was = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{mask_name}: was {was}, must be torch.bool {list(source.shape[:2])} "
            "(True = a real token)"
        )
    return Stream(source, None, mask)


_INTEGERS = (torch.int64, torch.int32)
