"""``FusionQFormer`` against the same transformer written out with ``nn.MultiheadAttention``, and ``MeanTokens``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import em3
from em3.layers import MeanTokens
from em3.layers.mean_tokens import mean_tokens


def plain(model: em3.FusionQFormer, tokens: torch.Tensor, pre: bool) -> torch.Tensor:
    """One stream of full items ``[B, N, C]``, attention projected the textbook way."""
    x = model.query.expand(len(tokens), -1, -1)

    def attend(q, k, v, heads):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    for layer in model.layers:
        h = layer.num_heads

        def own(q, layer=layer, h=h):
            return layer.proj(attend(*layer.qkv(q).chunk(3, -1), h))

        def cross(q, c=layer.cross, h=h):
            out = attend(F.linear(q, c.w_q, c.b_q), F.linear(tokens, c.w_k[0], c.b_k[0]), F.linear(tokens, c.w_v[0], c.b_v[0]), h)
            return F.linear(out, c.w_o, c.b_o)

        def ffn(q, layer=layer):
            return layer.ffn_out(F.gelu(layer.ffn_in(q)))

        blocks = [(layer.norm_self, own), (layer.norm_ffn, ffn)]
        if layer.cross is not None:
            blocks.insert(1, (layer.norm_cross, cross))
        for norm, block in blocks:
            x = x + block(norm(x)) if pre else norm(x + block(x))
    return model.out(model.norm(x).flatten(1))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_against_the_textbook(norm, seed):
    model = em3.FusionQFormer(
        [6], 8, num_queries=3, num_layers=3, num_heads=2, out_dim=5, cross_every=2, norm=norm
    ).double()
    assert [layer.cross is not None for layer in model.layers] == [True, False, True]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randn(4, 7, 6, dtype=torch.float64)
    got, want = model([tokens]), plain(model, tokens, norm == "pre")
    assert got.shape == (4, 5)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


def test_jagged_equals_padded_and_empty_items(seed):
    model = em3.FusionQFormer([6, 4], 8, num_queries=2, num_layers=2, num_heads=2, mean_residual=True)
    lengths = [[3, 0, 5, 0], [2, 4, 0, 0]]
    padded = [torch.randn(4, 6, 6), torch.randn(4, 4, 4)]
    masks = [torch.arange(p.shape[1]) < torch.tensor(n)[:, None] for p, n in zip(padded, lengths, strict=True)]
    jagged = [em3.Jagged(p[m], torch.tensor([0, *n]).cumsum(0)) for p, m, n in zip(padded, masks, lengths, strict=True)]
    a, b = model(jagged), model(padded, masks)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    a.square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), name
        if "b_k" not in name and name not in ("layers.0.qkv.bias", "layers.1.qkv.bias"):
            assert p.grad.abs().sum() > 0, name
    # Without tokens nothing but constants is left.
    nothing = [em3.Jagged(torch.empty(0, c), torch.zeros(3, dtype=torch.long)) for c in (6, 4)]
    alone = model(nothing)
    torch.testing.assert_close(alone[0], alone[1])
    torch.testing.assert_close(alone[0], a[3])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_attention_weights(norm, seed):
    """Those of the very queries that each cross-attention is called with."""
    model = em3.FusionQFormer([6, 4], 8, num_queries=2, num_layers=3, num_heads=2, cross_every=2, norm=norm, dropout=0.5).eval()
    streams = [torch.randn(4, 5, 6), em3.Jagged(torch.randn(7, 4), torch.tensor([0, 3, 3, 6, 7]))]
    queries = []
    for layer in (model.layers[0], model.layers[2]):
        layer.cross.register_forward_pre_hook(lambda module, args: queries.append(args[0].detach()))
    model(streams)
    first, third = model.attention_weights(streams)
    for found, layer, query in zip((first, third), (model.layers[0], model.layers[2]), queries[:2], strict=True):
        padded, jagged = layer.cross.attention_weights(query, streams)
        torch.testing.assert_close(found[0], padded)
        torch.testing.assert_close(found[1].values(), jagged.values())
        assert not found[0].requires_grad


def test_mean_tokens(seed):
    model = MeanTokens([6, 4], 5)
    streams = [[torch.randn(n, c) for n in lengths] for c, lengths in ((6, (3, 0)), (4, (2, 4)))]
    got = model([em3.Jagged.from_sequences(s) for s in streams])
    for b in range(2):
        want = torch.zeros(5)
        for m, stream in enumerate(streams):
            if len(stream[b]):
                want = want + model.outs[m](model.norms[m](stream[b].mean(0)))
        torch.testing.assert_close(got[b], want)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    tokens = torch.randn(2, 3, 6)
    tokens[~mask] = torch.nan
    one = MeanTokens([6], 5)
    torch.testing.assert_close(one([tokens], [mask])[0], one([tokens[:1, :2]])[0])
    assert one([tokens], [mask])[1].tolist() == [0.0] * 5


def test_compiles_whole(seed):
    model = em3.FusionQFormer([6], 8, num_queries=2, num_heads=2, mean_residual=True)
    tokens = torch.randn(3, 5, 6)
    compiled = torch.compile(lambda t: model([t]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model([tokens]))


def test_means_of_half_tokens_do_not_overflow():
    """300 tokens of about 300 sum up to more than float16 holds, and 257 of them are 256 in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        for streams in ([300 + torch.randn(2, 257, 6)], [em3.Jagged(300 + torch.randn(514, 6), torch.tensor([0, 257, 514]))]):
            values = streams[0] if isinstance(streams[0], torch.Tensor) else streams[0].values()
            half = values.to(dtype)
            given = half if isinstance(streams[0], torch.Tensor) else em3.Jagged(half, streams[0].offsets())
            ((mean, _),) = mean_tokens([given], dtype=dtype)
            torch.testing.assert_close(mean, half.float().view(2, 257, 6).mean(1).to(dtype))


def test_means_read_nothing_behind_the_last_item(seed):
    values = torch.randn(7, 6)
    values[5:] = torch.nan
    for dtype in (torch.float32, torch.float64):
        ((mean, _),) = mean_tokens([em3.Jagged(values.to(dtype), torch.tensor([0, 3, 5]))], dtype=dtype)
        torch.testing.assert_close(mean, torch.stack([values[:3].mean(0), values[3:5].mean(0)]).to(dtype))


def test_offsets_of_mean_tokens_are_checked():
    with pytest.raises(ValueError, match=r"^streams\[0\].offsets: fell from 4 to 2"):
        MeanTokens([6], 3)([em3.Jagged(torch.randn(6, 6), torch.tensor([0, 4, 2]))])


@pytest.mark.parametrize("options", [dict(dropout=0.5), dict(attention_dropout=0.5), dict(dropout=0.5, query_norm=True)], ids=str)
def test_each_item_is_dropped_by_a_mask_of_its_own(options):
    """Also before the queries have met the tokens, where without dropout one copy serves all items."""
    model = em3.FusionQFormer([6], 8, num_queries=3, num_heads=2, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "cross.w_o" in name or "ffn_out" in name:
                p.zero_()  # nothing but what is drawn before may tell items apart
    found = model.queries([torch.randn(1, 4, 6).expand(6, 4, 6)])
    assert not torch.equal(found[0], found[1])
    model.eval()
    assert torch.equal(*model.queries([torch.randn(1, 4, 6).expand(2, 4, 6)]))
