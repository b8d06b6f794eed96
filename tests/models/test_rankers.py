"""DIN and DCN-V2 against loops over rows and history entries, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from em3.data.batches import Batch, Batches
from em3.models import DIN, DCNv2
from em3.models.ids import IDEmbedding, owners, sum_by_owner

from ..toy import random_data

RANKERS = pytest.mark.parametrize("kind", [DIN, DCNv2])
EXTRA = 3


def made(kind: type, batches: Batches, extra: int = EXTRA, **options: float) -> nn.Module:
    users, items = batches.num_ids
    model = kind(users, items, dim=4, extra_dim=extra, hidden=(6, 5), **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return model


def network(layers: nn.Sequential, x: Tensor) -> Tensor:
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        x = layer.weight @ x + layer.bias
        if layer is not linear[-1] or layer.out_features > 1:
            x = x.clamp(min=0)
    return x


def slow_din(model: DIN, user: int, item: int, history: list[int], extra: Tensor) -> Tensor:
    target = model.items.weight[item]
    interest = torch.zeros_like(target)
    for i in history:
        seen = model.items.weight[i]
        interest = interest + network(model.attention, torch.cat([seen, target, seen - target, seen * target])) * seen
    return network(model.head, torch.cat([model.users.weight[user], target, interest, target * interest, extra]))[0]


def slow_dcn(model: DCNv2, user: int, item: int, history: list[int], extra: Tensor) -> Tensor:
    seen = [model.items.weight[i] for i in history]
    mean = sum(seen) / len(seen) if seen else torch.zeros(4, dtype=torch.float64)
    fields = [model.users.weight[user], model.items.weight[item], mean]
    content = [] if model.field is None else [model.field.weight @ extra + model.field.bias]
    x = x0 = torch.cat([*fields, *content])
    for cross in model.crosses:
        x = x0 * (cross.weight @ x + cross.bias) + x
    return model.head.weight[0] @ torch.cat([x, network(model.deep, torch.cat([*fields, extra]))]) + model.head.bias[0]


def slow(model: nn.Module, batch: Batch, extra: Tensor) -> Tensor:
    one = slow_din if isinstance(model, DIN) else slow_dcn
    bounds, ids = batch.history_id.offsets().tolist(), batch.history_id.values().tolist()
    return torch.stack([
        one(model, user, item, ids[bounds[b] : bounds[b + 1]], extra[b])
        for b, (user, item) in enumerate(zip(batch.user_id.tolist(), batch.item_id.tolist(), strict=True))
    ])  # fmt: skip


@RANKERS
def test_against_the_slow_loop(kind: type, seed: int) -> None:
    data = random_data(seed, users=12, events=30)  # some users without events
    batches = Batches(data, 4)
    batch = batches.of(np.arange(len(data.rows.item)))
    assert (batch.history.offsets().diff() == 0).any()
    model = made(kind, batches).eval()
    extra = torch.randn(len(batch.item), EXTRA, dtype=torch.float64)
    got, want = model(batch, extra), slow(model, batch, extra)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.item_embedding(batch.item_id), model.items.weight[batch.item_id])
    weight = torch.randn_like(got)
    for ours, theirs in zip(*(torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@RANKERS
def test_rows_do_not_know_each_other(kind: type, seed: int) -> None:
    data = random_data(seed, users=12)
    batches = Batches(data, 4)
    model, rows = made(kind, batches, extra=0).eval(), np.arange(len(data.rows.item))
    whole = model(batches.of(rows))
    order = np.random.default_rng(seed).permutation(rows)
    torch.testing.assert_close(model(batches.of(order)), whole[order], rtol=1e-10, atol=1e-12)
    alone = torch.cat([model(batches.of(rows[i : i + 1])) for i in rows])
    torch.testing.assert_close(alone, whole, rtol=1e-10, atol=1e-12)


@RANKERS
def test_nobody_has_a_history(kind: type, seed: int) -> None:
    batches = Batches(random_data(seed, events=0), 4)
    model, batch = made(kind, batches, extra=0), batches.of(np.arange(30))
    torch.testing.assert_close(model.eval()(batch), slow(model, batch, torch.empty(30, 0, dtype=torch.float64)))
    model.train()(batch).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@RANKERS
def test_id_dropout_takes_the_target_and_the_user_not_the_history(kind: type, seed: int) -> None:
    """All IDs dropped in training = row 0 for target and user; the contrast's embedding and evaluation see the real ones."""
    batches = Batches(random_data(seed), 4)
    model, batch = made(kind, batches, extra=0, id_dropout=1.0, dropout=0.0), batches.of(np.arange(30))
    unseen = torch.zeros_like(batch.item_id)
    blind = dataclasses.replace(batch, user_id=unseen, item_id=unseen)
    nothing = torch.empty(30, 0, dtype=torch.float64)
    torch.testing.assert_close(model.train()(batch), slow(model, blind, nothing))
    assert torch.equal(model.item_embedding(batch.item_id), model.items.weight[batch.item_id])
    torch.testing.assert_close(model.eval()(batch), slow(model, batch, nothing))


def test_share_of_dropped_ids(seed: int) -> None:
    table = IDEmbedding(1001, 2, dropout=0.3)
    ids = torch.randint(1, 1001, (100, 200))
    rows = table(ids)
    dropped = (rows == table.weight[0]).all(-1)
    assert torch.equal(rows[~dropped], table.weight[ids[~dropped]])
    assert abs(dropped.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 20000) ** 0.5
    assert torch.equal(table.eval()(ids), table.weight[ids])
    assert torch.equal(IDEmbedding(5, 2)(ids % 5) == 0, torch.zeros(100, 200, 2, dtype=torch.bool))


@RANKERS
def test_dropout_in_training_only(kind: type, seed: int) -> None:
    batches = Batches(random_data(seed), 4)
    model, batch = made(kind, batches, extra=0, dropout=0.5), batches.of(np.arange(30))
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


@given(st.lists(st.integers(0, 4), max_size=6))
def test_sums_by_owner(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.arange(2.0 * sum(lengths)).view(-1, 2) + 1
    owner = owners(offsets, len(values))
    assert owner.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    want = [values[offsets[b] : offsets[b + 1]].sum(0).tolist() for b in range(len(lengths))]
    assert sum_by_owner(values, owner, len(lengths)).tolist() == want


def test_din_does_not_normalise_its_weights(seed: int) -> None:
    """The same history twice counts twice (section 4.3 of the paper)."""
    batches = Batches(random_data(seed), 4)
    model = made(DIN, batches, extra=0).eval()
    features: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    batch = batches.of(np.arange(30))
    ids, bounds = batch.history_id.values(), batch.history_id.offsets()
    parts = [ids[a:b].repeat(2) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    twice = dataclasses.replace(batch, history_id=type(batch.history_id).from_sequences(parts))
    model(batch), model(twice)
    once, again = (f[:, 2 * 4 : 3 * 4] for f in features)  # after user and target
    assert once[bounds.diff() > 0].any(1).all()
    torch.testing.assert_close(again, 2 * once)
