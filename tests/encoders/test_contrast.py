"""``train_by_contrast``: that it learns, what takes part, and that a seed decides everything."""

from __future__ import annotations

import re

import pytest
import torch

from em3.encoders import PatchEncoder, Vocabulary, WordEncoder, set_trainable, train_by_contrast
from em3.encoders.contrast import _augmented

from .toy import pictures_and_texts


def encoders(texts, seed=0):
    torch.manual_seed(seed)
    return (PatchEncoder(32, 32, width=32, num_layers=1, num_heads=2),
            WordEncoder(Vocabulary.build(texts), width=32, num_layers=1, num_heads=2))  # fmt: skip


def test_learns_which_text_belongs_to_which_picture(seed):
    pictures, texts = pictures_and_texts(480, seed)
    image, text = encoders(texts)
    seen = []
    result = train_by_contrast(
        image, text, pictures, torch.ones(480, dtype=torch.bool), texts, epochs=12, batch_size=48, lr=3e-3,
        held_out=0.2, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (result.pairs, result.held_out, result.candidates) == (384, 96, 64)
    assert result.chance == 1 / 64
    # 4 colours in 4 places, so of 64 candidates about 4 look alike: no more than a quarter can be right.
    assert min(result.image_to_text, result.text_to_image) > 5 * result.chance, f"seed {seed}: {result}"
    assert len(result.losses) == 12
    assert result.losses[-1] < result.losses[0] - 1
    assert seen == [(step, 96) for step in range(1, 97)]
    assert not image.training
    assert not text.training


def test_the_seed_decides(seed):
    pictures, texts = pictures_and_texts(40, seed)
    present = torch.ones(40, dtype=torch.bool)
    state = torch.get_rng_state()
    weights = []
    for number in (1, 1, 2):
        image, text = encoders(texts)
        torch.rand(3)  # the state of torch's generator makes no difference
        train_by_contrast(image, text, pictures, present, texts, epochs=2, batch_size=16, seed=number)
        weights.append(torch.cat([p.detach().flatten() for e in (image, text) for p in e.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.set_rng_state(state)
    encoders(texts)
    torch.rand(3)
    before = torch.get_rng_state()
    train_by_contrast(*encoders_without_seed(texts, before), pictures, present, texts, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def encoders_without_seed(texts, state):
    made = encoders(texts)
    torch.set_rng_state(state)
    return made


def test_items_without_picture_or_text(seed):
    """What lies in the place of a missing picture, and a picture without a text, make no difference."""
    pictures, texts = pictures_and_texts(60, seed)
    present = torch.arange(60) >= 10
    texts[-10:] = [""] * 10
    weights = []
    for fill in (0, 255):
        pictures[~present] = fill
        pictures[-10:] = fill
        image, text = encoders(texts)
        result = train_by_contrast(image, text, pictures, present, texts, epochs=1, batch_size=16)
        assert result.pairs + result.held_out == 40
        weights.append(torch.cat([p.detach().flatten() for e in (image, text) for p in e.parameters()]))
    assert torch.equal(*weights)


def test_texts_of_items_without_a_picture_are_learned(seed):
    pictures, texts = pictures_and_texts(60, seed)
    weights = []
    for words in ("lonely red", "red lonely"):
        image, text = encoders(["lonely lonely", *texts])
        train_by_contrast(
            image, text, pictures, torch.arange(60) >= 10, [words] * 10 + texts[10:], epochs=1, batch_size=16
        )
        weights.append(torch.cat([p.detach().flatten() for p in text.layers.parameters()]))
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_items_with_the_same_text_are_no_negatives(seed):
    """With one text everywhere nothing is to be told apart: the contrast is 0 and each answer right."""
    pictures, _ = pictures_and_texts(32, seed)
    texts = ["the same"] * 32
    image, text = encoders(texts)
    result = train_by_contrast(image, text, pictures, torch.ones(32, dtype=torch.bool), texts, epochs=1, batch_size=8)
    assert result.image_to_text == result.text_to_image == 1


def test_augmentation(seed):
    flat = torch.full((64, 3, 16, 16), 200, dtype=torch.uint8)
    torch.testing.assert_close(_augmented(flat), flat.float())
    ramp = torch.arange(32).view(1, 1, 1, 32).expand(64, 3, 16, 32).to(torch.uint8)
    made = _augmented(ramp)
    step = made[:, 0, 8, 20] - made[:, 0, 8, 10]  # of 10 pixels, at 80% to 100% of the size, perhaps mirrored
    assert (step.abs() >= 7.9).all()
    assert (step.abs() <= 10.1).all()
    assert {1.0, -1.0} == set(step.sign().tolist())
    assert len(step.unique()) > 32


@pytest.mark.parametrize(("wrong", "message"), [
    ({"texts": ["a"]}, "pictures, present, texts: had 20, 20, 1 items, must be equally many"),
    ({"texts": ["a"] * 15 + [""] * 5}, "pictures, texts: 15 items have both a picture and a text, must be at least 16"),
    ({"epochs": 0}, "epochs, batch_size, held_out: were 0, 64, 0.1, must be"),
    ({"held_out": 0.6}, "epochs, batch_size, held_out: were 12, 64, 0.6, must be"),
])  # fmt: skip
def test_error_messages(wrong, message):
    image, text = encoders(["a"])
    arguments = {"texts": ["a"] * 20} | wrong
    with pytest.raises(ValueError, match=re.escape(message)):
        train_by_contrast(image, text, torch.zeros(20, 3, 32, 32), torch.ones(20, dtype=torch.bool), **arguments)


def test_a_frozen_encoder_is_refused():
    image, text = encoders(["a"])
    set_trainable(text, "frozen")
    with pytest.raises(ValueError, match=re.escape("text_encoder: was set to train {'mode': 'frozen'}, must be as it")):
        train_by_contrast(image, text, torch.zeros(20, 3, 32, 32), torch.ones(20, dtype=torch.bool), ["a"] * 20)
