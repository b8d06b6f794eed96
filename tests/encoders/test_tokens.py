"""``encode_catalogue`` and ``load_pictures``: every item's tokens in its place, and what cannot be read is left out."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from PIL import Image

from em3.data.table import Items
from em3.encoders import (
    PatchEncoder,
    Vocabulary,
    WordEncoder,
    encode_catalogue,
    fit_whitening,
    load_encoder,
    load_pictures,
)

from .toy import pictures_and_texts, written


@pytest.fixture
def catalogue(tmp_path, seed):
    """Eleven items: 2 without a picture, 4 with a broken one, 5 missing on disk, 3 and 10 without a text."""
    items = written(tmp_path, *pictures_and_texts(11, seed))
    items.pictures[2] = None
    items.pictures[4].write_bytes(items.pictures[4].read_bytes()[:300])
    items.pictures[5].unlink()
    items.texts[3] = items.texts[10] = ""
    return items


@pytest.fixture
def image():
    return PatchEncoder(32, 32, width=16, num_layers=1, num_heads=2)


@pytest.fixture
def text(catalogue):
    return WordEncoder(Vocabulary.build(catalogue.texts), width=8, num_layers=1, num_heads=2)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_items_tokens(catalogue, image, text, batch_size, caplog):
    seen = []
    streams = encode_catalogue(
        catalogue, image, text, batch_size=batch_size, progress=lambda done, total: seen.append((done, total))
    )
    assert list(streams) == ["image", "text"]
    values, offsets = streams["image"]
    assert values.shape == (8 * 4, 16)
    assert values.dtype == torch.float32
    assert offsets.dtype == torch.int64
    assert offsets.diff().tolist() == [4, 4, 0, 4, 0, 0, 4, 4, 4, 4, 4]
    for item in (0, 3, 10):
        prepared = image.prepare(Image.open(catalogue.pictures[item]))
        alone, _ = image(*image.collate([prepared]))
        torch.testing.assert_close(values[offsets[item] : offsets[item + 1]], alone[0])
    values, offsets = streams["text"]
    prepared = [text.prepare(words) for words in catalogue.texts]
    assert offsets.diff().tolist() == [len(p) for p in prepared]
    assert offsets.diff()[[3, 10]].tolist() == [0, 0]
    for item in (0, 5, 9):
        alone, _ = text(*text.collate([prepared[item]]))
        torch.testing.assert_close(values[offsets[item] : offsets[item + 1]], alone[0])
    assert not values.requires_grad
    assert seen[-1] == (22, 22)
    assert image.training
    logged = [record.getMessage() for record in caplog.records if record.name == "em3.encoders"]
    assert [message.split(": ")[0] for message in logged] == [str(catalogue.pictures[4]), str(catalogue.pictures[5])]


def test_pictures(catalogue, image, caplog):
    with caplog.at_level(logging.WARNING, logger="em3.encoders"):
        pictures, present = load_pictures(catalogue, image)
    assert pictures.shape == (11, 3, 32, 32)
    assert pictures.dtype == torch.uint8
    assert (~present).nonzero().flatten().tolist() == [2, 4, 5]
    assert not pictures[~present].any()
    for item in (0, 10):
        assert torch.equal(pictures[item], image.prepare(Image.open(catalogue.pictures[item])))
    assert len(caplog.records) == 2


def test_large_jpegs_are_decoded_smaller_but_look_the_same(tmp_path, image):
    large = Image.radial_gradient("L").resize((900, 700)).convert("RGB")
    large.save(tmp_path / "large.jpg")
    pictures, _ = load_pictures(Items(["a"], [""], [tmp_path / "large.jpg"]), image)
    whole = image.prepare(Image.open(tmp_path / "large.jpg"))
    assert (pictures[0].int() - whole.int()).abs().float().mean() < 4


def test_files_that_are_no_pictures(tmp_path, image, caplog):
    paths = []
    for number, content in enumerate([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"GIF89a", b"BM123"]):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(content)
    paths.append(tmp_path)
    _, present = load_pictures(Items(list("abcdef"), [""] * 6, paths), image)
    assert not present.any()
    assert len(caplog.records) == 6


def test_one_stream_and_no_items(catalogue, image, text):
    assert list(encode_catalogue(catalogue, None, text)) == ["text"]
    assert encode_catalogue(catalogue, None, None) == {}
    streams = encode_catalogue(Items([], [], []), image, text)
    for name, width in (("image", 16), ("text", 8)):
        values, offsets = streams[name]
        assert values.shape == (0, width)
        assert offsets.tolist() == [0]


def test_nothing_but_missing_pictures(image):
    values, offsets = encode_catalogue(Items(["a", "b"], ["", ""], [None, None]), image, None)["image"]
    assert values.shape == (0, 16)
    assert offsets.tolist() == [0, 0, 0]


def test_encoders_of_the_other_kind(catalogue, image, text):
    with pytest.raises(ValueError, match=re.escape("image_encoder: was an encoder of kind 'text', must be of kind")):
        encode_catalogue(catalogue, text, None)
    with pytest.raises(ValueError, match=re.escape("text_encoder: was an encoder of kind 'image', must be of kind")):
        encode_catalogue(catalogue, None, image)
    with pytest.raises(ValueError, match=re.escape("image_encoder: was an encoder of kind 'text', must be of kind")):
        load_pictures(catalogue, text)


def test_whitened_tokens(catalogue, image, text, tmp_path):
    for encoder in (image, text):
        alone = {"image_encoder": None, "text_encoder": None} | {f"{encoder.kind}_encoder": encoder}
        plain, offsets = encode_catalogue(catalogue, **alone)[encoder.kind]
        fit_whitening(catalogue, encoder)
        white, again = encode_catalogue(catalogue, **alone)[encoder.kind]
        assert torch.equal(offsets, again)
        assert plain.mean(0).abs().max() > 0.1
        assert white.mean(0).abs().max() < 1e-3
        # No direction is larger than 1; only those that carry next to nothing are smaller.
        variance = torch.linalg.eigvalsh(torch.cov(white.T, correction=0))
        assert variance.max() < 1.01
        assert variance.median() > 0.8
        encoder.save(tmp_path / encoder.kind)
        loaded = load_encoder(tmp_path / encoder.kind)
        kept, _ = encode_catalogue(catalogue, **(alone | {f"{encoder.kind}_encoder": loaded}))[encoder.kind]
        assert torch.equal(kept, white)


def test_whitening_of_nothing(text):
    fit_whitening(Items(["a"], [""], [None]), text)
    tokens = torch.randn(3, 8)
    assert torch.equal(text.whitening(tokens), tokens)
