"""What the kernels' callers share: what they serve, memory, dropout; and long items cut into parts.

The attention kernels take parts for items, so that a few long items keep every thread busy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops._dropout import Dropout, threshold

STORED = (torch.float32, torch.bfloat16, torch.float16)  # what rows may be stored in: a tile of them at a time becomes float32
PART = 256  # tokens that a part of an item has at least, so that its own rows of y stay a small share of the work


def refusal(rows: Tensor, query: Tensor, name: str) -> str | None:
    """Why the kernels do not let such a query read such rows, called ``name`` in the answer; None if they do."""
    if rows.device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {rows.device}"
    for what, tensor in ((name, rows), ("query", query)):
        if tensor.dtype not in STORED:
            return f"it computes in float32 and the {what} is {tensor.dtype}; convert it or use another backend"
    if rows.shape[-1] == 0:
        return f"it reads rows of width 1 and more, and the {name} is of width 0"
    return None


def count(tokens: list[Tensor], offsets: list[Tensor | None], batch: int) -> int:
    """Into how many parts to cut every item, so that each thread gets two or more; 1 where nothing is gained.

    ``tokens`` are padded ``[B, N, ...]`` or, with offsets, jagged ``[T, ...]``.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not 0 < batch < 2 * threads:
        return 1
    lengths = (x.shape[1] if o is None else int(o.diff().max()) for x, o in zip(tokens, offsets, strict=True))
    return max(1, min(-(-2 * threads // batch), max(lengths) // PART))


def cut(tokens: Tensor, offsets: Tensor | None, parts: int) -> tuple[Tensor, Tensor]:
    """The same tokens as a jagged stream, in which every item has become ``parts`` items of like length."""
    if offsets is None:
        offsets = torch.arange(tokens.shape[0] + 1, device="cpu") * tokens.shape[1]
        tokens = tokens.flatten(0, 1)
    step = torch.arange(parts, device="cpu")
    starts = offsets[:-1, None] + offsets.diff()[:, None] * step // parts  # [B, parts]
    return tokens, torch.cat([starts.view(-1), offsets[-1:]])


def shares(lse: Tensor, batch: int, parts: int) -> tuple[Tensor, Tensor]:
    """What each part's softmax is of its item's, ``[H, B, parts, Q]``, and the item's ``lse [H, B, Q]``."""
    h, _, q = lse.shape
    lse = lse.view(h, batch, parts, q)
    whole = lse.logsumexp(2)
    return (lse - whole.clamp(min=torch.finfo(lse.dtype).min)[:, :, None]).exp_(), whole


def joined(y: Tensor, share: Tensor) -> Tensor:
    """What the parts have read, ``[H, B * parts, Q, C]`` -> what the items have, ``[H, B, Q, C]``."""
    return (y.view(*share.shape, y.shape[-1]) * share[..., None]).sum(2)


def first(y: Tensor, parts: int) -> Tensor:
    """What items have read, ``[H, B, Q, C]``, credited to the first of each one's parts: a sum over parts counts it once."""
    spread = torch.zeros_like(y).repeat_interleave(parts, 1)
    spread[:, ::parts] = y
    return spread


_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


def empty(*shape: int) -> Tensor:
    """Not in torch's default dtype or on its default device: the kernels write float32 on the CPU.

    So in a quarter of the time that :func:`torch.empty` takes to read a dtype and a device, 3.6 us.
    """
    return _LIKE.new_empty(*shape)


def rounded(result: Tensor, like: Tensor) -> Tensor:
    """A result of the kernels in the dtype of what was given; :meth:`Tensor.to` takes 2.5 us to see that it is in it."""
    return result if result.dtype is like.dtype else result.to(like.dtype)


def drawn(drop: Dropout | None) -> tuple[int, float, int] | None:
    """Dropout as the kernels read it."""
    if drop is None:
        return None
    return threshold(drop.p), 1 / (1 - drop.p) if drop.p < 1 else 0.0, int(drop.seed)
