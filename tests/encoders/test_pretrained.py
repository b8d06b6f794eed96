"""Encoders out of transformers: tiny models with random weights, written to a folder and read from there."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from PIL import Image

from em3.encoders import EncoderError, encode_catalogue, load_encoder, pretrained_encoder, set_trainable

from .toy import pictures_and_texts, written

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "white", "thing", "a", "##s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder a model: ViT, BERT, CLIP (both parts), ResNet (convolutions), T5 (encoder and decoder)."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    t = transformers
    vit = t.ViTModel(t.ViTConfig(image_size=32, patch_size=8, **SMALL))
    vit_input = t.ViTImageProcessor(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.5])
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = t.BertTokenizer(str(root / "vocab.txt"))
    bert = t.BertModel(t.BertConfig(vocab_size=len(WORDS), **SMALL))
    clip = t.CLIPModel(t.CLIPConfig(
        text_config=dict(vocab_size=len(WORDS), max_position_embeddings=20, **SMALL),
        vision_config=dict(image_size=32, patch_size=16, **SMALL), projection_dim=8,
    ))  # fmt: skip
    clip_input = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    resnet = t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"))
    t5 = t.T5Model(t.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2))
    for name, parts in {
        "vit": (vit, vit_input), "bert": (bert, tokenizer), "clip": (clip, clip_input, tokenizer),
        "resnet": (resnet, vit_input), "t5": (t5, tokenizer),
    }.items():  # fmt: skip
        for part in parts:
            part.save_pretrained(root / name)
    return root


CASES = [("vit", "image"), ("clip", "image"), ("resnet", "image"), ("bert", "text"), ("clip", "text"), ("t5", "text")]
TOKENS = {"vit": 17, "clip": 5, "resnet": 16}


def batch_of(encoder, seed):
    if encoder.kind == "text":
        return encoder.collate([encoder.prepare(text) for text in ("a red thing", "things", "", "green")])
    pictures, _ = pictures_and_texts(3, seed, 40)
    return encoder.collate([encoder.prepare(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tokens_of_any_model(folder, name, kind, seed):
    encoder = pretrained_encoder(folder / name, kind)
    assert encoder.kind == kind
    assert encoder.width == (12 if name == "resnet" else 16)
    assert not encoder.training
    batch, mask = batch_of(encoder, seed)
    tokens, real = encoder(batch, mask)
    assert tokens.isfinite().all()
    if kind == "image":
        assert batch.dtype == torch.uint8
        assert batch.shape == (3, 3, 32, 32)
        assert tokens.shape == (3, TOKENS[name], encoder.width)
        _, real = encoder(batch, torch.tensor([True, False, True]))
        assert real.sum(1).tolist() == [TOKENS[name], 0, TOKENS[name]]
    else:
        special = len(encoder.prepared_by("")["input_ids"])  # [CLS], [SEP]
        assert real.sum(1).tolist() == [3 + special, 2 + special, 0, 1 + special]
        for row in (0, 1, 3):
            alone, _ = encoder(batch[row : row + 1, mask[row]], mask[row : row + 1, mask[row]])
            torch.testing.assert_close(tokens[row, mask[row]], alone[0])


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pictures_reach_the_model_as_its_processor_makes_them(folder, name, seed):
    encoder = pretrained_encoder(folder / name, "image")
    pictures, _ = pictures_and_texts(1, seed, 50)
    image = Image.fromarray(pictures[0].permute(1, 2, 0).numpy())
    processor = transformers.AutoImageProcessor.from_pretrained(folder / name, use_fast=False)
    model = transformers.AutoModel.from_pretrained(folder / name)
    inputs = processor(images=image, return_tensors="pt")
    want = getattr(model, "vision_model", model)(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(*encoder.collate([encoder.prepare(image)]))[0], want)


def test_texts_reach_the_model_as_its_tokenizer_makes_them(folder):
    encoder = pretrained_encoder(folder / "bert", "text", max_length=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    model = transformers.AutoModel.from_pretrained(folder / "bert")
    inputs = tokenizer("a red thing", return_tensors="pt")
    want = model.eval()(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(*encoder.collate([encoder.prepare("a red thing")]))[0], want)
    assert encoder.prepare("a red thing " * 9).tolist() == [2, 10, 5, 9, 10, 3], "cut, with its end marked"


@pytest.mark.parametrize("trained", [None, {"mode": "lora", "rank": 2}, {"mode": "last_n", "last_n": 1}])
@pytest.mark.parametrize(("name", "kind"), [("vit", "image"), ("clip", "image"), ("clip", "text"), ("bert", "text"),
                                            ("t5", "text")])  # fmt: skip
def test_save_and_load(folder, name, kind, trained, tmp_path, seed):
    encoder = pretrained_encoder(folder / name, kind, max_length=7)
    if trained:
        set_trainable(encoder, **trained)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    encoder.save(tmp_path)
    again = load_encoder(tmp_path)
    assert again.trained == trained
    batch, mask = batch_of(encoder, seed)
    assert all(torch.equal(x, y) for x, y in zip(batch_of(again, seed), (batch, mask), strict=True))
    torch.testing.assert_close(again(batch, mask)[0], encoder(batch, mask)[0])
    assert kind == "image" or len(again.prepare("a red thing " * 9)) == 7


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if c[0] != "resnet"])
def test_lora(folder, name, kind, seed):
    encoder = pretrained_encoder(folder / name, kind)
    batch, mask = batch_of(encoder, seed)
    before = encoder(batch, mask)[0]
    set_trainable(encoder, "lora", rank=2)
    torch.testing.assert_close(encoder(batch, mask)[0], before)
    names = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert len(names) == 3 * 4 * 2, f"three layers, four projections, A and B: {names}"
    tokens, real = encoder(batch, mask)
    tokens[real].square().mul(torch.randn(encoder.width)).sum().backward()
    moved = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    if name == "clip" and kind == "image":
        assert moved <= set(names)
    assert {n for n in names if "lora_B" in n} <= moved <= set(names)


@pytest.mark.parametrize(("name", "kind", "norm"), [
    ("vit", "image", "model.layernorm."), ("clip", "text", "model.final_layer_norm."), ("bert", "text", None),
    ("t5", "text", "model.final_layer_norm."),
])  # fmt: skip
def test_last_n(folder, name, kind, norm, seed):
    encoder = pretrained_encoder(folder / name, kind)
    set_trainable(encoder, "last_n", last_n=1)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    # transformers 5 calls ViT's layers by another name than 4.
    layers = {"vit": ("model.encoder.layer.2.", "model.layers.2."), "bert": ("model.encoder.layer.2.",),
              "t5": ("model.block.2.",), "clip": ("model.encoder.layers.2.",)}[name]  # fmt: skip
    assert all(n.startswith((*layers, norm) if norm else layers) for n in trained)
    assert any(n.startswith(layers) for n in trained)
    assert norm is None or any(n.startswith(norm) for n in trained)
    batch, mask = batch_of(encoder, seed)
    tokens, real = encoder(batch, mask)
    tokens[real].square().mul(torch.randn(encoder.width)).sum().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == trained


def test_convolutions_have_no_attention_to_adapt(folder):
    with pytest.raises(EncoderError, match=r"no nn\.Linear inside an attention module"):
        set_trainable(pretrained_encoder(folder / "resnet", "image"), "lora")


def test_over_a_catalogue(folder, tmp_path, seed):
    items = written(tmp_path, *pictures_and_texts(5, seed))
    items.texts[1], items.pictures[2] = "", None
    encoders = pretrained_encoder(folder / "clip", "image"), pretrained_encoder(folder / "clip", "text")
    streams = encode_catalogue(items, *encoders, batch_size=2)
    assert streams["image"][1].diff().tolist() == [5, 5, 0, 5, 5]
    assert streams["text"][1].diff()[1] == 0
    assert streams["text"][0].shape[1] == 16


def test_what_cannot_be_loaded(folder, tmp_path, monkeypatch):
    def refused(source, kind, message):
        with pytest.raises(EncoderError, match=re.escape(message)):
            pretrained_encoder(source, kind)

    refused(folder / "vit", "audio", "kind: was 'audio', must be 'image' or 'text'")
    refused(tmp_path / "none", "text", f"{tmp_path / 'none'}: no such folder, must hold a model")
    refused("./none", "text", "./none: no such folder, must hold a model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "image", f"{tmp_path / 'empty'}: cannot be loaded to encode images")
    refused(folder / "vit", "text", "vit: cannot be loaded to encode texts")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder / "vit", "image", "pretrained encoders need transformers: pip install 'em3[hf]'")


def test_peft_is_missing(folder, monkeypatch):
    encoder = pretrained_encoder(folder / "vit", "image")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EncoderError, match=re.escape("mode 'lora' needs peft: pip install 'em3[hf]'")):
        set_trainable(encoder, "lora")
