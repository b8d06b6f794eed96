"""Pictures and titles to tokens: what the Fusion-Q-Former reads."""

from .base import Encoder, EncoderError
from .contrast import ContrastResult, train_by_contrast
from .load import load_encoder
from .pretrained import pretrained_encoder
from .small import PatchEncoder, WordEncoder
from .tokens import encode_catalogue, fit_whitening, load_pictures
from .trainable import set_trainable
from .vocabulary import Vocabulary

__all__ = [
    "ContrastResult",
    "Encoder",
    "EncoderError",
    "PatchEncoder",
    "Vocabulary",
    "WordEncoder",
    "encode_catalogue",
    "fit_whitening",
    "load_encoder",
    "load_pictures",
    "pretrained_encoder",
    "set_trainable",
    "train_by_contrast",
]
