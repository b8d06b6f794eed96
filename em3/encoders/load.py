"""Encoders back from their folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import pretrained
from .base import ABOUT, FORMAT, WEIGHTS, Encoder, EncoderError
from .small import PatchEncoder, WordEncoder
from .trainable import set_trainable
from .whitening import Whitening

CLASSES: dict[str, type[Encoder]] = {
    c.__name__: c
    for c in (PatchEncoder, WordEncoder, pretrained.PretrainedImageEncoder, pretrained.PretrainedTextEncoder)
}


def load_encoder(folder: str | os.PathLike[str]) -> Encoder:
    """The encoder that :meth:`Encoder.save` wrote, on the CPU and in evaluation mode, trainable as it was.

    Raises:
        EncoderError: naming the file that is missing, damaged, or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = _about(Path(folder) / ABOUT)
    weights = Path(folder) / WEIGHTS
    try:
        encoder = CLASSES[about["class"]].restore(about["settings"], Path(folder))
        if about["trained"] is not None:
            set_trainable(encoder, **about["trained"])
        if about["whitened"]:
            encoder.whitening = Whitening(encoder.width)
        encoder.load_state_dict(load_file(weights))
    except EncoderError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise EncoderError(f"{folder}: the encoder is damaged: {type(error).__name__}: {error}") from error
    return encoder.eval()


def _about(path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        version, name = about["format"], about["class"]
    except FileNotFoundError as error:
        raise EncoderError(f"{path}: no such file, so its folder holds no encoder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{path}: is no description of an encoder: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise EncoderError(f"{path}: has format {version}, this em3 reads format {FORMAT}")
    if name not in CLASSES:
        raise EncoderError(f"{path}: has class {name!r}, must be one of {', '.join(CLASSES)}")
    return about
