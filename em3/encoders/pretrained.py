"""Encoders out of the transformers library, by name or by folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import Encoder, EncoderError, attendable, pad, white_background

PARTS = {"image": "vision_model", "text": "text_model"}  # of CLIP-like models
MODEL, INPUT = "model", "input"  # folders inside a saved encoder


def pretrained_encoder(source: str | os.PathLike[str], kind: str, *, max_length: int = 32) -> Encoder:
    """An encoder around a model that :mod:`transformers` can load, with all its tokens.

    Any model whose output has a ``last_hidden_state`` will do; of a CLIP-like model the part of this kind is taken, of
    an encoder-decoder its encoder. Only weights in the safetensors format are read, as float32.

    Args:
        source: a folder as ``save_pretrained`` writes it (nothing is downloaded then), or a model's name on the hub.
        kind: ``"image"`` or ``"text"``.
        max_length: texts are cut at this many tokens, special ones included; images do not use it.

    Raises:
        EncoderError: if transformers is missing, there is no such folder or model, or it cannot be used.
    """
    if kind not in PARTS:
        raise EncoderError(f"kind: was {kind!r}, must be 'image' or 'text'")
    transformers = _transformers()
    path = Path(source)
    if not path.is_dir() and (path.is_absolute() or len(path.parts) > 2 or str(source).startswith((".", "~"))):
        raise EncoderError(f"{source}: no such folder, must hold a model written by save_pretrained")
    local: dict[str, Any] = {"local_files_only": path.is_dir(), "trust_remote_code": False}
    try:
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **local)
        prepare = _processor(source, kind, **local)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise EncoderError(f"{source}: cannot be loaded to encode {kind}s: {error}") from error
    return PretrainedImageEncoder(model, prepare) if kind == "image" else PretrainedTextEncoder(
        model, prepare, max_length=max_length)  # fmt: skip


class _Pretrained(Encoder):
    """A transformers model, or its part, with what prepares its input."""

    def __init__(self, model: nn.Module, prepare: Any) -> None:
        super().__init__()
        self.model_config: Any = model.config  # of the whole: the part is taken again after it is loaded. Not `config`:
        # by that name PEFT would take the encoder for a model of transformers
        if getattr(self.model_config, "is_encoder_decoder", False):
            self.model: Any = model.get_encoder()  # type: ignore[operator]
        else:
            self.model = getattr(model, PARTS[self.kind], model)
        self.prepared_by = prepare
        self.eval()

    def settings(self) -> dict[str, Any]:
        return {}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """As every encoder does, with the model's configuration in ``model/`` and that of its input in ``input/``."""
        self.model_config.save_pretrained(Path(folder) / MODEL)
        self.prepared_by.save_pretrained(Path(folder) / INPUT)
        super().save(folder)

    @classmethod
    def restore(cls, settings: dict[str, Any], folder: Path) -> _Pretrained:
        transformers = _transformers()
        config = transformers.AutoConfig.from_pretrained(folder / MODEL, local_files_only=True)
        model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        return cls(model, _processor(folder / INPUT, cls.kind, local_files_only=True), **settings)

    def _hidden(self, **inputs: Tensor) -> Tensor:
        output = self.model(**inputs)
        hidden: Tensor | None = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise EncoderError(f"{type(self.model).__name__}: its output has no last_hidden_state, so no tokens to use")
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden  # convolutional: [B, C, h, w]


class PretrainedImageEncoder(_Pretrained):
    """Made by :func:`pretrained_encoder`. Pictures are resized and cropped as the model's processor says."""

    kind = "image"

    def __init__(self, model: nn.Module, prepare: Any) -> None:
        from PIL import Image

        super().__init__(model, prepare)
        scale = prepare.rescale_factor if getattr(prepare, "do_rescale", True) else 1.0
        mean, std = [0.0] * 3, [1.0] * 3
        if getattr(prepare, "do_normalize", False):
            mean, std = prepare.image_mean, prepare.image_std
        self.scale: Tensor
        self.shift: Tensor
        # (x scale - mean) / std; from the processor's settings, so no part of the weights
        self.register_buffer("scale", (scale / torch.tensor(std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1), persistent=False)
        probe = self._pixels(Image.new("RGB", (64, 64)))
        self.picture_size = (probe.shape[1], probe.shape[2])
        with torch.no_grad():
            tokens, _ = self(probe[None], torch.ones(1, dtype=torch.bool))
        self.width: int = tokens.shape[2]

    def _pixels(self, image: Any) -> Tensor:
        """uint8 ``[3, h, w]``: resized and cropped by the processor, which does not scale the values."""
        made = self.prepared_by(
            images=image, do_rescale=False, do_normalize=False, return_tensors="np", input_data_format="channels_last"
        )
        return torch.from_numpy(made["pixel_values"][0]).round().clamp(0, 255).to(torch.uint8)

    def prepare(self, source: Any) -> Tensor:
        """A PIL image -> uint8 ``[3, h, w]``. Raises EncoderError if the model's processor keeps no fixed size."""
        pixels = self._pixels(white_background(source))
        if pixels.shape[1:] != self.picture_size:
            raise EncoderError(
                f"{type(self.prepared_by).__name__}: made pictures of {tuple(self.picture_size)} and "
                f"{tuple(pixels.shape[1:])} pixels, must have one fixed size"
            )
        return pixels

    def collate(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.stack(prepared), torch.ones(len(prepared), dtype=torch.bool)

    def forward(self, batch: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``batch [B, 3, h, w]`` of values 0 to 255, ``mask [B]`` -> tokens ``[B, N, C]`` and mask ``[B, N]``."""
        tokens = self._hidden(pixel_values=batch.to(self.scale.dtype) * self.scale - self.shift)
        return tokens, mask[:, None].expand(-1, tokens.shape[1])


class PretrainedTextEncoder(_Pretrained):
    """Made by :func:`pretrained_encoder`. The model's special tokens are among the tokens; an empty text has none."""

    kind = "text"

    def __init__(self, model: nn.Module, prepare: Any, *, max_length: int = 32) -> None:
        super().__init__(model, prepare)
        self.max_length = max_length
        self.padding = prepare.pad_token_id or 0
        one = self.prepare("a")
        with torch.no_grad():
            tokens, _ = self(one[None], torch.ones(1, len(one), dtype=torch.bool))
        self.width: int = tokens.shape[2]

    def prepare(self, source: Any) -> Tensor:
        """A str -> its tokens' numbers, int64 ``[L]``, ``0 <= L <= max_length``."""
        if not source.strip():
            return torch.empty(0, dtype=torch.int64)
        numbers = self.prepared_by(source, truncation=True, max_length=self.max_length)["input_ids"]
        return torch.tensor(numbers, dtype=torch.int64)

    def collate(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor]:
        batch, mask = pad(prepared)
        return batch.masked_fill(~mask, self.padding), mask

    def forward(self, batch: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``batch, mask [B, L]`` -> tokens ``[B, L, C]`` and ``mask`` as it was."""
        return self._hidden(input_ids=batch, attention_mask=attendable(mask).long()), mask

    def settings(self) -> dict[str, Any]:
        return {"max_length": self.max_length}


def _processor(source: str | os.PathLike[str], kind: str, **options: Any) -> Any:
    transformers = _transformers()
    if kind == "text":
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    return transformers.AutoImageProcessor.from_pretrained(source, use_fast=False, **options)  # fast: needs torchvision


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EncoderError(f"pretrained encoders need transformers: pip install 'em3[hf]' ({error})") from error
    return transformers
