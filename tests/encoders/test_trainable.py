"""``set_trainable``: which parameters get a gradient."""

from __future__ import annotations

import re

import pytest
import torch

from em3.encoders import EncoderError, PatchEncoder, Vocabulary, WordEncoder, set_trainable


@pytest.fixture(params=["image", "text"])
def case(request):
    """An encoder with a batch and its mask."""
    if request.param == "image":
        batch, mask = torch.randint(0, 256, (3, 3, 32, 32)), torch.ones(3, dtype=torch.bool)
        return PatchEncoder(32, 32, width=16, num_layers=3, num_heads=2), batch, mask
    encoder = WordEncoder(Vocabulary.build(["a b c"]), width=16, num_layers=3, num_heads=2)
    return encoder, *encoder.collate([encoder.prepare("a b"), encoder.prepare("c")])


def changed_by_a_step(encoder, batch, mask) -> set[str]:
    """Names of the parameters that gradient descent changes."""
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    tokens, real = encoder(batch, mask)
    if tokens.requires_grad:
        tokens[real].square().mul(torch.randn(encoder.width)).sum().backward()
    for p in encoder.parameters():
        if p.grad is not None:
            p.data -= p.grad
    return {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}


def test_frozen(case):
    encoder, batch, mask = case
    around = torch.nn.ModuleList([encoder])
    set_trainable(encoder, "frozen")
    around.train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(batch, mask)[0].requires_grad
    assert changed_by_a_step(encoder, batch, mask) == set()


def test_last_n(case):
    encoder, batch, mask = case
    set_trainable(encoder, "last_n", last_n=2)
    encoder.train()
    assert encoder.training
    want = {name for name, _ in encoder.named_parameters() if name.startswith(("layers.1.", "layers.2.", "norm."))}
    want -= {f"layers.{i}.attention.k.bias" for i in (1, 2)}  # a softmax does not see it: its gradient is rounding
    assert want <= changed_by_a_step(encoder, batch, mask) <= want | {f"layers.{i}.attention.k.bias" for i in (1, 2)}


def test_lora_starts_as_the_identity_and_trains_the_projections(case):
    encoder, batch, mask = case
    before = encoder(batch, mask)[0].detach()
    set_trainable(encoder, "lora", rank=2)
    assert torch.equal(encoder(batch, mask)[0], before)
    want = {f"layers.{layer}.attention.{name}.lora_{ab}.em3.weight" for layer in range(3) for name in "qkvo" for ab in "AB"}
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == want
    # A does not move in the first step, for B is zero.
    assert changed_by_a_step(encoder, batch, mask) == {name for name in want if "lora_B" in name}
    assert (encoder(batch, mask)[0] - before).abs().max() > 0


def test_lora_is_drawn_from_its_seed(case):
    encoder, _, _ = case
    state = torch.get_rng_state()
    set_trainable(encoder, "lora", rank=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    other = PatchEncoder(32, 32, width=16, num_layers=3, num_heads=2)
    for seed, equal in ((3, True), (4, False)):
        again = PatchEncoder(32, 32, width=16, num_layers=3, num_heads=2)
        set_trainable(again, "lora", rank=2, seed=seed)
        a = [p for name, p in encoder.named_parameters() if "lora_A" in name]
        b = [p for name, p in again.named_parameters() if "lora_A" in name]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) == equal
    assert other.trained is None


def test_modes_can_be_changed_until_lora(case):
    encoder, _, _ = case
    set_trainable(encoder, "frozen")
    set_trainable(encoder, "last_n", last_n=1)
    assert encoder.train().training
    set_trainable(encoder, "lora")
    with pytest.raises(EncoderError, match="has LoRA already"):
        set_trainable(encoder, "frozen")


@pytest.mark.parametrize(("wrong", "message"), [
    ({"mode": "all"}, "mode: was 'all', must be one of frozen, lora, last_n"),
    ({"mode": "last_n", "last_n": 4}, "last_n: was 4, must be 1 to 3, the number of layers"),
    ({"mode": "last_n", "last_n": 0}, "last_n: was 0, must be 1 to 3, the number of layers"),
    ({"mode": "lora", "rank": 0}, "rank: was 0, must be at least 1"),
])  # fmt: skip
def test_error_messages(case, wrong, message):
    with pytest.raises(EncoderError, match=re.escape(message)):
        set_trainable(case[0], **wrong)
    assert case[0].trained is None
