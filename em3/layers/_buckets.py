"""Where the events of a history stand, in buckets that double: 0, then 1 and 2, 3 to 6, 7 to 14 and so on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.lora_target_attention import parse_history


def positions(history: Any) -> Tensor:
    """How many places come after each place of a user's history, int64, shaped as its row numbers.

    Of a padded one ``[B, N]`` the places behind the last item are none.
    """
    ids, offsets, _ = parse_history(history)
    if offsets is None:
        if not ids.shape[1]:
            return torch.zeros_like(ids)
        place = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(ids >= 0, place, -1).amax(1, keepdim=True)  # [B, 1]
        return (last - place).clamp(min=0)
    place = torch.arange(ids.shape[0], device=ids.device)
    user = torch.searchsorted(offsets, place, right=True).clamp(max=offsets.shape[0] - 1)  # plus 1
    return (offsets.index_select(0, user) - 1 - place).clamp(min=0)  # 0 behind the last offset, which nobody reads


def doubling(distance: Tensor, count: int) -> Tensor:
    """The bucket of each distance, an integer; ``count - 1`` takes all that lie further, and 0 those below 0."""
    return (1 + distance.clamp(min=0).double()).log2().long().clamp(max=count - 1)
