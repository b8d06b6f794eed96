"""What the layers say of what they are given or made with: in the words of their own arguments, and how to mend it."""

from __future__ import annotations

import re

import pytest
import torch

import em3
from em3.layers import MeanTokens

X, Y, QUERY = torch.zeros(3, 5, 6), torch.zeros(3, 4, 5), torch.zeros(2, 8)
ROWS, ADAPTER = torch.zeros(7, 6), torch.zeros(7, dtype=torch.int64)
TARGET, HISTORY, BANK = torch.zeros(3, 8), torch.tensor([[1, 2], [3, -1], [-1, -1]]), torch.zeros(9, 6)


def attention(query, streams, masks=None):
    return em3.QFormerAttention([6, 5], 8, num_heads=2)(query, streams, masks)


def weights(query, streams):
    return em3.QFormerAttention([6, 5], 8, num_heads=2).attention_weights(query, streams)


def fusion(streams, **options):
    return em3.FusionQFormer([6, 5], 8, num_queries=2, num_heads=2, **options)(streams)


def one(x, *rows):
    return em3.LoRALinear(6, 5, 2)(x, *rows)


def many(x, *rows):
    return em3.LoRALinear(6, 5, 2, num_adapters=3)(x, *rows)


def history(*given, **options):
    return em3.LoRATargetAttention(6, 8, num_heads=2, **options)(*given)


def contrast(*given, **options):
    return em3.ContentIDContrastiveLoss()(*given, **options)


GIVEN = [
    (attention, (QUERY, [X[..., :4], Y]), "streams[0]: was [3, 5, 4], must be 6 wide, as the layer was made (token_dims=[6, 5])"),
    (attention, (QUERY, [X]), "streams: were 1, must be 2, as the layer was made (token_dims=[6, 5]); where a batch has nothing of "
                              "a modality, give a stream without tokens: em3.Jagged(torch.empty(0, C), torch.zeros(4, dtype="),
    (attention, (QUERY, [X, Y[:2]]), "streams[1]: had 2 items, must have 3 like streams[0]"),
    (attention, (QUERY, [X.long(), Y]), "streams[0]: was torch.int64, must be torch.float32"),
    (attention, (QUERY, [X.to("meta"), Y]), "streams[0]: was on meta, must be on cpu like the layer: move one of them by .to(device)"),
    (attention, (QUERY, [[1.0], Y]), "streams[0]: was list, must be a padded tensor, or jagged"),
    (attention, (QUERY, [X, Y], [[True], None]), "masks[0]: was list, must be torch.bool [3, 5] (True = a real token)"),
    (attention, (QUERY[:, :6], [X, Y]), "query: was [2, 6], must be 8 wide, as the layer was made (dim=8)"),
    (attention, (QUERY.double(), [X, Y]), "query: was torch.float64, must be torch.float32 like the layer's parameters (convert it, or "
                                          "the layer by .to(torch.float64), or call under torch.autocast)"),
    (attention, ([1.0], [X, Y]), "query: was list, must be a tensor"),
    (weights, (QUERY, [X[..., :4], Y]), "streams[0]: was [3, 5, 4], must be 6 wide, as the layer was made"),
    (fusion, ([X[..., :4], Y],), "streams[0]: was [3, 5, 4], must be 6 wide, as the layer was made (token_dims=[6, 5])"),
    (fusion, ([X],), "streams: were 1, must be 2, as the layer was made"),
    (MeanTokens([6, 5], 3), ([X, Y[..., :4]],), "streams[1]: was [3, 4, 4], must be 5 wide, as the layer was made"),
    (MeanTokens([6, 5], 3), ([X, Y[:2]],), "streams[1]: had 2 items, must have 3 like streams[0]"),
    (one, (ROWS[:, :4],), "x: was [7, 4], must be 6 wide, as the layer was made (in_features=6)"),
    (one, (ROWS.double(),), "x: was torch.float64, must be torch.float32 like the layer's parameters"),
    (one, (ROWS.to("meta"),), "x: was on meta, must be on cpu like the layer"),
    (one, (torch.tensor(1.0),), "x: was [], must be 6 wide"),
    (one, ([1.0],), "x: was list, must be a tensor"),
    (one, (ROWS, ADAPTER), "adapter: was given, must be None, for the layer has one adapter for all rows; one made with num_adapters=G"),
    (many, (ROWS,), "adapter, offsets: neither was given, exactly one must be, for the layer has num_adapters=3: adapter [7], the number "
                    "of each row's (-1 for none), or offsets [4], where each one's rows begin; num_adapters=None makes one for all rows"),
    (many, (ROWS, ADAPTER, torch.tensor([0, 2, 4, 7])), "adapter, offsets: both were given, exactly one must be"),
    (many, (ROWS, [0] * 7), "adapter: was list, must be a tensor [7]"),
    (many, (ROWS, None, [0, 1, 2, 7]), "offsets: was list, must be a tensor [4]"),
    (history, (TARGET[:, :6], HISTORY, BANK), "target: was [3, 6], must be 8 wide, as the layer was made (dim=8)"),
    (history, (TARGET.double(), HISTORY, BANK), "target: was torch.float64, must be torch.float32 like the layer's parameters"),
    (history, ([1.0], HISTORY, BANK), "target: was list, must be a tensor"),
    (history, (TARGET, HISTORY, BANK[:, :4]), "bank: was [9, 4], must be 6 wide, as the layer was made (content_dim=6)"),
    (history, (TARGET, HISTORY, em3.ContentBank(BANK)), "bank: was ContentBank, must be a tensor [n, C]; of a ContentBank give its rows"),
    (history, (TARGET, HISTORY.tolist(), BANK), "history: was list, must be a padded tensor, or jagged"),
    (history, (TARGET, HISTORY, BANK[:0]), "history: held 3, must be -1 (none): there is no row of the bank"),
    (contrast, (QUERY, QUERY[:, :6]), "ids_embedding: was [2, 6], must be [2, 8]"),
    (contrast, ([1.0], QUERY), "content: was list, must be a tensor [B, V]"),
    (contrast, (QUERY.to("meta"), QUERY.to("meta")), "content: was on meta, must be on cpu like the layer"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "given", "message"), GIVEN)
