"""The encoders of a run and the token store they fill; made once, found again when the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.table import Items
from ..data.token_store import TokenStore
from ..encoders import (
    Encoder,
    EncoderError,
    PatchEncoder,
    Vocabulary,
    WordEncoder,
    encode_catalogue,
    fit_whitening,
    load_encoder,
    load_pictures,
    pretrained_encoder,
    set_trainable,
    train_by_contrast,
)
from ..jagged import Jagged
from .config import Config, ConfigError, EncoderConfig

log = logging.getLogger("em3.train")
STORE, ENCODERS = "tokens.safetensors", "encoders"
STREAMS = ("image", "text")
Progress = Callable[[str, int, int], None]


def open_tokens(items: Items, config: Config, folder: Path, progress: Progress) -> TokenStore:
    """The run's token store, made by its encoders unless ``config.tokens`` names one that is there already."""
    path = folder / STORE if config.tokens is None else Path(config.tokens)
    if not path.exists():
        if config.tokens is not None:
            raise ConfigError(f"tokens: {path} does not exist, must be a token store, or leave it out to have one made")
        encoders = make_encoders(items, config.encoder, folder / ENCODERS, progress)
        streams = encode_catalogue(
            items, encoders.get("image"), encoders.get("text"), progress=lambda i, n: progress("tokens", i, n)
        )
        halves = {name: (values.half(), offsets) for name, (values, offsets) in streams.items()}
        TokenStore.write(path, halves, item_ids=items.ids, about={"encoder": vars(config.encoder)})
    store = TokenStore.open(path)
    store.verify()  # a run of hours on damaged tokens would look like any other
    if store.item_ids != items.ids:
        raise ConfigError(f"tokens: {path} holds the tokens of another catalogue: its item ids differ from those of the data")
    return store


def make_encoders(items: Items, config: EncoderConfig, folder: Path, progress: Progress) -> dict[str, Encoder]:
    """The encoders by kind, trained or loaded, and saved under ``folder``."""
    asked = {kind: name for kind, name in (("image", config.image), ("text", config.text)) if name != "none"}
    if not asked:
        raise ConfigError("encoder.image, encoder.text: were both none, at least one must be an encoder")
    done = {kind: folder / kind for kind in asked if (folder / kind / "encoder.json").exists()}
    if len(done) == len(asked):
        return {kind: load_encoder(path) for kind, path in done.items()}
    torch.manual_seed(config.seed)
    encoders = {kind: _make(kind, name, items, config) for kind, name in asked.items()}
    image, text = encoders.get("image"), encoders.get("text")
    if isinstance(image, PatchEncoder) and isinstance(text, WordEncoder):
        pictures, present = load_pictures(items, image, progress=lambda i, n: progress("pictures", i, n))
        try:
            result = train_by_contrast(
                image, text, pictures, present, items.texts, epochs=config.epochs, seed=config.seed,
                progress=lambda i, n: progress("encoders", i, n),
            )  # fmt: skip
        except EncoderError as error:
            raise ConfigError(f"encoder.image, encoder.text: the small ones learn from each other, and {error}; "
                              "one of them may be none, or a model of transformers") from error  # fmt: skip
        log.info("encoders: %s", result)
    for kind, encoder in encoders.items():
        fit_whitening(items, encoder)
        encoder.save(folder / kind)
    return encoders


def _make(kind: str, name: str, items: Items, config: EncoderConfig) -> Encoder:
    if name != "small":
        return pretrained_encoder(name, kind)
    if kind == "image":
        return PatchEncoder(config.height, config.width_pixels, width=config.width)
    return WordEncoder(Vocabulary.build(items.texts), width=config.width)


class LiveTokens(nn.Module):
    """Tokens made at every step by encoders that the ranking loss trains, in place of a store.

    Pictures (uint8) and word numbers of the whole catalogue are kept in memory, prepared.
    """

    def __init__(self, items: Items, encoders: dict[str, Encoder], config: EncoderConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({kind: encoders[kind] for kind in STREAMS if kind in encoders})
        for encoder in encoders.values():
            set_trainable(encoder, config.train, last_n=config.last_n, rank=config.rank, seed=config.seed)
        if "image" in encoders:
            self.pictures, self.present = load_pictures(items, encoders["image"])
        if "text" in encoders:
            self.words = [encoders["text"].prepare(text) for text in items.texts]

    @property
    def widths(self) -> dict[str, int]:
        return {kind: encoder.width for kind, encoder in self.encoders.items()}  # type: ignore[misc]

    def read(self, rows: Tensor) -> list[Jagged]:
        """Item numbers ``[U]`` -> one jagged stream a kind, with gradient to what is trained of its encoder."""
        return [self._read(kind, rows) for kind in self.encoders]

    def _read(self, kind: str, rows: Tensor) -> Jagged:
        encoder: Any = self.encoders[kind]
        if kind == "image":
            chosen = rows[self.present[rows]]
            batch, mask = encoder.collate(list(self.pictures[chosen])) if len(chosen) else (None, None)
        else:
            chosen = rows[torch.tensor([len(self.words[i]) > 0 for i in rows.tolist()], dtype=torch.bool)]
            batch, mask = encoder.collate([self.words[i] for i in chosen.tolist()]) if len(chosen) else (None, None)
        lengths = torch.zeros(len(rows), dtype=torch.long)
        values = torch.empty(0, encoder.width)
        if batch is not None:
            tokens, real = encoder.tokens(batch, mask)
            values = tokens[real]
            lengths[torch.isin(rows, chosen)] = real.sum(1)
        return Jagged(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))


def token_dims(source: TokenStore | LiveTokens) -> list[int]:
    """``C_m`` of the streams that ``source.read`` gives, in their order."""
    names: Sequence[str] = source.names if isinstance(source, TokenStore) else list(source.widths)
    return [source.widths[name] for name in names]
