"""A catalogue run through frozen encoders: the tokens of every item, ready for the token store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.table import Items
from .base import Encoder
from .whitening import Whitening

log = logging.getLogger("em3.encoders")
Progress = Callable[[int, int], None]


def encode_catalogue(items: Items, image_encoder: Encoder | None, text_encoder: Encoder | None, *,
                     batch_size: int = 256,
                     progress: Progress | None = None) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Tokens of all ``n`` items: ``"image"`` and ``"text"``, each ``(values [T, C] float32, offsets [n + 1] int64)``.

    An encoder that is None leaves its stream out. An item without a picture, or with one that cannot be read (logged to
    ``em3.encoders`` with its path), has no image tokens; one with an empty text no text tokens. The encoders run in
    evaluation mode, without gradients and on their own device; afterwards they are in the mode they were in.

    Args:
        items: the catalogue.
        image_encoder, text_encoder: of kind ``"image"`` and ``"text"``.
        batch_size: items encoded at a time.
        progress: called with the items done and their number, over both streams.

    Raises:
        ValueError: for an encoder of the other kind.
    """
    n = len(items.ids)
    streams = {"image": image_encoder, "text": text_encoder}
    batches = {"image": _pictures, "text": _texts}
    asked = {kind: encoder for kind, encoder in streams.items() if encoder is not None}
    tokens, done = {}, 0
    for kind, encoder in asked.items():
        _check_kind(encoder, kind)
        rows: list[Tensor] = [torch.empty(0, encoder.width)] * n
        was_training = encoder.training
        encoder.eval()
        try:
            for numbers, batch, mask in batches[kind](items, encoder, batch_size):
                for number, row in zip(numbers, _encoded(encoder, batch, mask), strict=True):
                    rows[number] = row
                done += len(numbers)
                if progress is not None:
                    progress(done, n * len(asked))
        finally:
            encoder.train(was_training)
        lengths = torch.tensor([0] + [len(row) for row in rows])
        tokens[kind] = torch.cat([torch.empty(0, encoder.width), *rows]), lengths.cumsum(0)
    return tokens


def fit_whitening(items: Items, encoder: Encoder, *, sample: int = 2000) -> None:
    """Set ``encoder.whitening`` by its tokens of at most ``sample`` items, evenly spaced over the catalogue."""
    numbers = range(0, len(items.ids), -(-len(items.ids) // sample))
    few = Items(
        [items.ids[i] for i in numbers], [items.texts[i] for i in numbers], [items.pictures[i] for i in numbers]
    )
    encoder.whitening = None
    chosen = {"image": None, "text": None} | {encoder.kind: encoder}
    values, _ = encode_catalogue(few, chosen["image"], chosen["text"])[encoder.kind]
    encoder.whitening = Whitening.fit(values).to(encoder.device)


def load_pictures(items: Items, image_encoder: Encoder, *,
                  progress: Progress | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All pictures as ``image_encoder`` takes them: uint8 ``[n, 3, h, w]``, and bool ``[n]``, whether there is one.

    Pictures that are missing or cannot be read are zeros; the unreadable ones are logged with their path. Raises as
    :func:`encode_catalogue`.
    """
    _check_kind(image_encoder, "image")
    n = len(items.ids)
    pictures = torch.zeros(n, 3, *image_encoder.picture_size, dtype=torch.uint8)
    present = torch.zeros(n, dtype=torch.bool)
    for done, (number, picture) in enumerate(_decoded(range(n), items, image_encoder), start=1):
        if picture is not None:
            pictures[number], present[number] = picture, True
        if progress is not None:
            progress(done, n)
    return pictures, present


@torch.inference_mode()
def _encoded(encoder: Encoder, batch: Tensor, mask: Tensor) -> list[Tensor]:
    """The real tokens of each item of a batch, ``[N_b, C]`` float32 on the CPU."""
    tokens, real = encoder.tokens(batch.to(encoder.device), mask.to(encoder.device))
    return list(tokens[real].float().cpu().split(real.sum(1).tolist()))


Batches = Iterator[tuple[Sequence[int], Tensor, Tensor]]


def _pictures(items: Items, encoder: Encoder, batch_size: int) -> Batches:
    """Batches of items in order; of those, the missing pictures are masked."""
    blank = torch.zeros(3, *encoder.picture_size, dtype=torch.uint8)
    for start in range(0, len(items.ids), batch_size):
        numbers = range(start, min(start + batch_size, len(items.ids)))
        decoded = [picture for _, picture in _decoded(numbers, items, encoder)]
        batch, _ = encoder.collate([blank if picture is None else picture for picture in decoded])
        yield numbers, batch, torch.tensor([picture is not None for picture in decoded])


def _texts(items: Items, encoder: Encoder, batch_size: int) -> Batches:
    """Batches of items whose texts are about equally long: less padding."""
    prepared = [encoder.prepare(text) for text in items.texts]
    order = sorted(range(len(prepared)), key=lambda number: len(prepared[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch, mask = encoder.collate([prepared[number] for number in numbers])
        yield numbers, batch, mask


def _decoded(numbers: Sequence[int], items: Items, encoder: Encoder) -> Iterator[tuple[int, Tensor | None]]:
    """Pictures in order, prepared; several at a time, for Pillow lets other threads run while it decodes and resizes.

    What cannot be read is None, and is logged here, in the order of the items: the threads finish in any order.
    """

    def decode(number: int) -> Tensor | Exception | None:
        path = items.pictures[number]
        if path is None:
            return None
        try:
            image = _read(path, encoder.picture_size)
        except Exception as error:  # decoders raise whatever a broken file leads them to: OSError, SyntaxError, ...
            return error
        return encoder.prepare(image)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for number, picture in zip(numbers, pool.map(decode, numbers), strict=True):
            if isinstance(picture, Exception):
                kind = type(picture).__name__
                log.warning("%s: no picture, it cannot be read: %s: %s", items.pictures[number], kind, picture)
                picture = None
            yield number, picture


def _read(path: Path, size: tuple[int, int]) -> Any:
    """A decoded PIL image."""
    from PIL import Image

    height, width = size
    with Image.open(path) as image:
        image.draft("RGB", (width, height))  # lets a JPEG decoder make a smaller picture of at least this size
        image.load()
        return image.copy()


def _check_kind(encoder: Encoder, kind: str) -> None:
    if encoder.kind != kind:
        raise ValueError(f"{kind}_encoder: was an encoder of kind {encoder.kind!r}, must be of kind {kind!r}")
