"""PyTorch's attention kernels for GPUs that read tokens where they lie, without padding: FlexAttention and varlen attention.

Both take queries ``[B, Q, H, E]``, and keys and values ``[T, H, E]`` of all items one after the other. (The plain forms go
through ``scaled_dot_product_attention``, which takes the fastest kernel that there is for padded tokens.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .forms import Call, Dims, Form, Inputs, Work

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values -> shaped like the queries
Attention = Callable[[Tensor, int, int], Attend]  # offsets of the items' tokens, queries an item, heads


def flex(bounds: Tensor, q: int, h: int) -> Attend:
    """FlexAttention, compiled as its documentation asks. Which blocks of keys a block of queries sees is known beforehand.

    Items of one length are a batch; others are one long sequence in which a query sees its own item.

    Args:
        bounds: offsets ``[B + 1]`` of the items' tokens.
        q: queries an item.
        h: heads.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    attention, b = _flex_attention(bounds.device), len(bounds) - 1
    sizes = bounds.diff()
    if bool((sizes == sizes[0]).all()):

        def batched(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            k, v = (x.unflatten(0, (b, -1)).transpose(1, 2) for x in (key, value))  # [B, H, N, E]
            out: Tensor = attention(query.transpose(1, 2), k, v)
            return out.transpose(1, 2)

        return batched
    item = torch.repeat_interleave(sizes)  # [T]

    def own(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // q == item[key]

    mask = create_block_mask(own, None, None, b * q, len(item), device=bounds.device)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, k, v = (x.transpose(0, 1)[None] for x in (query.flatten(0, 1), key, value))  # [1, H, B * Q or T, E]
        out: Tensor = attention(rows, k, v, block_mask=mask)
        return out[0].transpose(0, 1).unflatten(0, (b, q))

    return packed


def _flex_attention(device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device.type == "cpu":
        return flex_attention
    # The form "compile", which goes before this one, has thrown away what was compiled for other shapes.
    return torch.compile(flex_attention, dynamic=False)


def varlen(bounds: Tensor, q: int, h: int) -> Attend:
    """FlashAttention for sequences of any length, as PyTorch has it; arguments as of :func:`flex`."""
    from torch.nn.attention.varlen import varlen_attn

    b, longest = len(bounds) - 1, int(bounds.diff().max())
    ends = bounds.int()
    query_ends = torch.arange(0, (b + 1) * q, q, device=bounds.device, dtype=torch.int32)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Any = varlen_attn(query.flatten(0, 1), key, value, query_ends, ends, q, longest)
        rows: Tensor = out.unflatten(0, (b, q))
        return rows

    return packed


def forms(bind: Callable[[Attention, Inputs], Call], work: Callable[[Dims], Work]) -> tuple[Form, ...]:
    """Both as forms of an operation, whose ``bind`` gives them keys and values."""
    return (
        Form("flex", partial(bind, flex), work, compiled=True, refuses=_on_a_gpu("FlexAttention has no backward on a CPU")),
        Form("varlen", partial(bind, varlen), work, package="torch.nn.attention.varlen", dtypes=(torch.bfloat16, torch.float16),
             refuses=_on_a_gpu("varlen attention runs on a GPU only")),
    )  # fmt: skip


def _on_a_gpu(reason: str) -> Callable[[Dims, str], str | None]:
    return lambda dims, device: None if torch.device(device).type == "cuda" else reason