def test_what_is_given(call, given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(*given)


@pytest.mark.parametrize(
    ("age", "message"),
    [
        (HISTORY[:2], "age: was [2, 2], must be [3, 2]"),
        (HISTORY.to("meta"), "age: was on meta, must be on cpu like history"),
        ([1], "age: was list, must be a tensor [3, 2]"),
        (HISTORY.float(), "age: was torch.float32, must be torch.int64 or torch.int32 seconds"),
        (None, "age: was None, must be seconds, shaped as the history's row numbers [3, 2], with time_buckets=5"),
    ],
)
def test_ages(age, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        history(TARGET, HISTORY, BANK, age, time_buckets=5)
    with pytest.raises(ValueError, match=r"^age: was torch.int64 \[3, 2\], must be None with time_buckets=0"):
        history(TARGET, HISTORY, BANK, HISTORY)


@pytest.mark.parametrize("given", [HISTORY[0], torch.tensor(1), HISTORY.float()])
def test_a_history_whose_positions_cannot_be_told(given):
    with pytest.raises(ValueError, match=r"^history: was "):
        history(TARGET, given, BANK, position_buckets=3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (em3.QFormerAttention, dict(token_dims=6), "token_dims: was 6, must be a list of the streams' widths, one or more"),
        (em3.QFormerAttention, dict(token_dims=[]), "token_dims: was [], must be a list"),
        (em3.QFormerAttention, dict(token_dims=[6, 0]), "token_dims[1]: was 0, must be an integer of at least 1"),
        (em3.QFormerAttention, dict(dim=8.0), "dim: was 8.0, must be an integer of at least 1"),
        (em3.QFormerAttention, dict(num_heads=2.0), "num_heads: was 2.0, must be at least 1 and divide dim 8"),
        (em3.QFormerAttention, dict(dropout=2.0), "dropout: was 2.0, must be a probability from 0 to 1"),
        (em3.QFormerAttention, dict(strategy="fast"), "strategy: was 'fast', must be one of 'auto', 'absorb', 'project'"),
        (em3.QFormerAttention, dict(backend="cp"), "backend: was 'cp', must be one of auto, cpp, triton, torch; did you mean 'cpp'?"),
        (em3.QFormerAttention, dict(num_heads=3), "num_heads: was 3, must be at least 1 and divide dim 8"),
        (em3.FusionQFormer, dict(num_layers=0), "num_layers: was 0, must be an integer of at least 1"),
        (em3.FusionQFormer, dict(cross_every=0), "cross_every: was 0, must be an integer of at least 1"),
        (em3.FusionQFormer, dict(norm="mid"), "norm: was 'mid', must be 'pre' or 'post'"),
        (em3.FusionQFormer, dict(num_heads=3), "num_heads: was 3, must be at least 1 and divide dim 8"),
        (em3.FusionQFormer, dict(num_queries=2.0), "num_queries: was 2.0, must be an integer"),
        (em3.FusionQFormer, dict(ffn_dim=0), "ffn_dim: was 0, must be an integer of at least 1"),
        (em3.FusionQFormer, dict(out_dim=0), "out_dim: was 0, must be an integer of at least 1"),
        (em3.FusionQFormer, dict(dropout=-1), "dropout: was -1, must be a probability"),
        (em3.LoRALinear, dict(in_features=0), "in_features: was 0, must be an integer of at least 1"),
        (em3.LoRALinear, dict(rank=2.0), "rank: was 2.0, must be an integer of at least 1"),
        (em3.LoRALinear, dict(rank=0), "rank: was 0, must be an integer of at least 1"),
        (em3.LoRALinear, dict(num_adapters=0), "num_adapters: was 0, must be an integer of at least 1"),
        (em3.LoRALinear, dict(dropout=1.5), "dropout: was 1.5, must be a probability from 0 to 1"),
        (em3.LoRALinear, dict(alpha="x"), "alpha: was 'x', must be a number"),
        (em3.LoRATargetAttention, dict(alpha="x"), "alpha: was 'x', must be a number"),
        (em3.LoRALinear.from_linear, dict(rank=0), "rank: was 0, must be an integer of at least 1"),
        (em3.LoRALinear.from_linear, dict(linear=torch.nn.ReLU()), "linear: was torch.nn.modules.activation.ReLU, must be torch.nn.Linear"),
        (em3.LoRALinear, dict(backend="none"), "backend: was 'none', must be one of"),
        (em3.LoRATargetAttention, dict(num_heads=3), "num_heads: was 3, must be at least 1 and divide dim 8"),
        (em3.LoRATargetAttention, dict(pooling="mean"), "pooling: was 'mean', must be one of 'softmax', 'din', 'top_k'"),
        (em3.LoRATargetAttention, dict(pooling="top_k"), "top_k: was None, must be at least 1 with pooling='top_k'"),
        (em3.LoRATargetAttention, dict(pooling="top_k", top_k=0), "top_k: was 0, must be an integer of at least 1"),
        (em3.LoRATargetAttention, dict(top_k=3), "top_k: was 3, must be at least 1 with pooling='top_k' and None without, which was "),
        (em3.LoRATargetAttention, dict(time_buckets=-1), "time_buckets: was -1, must be an integer of at least 0"),
        (em3.LoRATargetAttention, dict(rank=-1), "rank: was -1, must be an integer of at least 0"),
        (em3.LoRATargetAttention, dict(pooling="top_k", top_k=2.0), "top_k: was 2.0, must be an integer of at least 1"),
        (em3.LoRATargetAttention, dict(pooling="din", strategy="project"), "strategy: was 'project', must be 'absorb' or 'auto' with"),
        (em3.ContentIDContrastiveLoss, dict(duplicates="drop"), "duplicates: was 'drop', must be one of 'mask', 'positive', 'keep'"),
        (em3.ContentIDContrastiveLoss, dict(label_smoothing="x"), "label_smoothing: was 'x', must be from 0 to 1"),
        (em3.ContentIDContrastiveLoss, dict(direction="up"), "direction: was 'up', must be one of"),
        (em3.ContentIDContrastiveLoss, dict(reduction="max"), "reduction: was 'max', must be one of"),
        (em3.ContentIDContrastiveLoss, dict(backend="c"), "backend: was 'c', must be one of"),
    ],
)  # fmt: skip
def test_what_is_made(make, options, message):
    sound = {
        em3.QFormerAttention: dict(token_dims=[6], dim=8, num_heads=2),
        em3.FusionQFormer: dict(token_dims=[6], dim=8, num_queries=2, num_heads=2),
        em3.LoRALinear: dict(in_features=6, out_features=5, rank=2),
        em3.LoRALinear.from_linear: dict(linear=torch.nn.Linear(6, 5), rank=2),
        em3.LoRATargetAttention: dict(content_dim=6, dim=8, num_heads=2),
        em3.ContentIDContrastiveLoss: {},
    }[make]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**sound | options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_another_dtype_beside_their_mean(dtype, seed):
    """A sum of them in float16 would run over."""
    layer = em3.FusionQFormer([6, 5], 8, num_queries=2, num_heads=2, mean_residual=True).eval()
    streams = [1e3 * torch.ones(2, 100, 6), em3.Jagged(1e3 * torch.ones(90, 5), torch.tensor([0, 0, 90]))]
    want = layer(streams)
    got = layer([streams[0].to(dtype), em3.Jagged(streams[1].values().to(dtype), streams[1].offsets())])
    torch.testing.assert_close(got, want)


SMALL = torch.ones(2, 4)
LINEAR, FEW = em3.LoRALinear(4, 4, 2), em3.QFormerAttention([4], 4, num_heads=1)
TARGETED = em3.LoRATargetAttention(4, 4, num_heads=1)
CALLS = {
    "contrastive_loss": lambda x: em3.ops.contrastive_loss(x, SMALL, logit_scale=2.0),
    "contrastive_metrics": lambda x: em3.ops.contrastive_metrics(x, SMALL, logit_scale=2.0).mean_rank,
    "lora_linear": lambda x: LINEAR(x).sum(),
    "qformer_attention": lambda x: FEW(x, [SMALL[None]]).sum(),
    "lora_target_attention": lambda x: TARGETED(x, torch.zeros(2, 3).long(), SMALL).sum(),
}


@pytest.mark.parametrize("op", CALLS)
def test_transforms_of_torch_func_are_refused(op):
    for transformed in (torch.func.grad(CALLS[op]), lambda x: torch.func.vmap(CALLS[op])(x[None])):
        with pytest.raises(RuntimeError, match=rf"^em3\.ops\.{op} cannot be called under transforms of torch\.func"):
            transformed(SMALL)
