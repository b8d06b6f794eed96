"""What every encoder offers, and how one is kept in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import atomic
from .whitening import Whitening

FORMAT = 1
ABOUT, WEIGHTS = "encoder.json", "weights.safetensors"


class EncoderError(ValueError):
    """An encoder that cannot be made, loaded or trained as asked; the message names what was wrong and what it must be."""


class Encoder(nn.Module):
    """Turns pictures or texts into token sequences. It runs over a whole catalogue once, or inside a training step.

    ``prepare`` makes a tensor of one picture or text, ``collate`` a batch of those, and calling the encoder with that
    batch and mask gives tokens ``[B, N, C]`` and their mask ``[B, N]`` (True = a real token). An item without a picture
    or with an empty text has no real token.

    Attributes:
        kind: ``"image"`` or ``"text"``, what it reads.
        width: ``C``.
        picture_size: ``(h, w)``; of image encoders only.
        whitening: applied by :meth:`tokens`, None = not fitted.
        trained: what :func:`em3.encoders.set_trainable` was asked for, None = every parameter as it was made.
    """

    kind: str
    width: int
    picture_size: tuple[int, int]
    trained: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.whitening: Whitening | None = None

    def prepare(self, source: Any) -> Tensor:
        """One PIL image -> uint8 ``[3, h, w]``, of equal size for all pictures; one str -> int64 ``[L]``, ``L >= 0``."""
        raise NotImplementedError

    def collate(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``B >= 1`` prepared tensors -> a batch and its mask.

        Pictures: uint8 ``[B, 3, h, w]`` and bool ``[B]``, True = there is a picture (here everywhere).
        Texts: int64 ``[B, L]`` and bool ``[B, L]``, ``L >= 1``, True = a real word piece.
        """
        raise NotImplementedError

    def tokens(self, batch: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the Fusion-Q-Former reads: the encoder's output, whitened where :attr:`whitening` is fitted."""
        hidden, real = self(batch, mask)
        return hidden if self.whitening is None else self.whitening(hidden), real

    def settings(self) -> dict[str, Any]:
        """What the class needs to be made again, ready for JSON."""
        raise NotImplementedError

    @classmethod
    def restore(cls, settings: dict[str, Any], folder: Path) -> Encoder:
        """An encoder of these settings, with weights still to come."""
        return cls(**settings)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Encoder:
        """A frozen encoder stays in evaluation mode, whatever the model around it does."""
        frozen = self.trained is not None and self.trained["mode"] == "frozen"
        super().train(mode and not frozen)
        return self

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors`` and ``encoder.json`` into ``folder``, which is made if needed."""
        from safetensors.torch import save

        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        about = {
            "format": FORMAT, "class": type(self).__name__, "kind": self.kind, "width": self.width,
            "whitened": self.whitening is not None, "trained": self.trained, "settings": self.settings(),
        }  # fmt: skip
        with atomic(Path(folder) / WEIGHTS) as file:
            file.write(save(weights))
        with atomic(Path(folder) / ABOUT) as file:  # last: it says that the rest is there
            file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())


def pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """int64 ``[L_b]`` each -> ``[B, L]`` filled up with 0 and bool ``[B, L]``, with ``L >= 1``."""
    length = max(1, *(len(s) for s in sequences)) if sequences else 1
    batch = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        batch[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return batch, mask


def attendable(mask: Tensor) -> Tensor:
    """``mask [B, L]`` for attention: rows without any token attend to everything, since a softmax over nothing is NaN."""
    return mask | ~mask.any(1, keepdim=True)


def white_background(image: Any) -> Any:
    """A PIL image as RGB; what is transparent becomes white, and a camera's note to rotate it is obeyed."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
