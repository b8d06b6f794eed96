"""The small encoders: shapes, masks, and back from their folders."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from em3.encoders import EncoderError, PatchEncoder, Vocabulary, WordEncoder, load_encoder, set_trainable

TEXTS = ["a red house by the sea (1999)", "a tree", "the red tree and the blue sea"]


@pytest.fixture
def words():
    return WordEncoder(Vocabulary.build(TEXTS), width=16, num_layers=2, num_heads=2, max_length=24).eval()


@pytest.fixture
def patches():
    return PatchEncoder(48, 32, width=16, num_layers=2, num_heads=2).eval()


def test_picture_tokens(patches):
    batch, mask = patches.collate([patches.prepare(Image.new("RGB", size, "red")) for size in ((32, 48), (100, 30))])
    assert batch.shape == (2, 3, 48, 32)
    assert batch.dtype == torch.uint8
    assert batch[:, 0].unique().tolist() == [255]
    assert not batch[:, 1:].any()
    tokens, real = patches(batch, torch.tensor([True, False]))
    assert tokens.shape == (2, 6, 16)
    assert real.tolist() == [[True] * 6, [False] * 6]
    assert mask.tolist() == [True, True]
    torch.testing.assert_close(patches(batch.float(), mask)[0], tokens)


def test_default_sizes():
    assert PatchEncoder().num_tokens == 24
    assert PatchEncoder(64, 64).num_tokens == 16
    assert PatchEncoder().width == WordEncoder(Vocabulary.build([])).width == 128


def test_where_something_is_in_the_picture_makes_a_difference(patches):
    top = torch.zeros(1, 3, 48, 32, dtype=torch.uint8)
    top[:, :, :16] = 255
    means = [patches(p, torch.ones(1, dtype=torch.bool))[0].mean(1) for p in (top, top.flip(2))]
    assert (means[0] - means[1]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1"])
def test_modes_of_pictures(patches, mode):
    white = Image.new("RGBA", (20, 20), (0, 0, 0, 0)) if mode in ("RGBA", "LA") else Image.new("RGB", (20, 20), "white")
    prepared = patches.prepare(white.convert(mode))
    assert prepared.shape == (3, 48, 32)
    assert (prepared == 255).all(), "transparent pictures lie on white"


def test_a_camera_held_upright(patches):
    picture = Image.new("RGB", (32, 48))
    picture.paste("white", (0, 0, 32, 24))  # the upper half
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    assert torch.equal(patches.prepare(turned), patches.prepare(picture))


def test_text_tokens(words):
    prepared = [words.prepare(text) for text in (*TEXTS, "")]
    assert [len(p) for p in prepared] == [len(words.vocabulary.encode(text)) for text in TEXTS] + [0]
    batch, mask = words.collate(prepared)
    tokens, real = words(batch, mask)
    assert tokens.shape == (4, max(len(p) for p in prepared), 16)
    assert torch.equal(real, mask)
    assert real.sum(1).tolist() == [len(p) for p in prepared]
    assert tokens.isfinite().all()


def test_padding_changes_nothing(words):
    prepared = [words.prepare(text) for text in TEXTS]
    together, mask = words(*words.collate(prepared))
    for row, one in enumerate(prepared):
        alone, _ = words(*words.collate([one]))
        torch.testing.assert_close(together[row, mask[row]], alone[0])
    batch, mask = words.collate(prepared)
    torch.testing.assert_close(words(batch.masked_fill(~mask, 3), mask)[0][mask], together[mask])


def test_the_order_of_words_makes_a_difference(words):
    batch, mask = words.collate([words.prepare("red tree"), words.prepare("tree red")])
    tokens, _ = words(batch, mask)
    assert (tokens[0, 0] - tokens[1, 1]).abs().max() > 1e-3


def test_no_text_at_all(words):
    tokens, mask = words(*words.collate([words.prepare(""), words.prepare(" ")]))
    assert tokens.shape[:2] == mask.shape == (2, 1)
    assert not mask.any()
    tokens.sum().backward()
    assert all(p.grad.isfinite().all() for p in words.parameters() if p.grad is not None)


def test_long_texts_are_cut(words):
    long = "red tree " * 50
    assert words.prepare(long).tolist() == words.vocabulary.encode(long)[:24]
    assert words(*words.collate([words.prepare(long)]))[0].shape == (1, 24, 16)


@pytest.mark.parametrize("trained", [None, {"mode": "frozen"}, {"mode": "last_n", "last_n": 1},
                                     {"mode": "lora", "rank": 2}])  # fmt: skip
@pytest.mark.parametrize("kind", ["patches", "words"])
def test_save_and_load(kind, trained, tmp_path, request):
    encoder = request.getfixturevalue(kind)
    if trained:
        set_trainable(encoder, **trained)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter.data)
    encoder.save(tmp_path / "e")
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["encoder.json", "weights.safetensors"]
    again = load_encoder(tmp_path / "e")
    assert type(again) is type(encoder)
    assert again.trained == trained
    assert not again.training
    assert again.settings() == encoder.settings()
    theirs = dict(again.named_parameters())
    for name, parameter in encoder.named_parameters():
        assert torch.equal(theirs[name], parameter)
        assert theirs[name].requires_grad == parameter.requires_grad
    batch, mask = (
        (torch.zeros(1, 3, 48, 32), torch.ones(1, dtype=torch.bool))
        if kind == "patches" else encoder.collate([encoder.prepare("a tree")])
    )  # fmt: skip
    assert torch.equal(again(batch, mask)[0], encoder(batch, mask)[0])


def test_damaged_folders(words, tmp_path):
    with pytest.raises(EncoderError, match=re.escape("encoder.json: no such file, so its folder holds no encoder")):
        load_encoder(tmp_path)
    words.save(tmp_path)
    about, weights = tmp_path / "encoder.json", tmp_path / "weights.safetensors"
    good, kept = json.loads(about.read_text()), weights.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(EncoderError, match=re.escape(message)):
            load_encoder(tmp_path)

    about.write_text(json.dumps(good | {"format": 2}))
    refused("has format 2, this em3 reads format 1")
    about.write_text(json.dumps(good | {"class": "Other"}))
    refused("has class 'Other', must be one of PatchEncoder, WordEncoder")
    about.write_text(json.dumps(good | {"settings": good["settings"] | {"width": 32}}))
    refused(f"{tmp_path}: the encoder is damaged: RuntimeError")
    about.write_text("{")
    refused("encoder.json: is no description of an encoder")
    about.write_text(json.dumps(good))
    weights.write_bytes(kept[:-10])
    refused(f"{tmp_path}: the encoder is damaged: SafetensorError")
    weights.unlink()
    refused(f"{tmp_path}: the encoder is damaged: FileNotFoundError")
    weights.write_bytes(kept)
    load_encoder(tmp_path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PatchEncoder(50, 32), "height, width_pixels: were 50, 32, must be multiples of 16"),
    (lambda: PatchEncoder(0, 32), "height, width_pixels: were 0, 32, must be multiples of 16"),
    (lambda: PatchEncoder(32, 32, width=18), "width: was 18, must be a multiple of num_heads 4"),
    (lambda: WordEncoder(Vocabulary.build([]), max_length=0), "max_length: was 0, must be at least 1"),
])  # fmt: skip
def test_error_messages(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_other_sizes_are_refused(patches, words):
    with pytest.raises(ValueError, match=re.escape("batch: was [1, 3, 32, 48], must be [B, 3, 48, 32]")):
        patches(torch.zeros(1, 3, 32, 48), torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape("batch: was [1, 25], must be [B, L] with L at most 24")):
        words(torch.zeros(1, 25, dtype=torch.int64), torch.ones(1, 25, dtype=torch.bool))
