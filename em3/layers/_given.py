"""What a layer is given, held against what it was made with.

The operations check all of it too, but they call by the names of weights what the user of a layer calls by the layer's
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import _checks, _dispatch
from ..ops.qformer_attention import STRATEGIES, batch_of, parse


def size(name: str, value: Any, least: int = 1) -> None:
    if not _checks.is_count(value) or value < least:
        raise ValueError(f"{name}: was {value!r}, must be an integer of at least {least}")


def sizes(name: str, values: Any) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{name}: was {values!r}, must be a list of the streams' widths, one or more")
    for i, value in enumerate(values):
        size(f"{name}[{i}]", value)


def heads(num_heads: Any, dim: Any, name: str = "dim") -> None:
    size(name, dim)
    if not _checks.is_count(num_heads) or num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads: was {num_heads!r}, must be at least 1 and divide {name} {dim}")


def number(name: str, value: Any) -> None:
    if not _checks.is_number(value):
        raise ValueError(f"{name}: was {value!r}, must be a number")


def choices(strategy: str, backend: str | None) -> None:
    _checks.one_of(strategy, STRATEGIES, "strategy")
    if backend is not None:
        _dispatch.checked_name(backend, "backend")


def tensor(given: Any, name: str, width: int, made_with: str, parameter: Tensor) -> None:
    """``given [..., width]``, of the parameters' dtype and on their device."""
    _checks.tensor(given, name)
    if not given.dim() or given.shape[-1] != width:
        raise ValueError(f"{name}: was {list(given.shape)}, must be {width} wide, as the layer was made ({made_with}={width})")
    on_device(given, name, parameter)
    dtype, must = (_checks.settled(t.dtype, given.device) for t in (given, parameter))
    if dtype != must and dtype in _checks.FLOATS:
        raise ValueError(
            f"{name}: was {given.dtype}, must be {parameter.dtype} like the layer's parameters (convert it, or the layer by "
            f".to({given.dtype}), or call under torch.autocast)"
        )


def on_device(given: Tensor, name: str, parameter: Tensor) -> None:
    if given.device != parameter.device:
        raise ValueError(
            f"{name}: was on {given.device}, must be on {parameter.device} like the layer: move one of them by .to(device)"
        )


def streams(given: Any, masks: Any, token_dims: Sequence[int], parameter: Tensor) -> None:
    """As many streams as the layer was made for, each of its width."""
    found = parse(given, masks)
    batch = batch_of(found)
    if len(found) != len(token_dims):
        empty = f"em3.Jagged(torch.empty(0, C), torch.zeros({batch + 1}, dtype=torch.int64))"
        raise ValueError(f"streams: were {len(found)}, must be {len(token_dims)}, {_made(token_dims)}; where a batch has "
                         f"nothing of a modality, give a stream without tokens: {empty}")  # fmt: skip
    for i, (stream, width) in enumerate(zip(found, token_dims, strict=True)):
        if stream.values.shape[-1] != width:
            raise ValueError(f"streams[{i}]: was {list(stream.values.shape)}, must be {width} wide, {_made(token_dims)}")
        on_device(stream.values, f"streams[{i}]", parameter)


def _made(token_dims: Sequence[int]) -> str:
    return f"as the layer was made (token_dims={list(token_dims)})"


def not_plain(layer: object) -> str | None:
    """Why ``layer`` is more, or something else, than a product with a weight and a bias; None if it is just that."""
    if type(layer) is not nn.Linear:
        return f"was {type(layer).__module__}.{type(layer).__qualname__}, must be torch.nn.Linear"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "had hooks, which would not be called"
    return "had a forward of its own" if "forward" in vars(layer) else None
