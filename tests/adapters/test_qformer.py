"""Weights of transformers' Q-Formers and of ``nn.MultiheadAttention`` in em3's layers: same outputs, same gradients."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import em3
from em3.adapters import fusion_qformer_from, qformer_attention_from
from em3.adapters.qformer import state_of

from .qformers import HEADS, NAMES, TOKENS, WIDTH, assert_same, call, qformer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_qformer(name, masked, seed):
    theirs = qformer(name)
    start, tokens = torch.randn(1, 5, WIDTH), torch.randn(3, 7, TOKENS)
    mask = torch.arange(7) < torch.tensor([7, 2, 4])[:, None] if masked else None
    grad = torch.randn(3, 5, WIDTH)
    ours = fusion_qformer_from(theirs, start, out_dim=6)
    x = tokens.clone().requires_grad_()
    got = ours.queries([x], [mask])
    got.backward(grad)
    gradients = {n: p.grad for n, p in ours.named_parameters() if not n.startswith("out.")}

    def of_them(dtype):
        model, query, x = copy.deepcopy(theirs).to(dtype), start.to(dtype).requires_grad_(), tokens.to(dtype).requires_grad_()
        out = call(model, query.expand(3, -1, -1), x, encoder_attention_mask=mask).last_hidden_state
        out.backward(grad.to(dtype))
        return state_of(model, lambda p: p.grad) | {"output": out.detach(), "tokens": x.grad, "query": query.grad[0]}

    assert_same(gradients | {"output": got.detach(), "tokens": x.grad}, of_them(torch.float32), lambda: of_them(torch.float64))
    assert ours([tokens], [mask]).shape == (3, 6)


def test_a_model_in_eval_stays_in_eval(seed):
    for training in (True, False):
        theirs = qformer("Blip2", dropout=0.25, layers=1).train(training)
        assert fusion_qformer_from(theirs, torch.zeros(2, WIDTH)).training == training
        assert qformer_attention_from(torch.nn.MultiheadAttention(8, 2, dropout=0.5).train(training)).training == training


def test_relatives_of_multihead_attention_are_refused():
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"^module: was torch.ao.nn.quantizable.modules.activation.MultiheadAttention, must be"):
        qformer_attention_from(quantizable)
    hooked = torch.nn.MultiheadAttention(8, 2)
    hooked.out_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"^module.out_proj: was NonDynamicallyQuantizableLinear, or had hooks"):
        qformer_attention_from(hooked)


def test_the_weights_are_copies(seed):
    theirs = qformer("Blip2", dropout=0.25, layers=2)
    ours = fusion_qformer_from(theirs, torch.zeros(2, WIDTH), backend="torch")
    layer = ours.layers[0]
    assert (ours.dropout, layer.dropout, layer.attention_dropout, layer.cross.dropout) == (0.25,) * 4
    assert layer.cross.backend == "torch"
    assert layer.norm_ffn.eps == ours.norm_query.eps == 1e-12
    before = theirs.encoder.layer[0].attention.output.dense.weight.clone()
    with torch.no_grad():
        layer.proj.weight.zero_()
    assert torch.equal(theirs.encoder.layer[0].attention.output.dense.weight, before)
    half = fusion_qformer_from(theirs.bfloat16(), torch.zeros(2, WIDTH))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_out_of_a_model_that_holds_one(seed):
    import transformers

    config = transformers.Blip2Config(
        vision_config=dict(hidden_size=TOKENS, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28),
        qformer_config=dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                            encoder_hidden_size=TOKENS, vocab_size=50),
        text_config=dict(model_type="opt", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                         vocab_size=50, word_embed_proj_dim=16, max_position_embeddings=64),
        num_query_tokens=6, image_token_index=49,
    )  # fmt: skip
    model = transformers.Blip2Model(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    ours = fusion_qformer_from(model).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state
        want = call(model.qformer, model.query_tokens.expand(2, -1, -1), tokens).last_hidden_state
        torch.testing.assert_close(ours.queries([tokens]), want, rtol=1e-4, atol=1e-5)
        got = model.get_qformer_features(pixels)
        torch.testing.assert_close(got, want)
        assert em3.patch(model) == {"qformer.encoder.layer.0.crossattention.attention": "qformer_attention"}
        torch.testing.assert_close(model.get_qformer_features(pixels), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_cross_attention(name, seed):
    module = qformer(name).encoder.layer[0].crossattention
    ours = qformer_attention_from(module)
    query, tokens = torch.randn(3, 5, WIDTH), torch.randn(3, 7, TOKENS)
    want = module.output.dense(module.attention(query, encoder_hidden_states=tokens)[0])
    got = ours(query, tokens)
    grad = torch.randn(want.shape)
    want.backward(grad)
    got.backward(grad)
    at = module.attention
    pairs = [(ours.w_q, at.query.weight), (ours.w_k[0], at.key.weight), (ours.w_v[0], at.value.weight),
             (ours.w_o, module.output.dense.weight), (ours.b_q, at.query.bias), (ours.b_v[0], at.value.bias),
             (ours.b_o, module.output.dense.bias)]  # fmt: skip
    mine, others = ({str(i): pair[k].grad for i, pair in enumerate(pairs)} for k in (0, 1))
    assert_same(mine | {"output": got.detach()}, others | {"output": want.detach()})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [24, 12])
def test_multihead_attention(bias, width, seed):
    module = torch.nn.MultiheadAttention(24, 3, bias=bias, kdim=width, vdim=width, batch_first=True, dropout=0.3).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = qformer_attention_from(module, strategy="absorb").eval()
    assert (ours.dropout, ours.strategy, ours.b_q is None) == (0.3, "absorb", not bias)
    query, tokens = torch.randn(3, 5, 24), torch.randn(3, 7, width)
    mask = torch.arange(7) < torch.tensor([7, 2, 4])[:, None]
    want, maps = module(query, tokens, tokens, key_padding_mask=~mask, average_attn_weights=False)
    got = ours(query, tokens, [mask])
    grad = torch.randn(want.shape)
    want.backward(grad)
    got.backward(grad)
    torch.testing.assert_close(ours.attention_weights(query, tokens, [mask])[0], maps.detach(), rtol=1e-4, atol=1e-6)
    if width == 24:
        of_them = dict(zip("qkv", module.in_proj_weight.grad.chunk(3), strict=True))
    else:
        of_them = {x: getattr(module, f"{x}_proj_weight").grad for x in "qkv"}
    of_us = {"q": ours.w_q.grad, "k": ours.w_k[0].grad, "v": ours.w_v[0].grad, "o": ours.w_o.grad}
    of_them["o"] = module.out_proj.weight.grad
    if bias:
        of_us |= {"bias": torch.stack([ours.b_q.grad, ours.b_k[0].grad, ours.b_v[0].grad]).flatten(), "b_o": ours.b_o.grad}
        of_them |= {"bias": module.in_proj_bias.grad, "b_o": module.out_proj.bias.grad}
    assert_same(of_us | {"output": got.detach()}, of_them | {"output": want.detach()})


def test_error_messages():
    multihead = torch.nn.MultiheadAttention
    for module, message in [
        (torch.nn.Linear(2, 2), "module: was torch.nn.modules.linear.Linear, must be torch.nn.MultiheadAttention or"),
        (multihead(4, 2, kdim=3, vdim=2), "module: had kdim 3 and vdim 2, must read"),
        (multihead(4, 2, add_bias_kv=True), "module: had add_bias_kv or add_zero_attn, must have neither"),
        (multihead(4, 2, add_zero_attn=True), "module: had add_bias_kv or add_zero_attn, must have neither"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            qformer_attention_from(module)
    theirs = qformer("Blip2", layers=1)
    for args, message in [
        ((torch.nn.Linear(2, 2),), "model: was Linear, must be a Q-Former of transformers"),
        ((theirs,), rf"query_tokens: was None, must be \[Q, {WIDTH}\]: Blip2QFormerModel holds none"),
        ((theirs, torch.zeros(2, 3, WIDTH)), rf"query_tokens: was \[2, 3, {WIDTH}\], must be \[Q, {WIDTH}\] or"),
        ((qformer("Blip2", layers=1, hidden_act="relu"), torch.zeros(2, WIDTH)), "model.config.hidden_act: was 'relu', must be 'gelu'"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            fusion_qformer_from(*args)
    theirs.encoder.layer[0].crossattention.attention.key = torch.nn.Sequential(torch.nn.Linear(TOKENS, WIDTH))
    with pytest.raises(ValueError, match=r"was torch.nn.modules.container.Sequential, must be torch.nn.Linear; merge or remove"):
        fusion_qformer_from(theirs, torch.zeros(2, WIDTH))
    assert WIDTH % HEADS == 0
