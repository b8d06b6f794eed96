"""Dropout of attention weights whose mask is a function of where a weight stands, not of who computes it, or when.

So every backend draws the same mask from the same seed, the backward draws it again instead of keeping it, and a batch
that is cut into chunks or parts is dropped as one that is not. ``csrc/cpu/dropout.inl`` holds the same function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# Odd numbers that spread neighbours over 32 bits: of the golden ratio, and two primes (xxHash).
_ROW, _TOKEN, _STREAM = 0x9E3779B9, 0x85EBCA77, 0xC2B2AE3D
_STEPS = 1 << 24  # the mask compares 24 bits: a probability is met to within 6e-8


class Dropout(NamedTuple):
    """``p`` from 0 to 1, and the seed ``[1]`` int64 from which the masks of one call are drawn."""

    p: float
    seed: Tensor

    def factors(self, stream: int, tokens: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """What to multiply weights with, 0 or ``1 / (1 - p)``: tokens ``[b, n]`` -> ``[b, rows, n]``.

        Args:
            stream: number of the modality stream.
            tokens: numbers of the tokens in the stream, its items one after the other (padding included).
            rows: ``H * Q``; row ``h * Q + q`` is query ``q`` of head ``h``.
        """
        seed = self.seed.to(tokens.device)
        place = (tokens * _TOKEN + stream * _STREAM + (seed & _LOW)) & _LOW
        row = (torch.arange(rows, device=tokens.device) * _ROW + ((seed >> 32) & _LOW)) & _LOW
        drawn = _mixed(_mixed(place)[:, None, :] ^ row[:, None]) >> 8  # [b, rows, n], from 0 below 2^24
        return (drawn >= threshold(self.p)).to(dtype).mul_(1 / (1 - self.p) if self.p < 1 else 0.0)


def threshold(p: float) -> int:
    """Below it, of 2^24, a weight is dropped."""
    return round(p * _STEPS)


def _mixed(x: Tensor) -> Tensor:
    """Every bit of the result depends on every one of ``x``, 32 bits in int64 (Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
