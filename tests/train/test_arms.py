"""Each arm is what its name says, and frozen features are standardised means of tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from em3.data.batches import Batches
from em3.layers import FusionQFormer, MeanTokens
from em3.models import DIN, EM3, DCNv2
from em3.train.arms import IDOnly, build, frozen_features, reads_tokens
from em3.train.config import ARMS, Config, ModelConfig

from ..toy import Tokens, random_data

N = 9


@pytest.fixture
def tokens(seed: int) -> Tokens:
    return Tokens(N, seed)


@pytest.mark.parametrize("chunk", [2, 100])
def test_frozen_features(chunk: int, tokens: Tokens) -> None:
    got = frozen_features(tokens.read, N, chunk)
    columns = []
    for stream in tokens.sequences:
        rows = [t.mean(0) for t in stream if len(t)]
        mean, spread = torch.stack(rows).mean(0), torch.stack(rows).std(0, correction=0)
        columns.append(torch.stack([(t.mean(0) - mean) / spread if len(t) else torch.zeros_like(mean) for t in stream]))
    torch.testing.assert_close(got, torch.cat(columns, 1), rtol=1e-4, atol=1e-5)
    assert not got[1].any()  # no tokens at all


@pytest.mark.parametrize("ranker", ["din", "dcnv2"])
def test_what_the_arms_are(ranker: str, tokens: Tokens, seed: int) -> None:
    batches = Batches(random_data(seed), 4)
    model = ModelConfig(ranker=ranker, id_dim=6, id_dropout=0.1, content_id_dropout=0.4, hidden=[7], dropout=0.3,
                        content_dim=8, num_queries=3, dim=4, num_heads=2, rank=2, contrast_weight=0.9,
                        contrast_gradient="id")  # fmt: skip
    config, features = Config(data="x", model=model), frozen_features(tokens.read, N)
    full = dataclasses.replace(config, model=dataclasses.replace(model, history="full"))
    assert {arm: build(arm, full, batches, [5, 3], features).history for arm in ARMS[1:]} == {
        "two_stage": "lora", "em3": "full", "em3_mean_tokens": "full", "em3_no_lora": "frozen", "em3_no_contrast": "full",
    }  # fmt: skip
    others = dataclasses.replace(config, model=dataclasses.replace(model, pooling="top_k", top_k=3, position_buckets=4, time_buckets=5))
    for arm in ARMS[1:]:
        part = build(arm, others, batches, [5, 3], features).interest
        assert (part.pooling, part.top_k, part.position_buckets, part.time_buckets) == ("top_k", 3, 4, 5)
    made = {arm: build(arm, config, batches, [5, 3], features) for arm in ARMS}
    for arm, built in made.items():
        assert type(built.ranker) is {"din": DIN, "dcnv2": DCNv2}[ranker]
        assert built.ranker.items.weight.shape == (N + 1, 6)
        assert built.ranker.users.dropout == built.ranker.items.dropout == (0.1 if arm == "id_only" else 0.4)
    assert isinstance(made.pop("id_only"), IDOnly)
    assert {arm: type(built.fusion) for arm, built in made.items()} == {
        "two_stage": type(None), "em3": FusionQFormer, "em3_mean_tokens": MeanTokens, "em3_no_lora": FusionQFormer,
        "em3_no_contrast": FusionQFormer,
    }  # fmt: skip
    assert {arm: built.interest.rank for arm, built in made.items()} == {
        "two_stage": 0, "em3": 2, "em3_mean_tokens": 2, "em3_no_lora": 0, "em3_no_contrast": 2}  # fmt: skip
    # Without LoRA the history's projections stay as they start; the two-stage arm learns the whole of them.
    assert [arm for arm, built in made.items() if built.interest.w_k.requires_grad] == ["two_stage"]
    assert [arm for arm, built in made.items() if built.contrast is None] == ["two_stage", "em3_no_contrast"]
    assert torch.equal(made["two_stage"].bank, features)
    batch = batches.of(batches.data.of_split("train"))
    for arm, built in made.items():
        assert isinstance(built, EM3)
        assert (built.contrast_weight, built.contrast_gradient, len(built.bank)) == (0.9, "id", N)
        assert (built.fusion is not None) == reads_tokens(arm)
        losses = built.losses(batch, tokens.read(batch.distinct) if reads_tokens(arm) else None)
        losses.total.backward()
        assert losses.total.isfinite()
    assert made["em3"].fusion.mean is not None
    assert made["em3"].fusion.query.shape == (3, 4)
    with pytest.raises(ValueError, match="features: was None, must be given for the arm two_stage"):
        build("two_stage", config, batches, [5, 3], None)


def test_the_same_seed_builds_the_same_model(tokens: Tokens, seed: int) -> None:
    batches, config = Batches(random_data(seed), 4), Config(data="x")
    built = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        built.append(build("em3", dataclasses.replace(config), batches, [5, 3], None).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(built[0].values(), built[1].values(), strict=True))
    assert not torch.equal(built[0]["fusion.query"], built[2]["fusion.query"])
