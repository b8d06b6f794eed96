"""``EM3``: its logits row by row, its contrast, its bank, and what comes without tokens or history."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em3.data.batches import Batch, Batches
from em3.jagged import Jagged
from em3.layers import FusionQFormer
from em3.models import DIN, EM3
from em3.reference import contrastive_loss, lora_target_attention

from ..toy import Tokens, random_data

C, V, WIDTH = 8, 6, 5  # content, ID, frozen features


class Case:
    """A model in float64 with no parameter where it starts, its batches and tokens."""

    def __init__(self, seed: int, *, fusion: bool = True, rank: int = 2, contrast: bool = True, **options: Any) -> None:
        self.data = random_data(seed, users=12, events=30, rows=40, unseen=3)
        self.batches = Batches(self.data, 4)
        self.tokens = Tokens(len(self.data.items.ids), seed, torch.float64)
        users, items = self.batches.num_ids
        ranker = DIN(users, items, dim=V, extra_dim=EM3.extra_dim(C, frozen=not fusion), hidden=(7,), dropout=0.0)
        reader = FusionQFormer([5, 3], C, num_queries=2, num_heads=2, dropout=0.2, mean_residual=True) if fusion else None
        self.model = EM3(
            ranker, reader, num_items=items - 1, content_dim=C, bank_dim=None if fusion else WIDTH, num_heads=2,
            rank=rank, id_dim=V if contrast else None, **options,
        ).double()  # fmt: skip
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "log_scale" not in name:
                    p.add_(0.3 * torch.randn_like(p))
            self.model.bank.copy_(torch.randn_like(self.model.bank))
        self.batch = self.batches.of(np.arange(40))

    def streams(self, batch: Batch | None = None) -> Any:
        return self.tokens.read(self.model.items(batch or self.batch))


def unit_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias


def slow_extra(model: EM3, target: Tensor, history: list[int], bank: Tensor) -> Tensor:
    """The dense features of one row: ``target [C]``, catalogue numbers of its history, content ``bank`` of the catalogue."""
    part, x = model.interest, bank[history]  # [N, width of the bank]
    w_k, w_v = part.w_k, part.w_v
    if part.rank:
        w_k = w_k + part.scaling * part.lora_k_b @ part.lora_k_a
        w_v = w_v + part.scaling * part.lora_v_b @ part.lora_v_a
    q, k, v = part.w_q @ target, x @ w_k.T, x @ w_v.T
    heads, size = [], C // part.num_heads
    for h in range(part.num_heads):
        of = slice(h * size, (h + 1) * size)
        heads.append((k[:, of] @ q[of] / size**0.5).softmax(0) @ v[:, of] if history else torch.zeros(size).double())
    read = part.w_o @ torch.cat(heads)
    interest = unit_norm(read, model.norm_interest) if history else torch.zeros_like(read)
    mean = torch.zeros(C).double()
    if history:
        mean = x.mean(0) if model.adapt is None else model.adapt(x.mean(0))
    count = torch.tensor([max(len(history), 1)]).double().log()
    of_mean = [target * mean] if model.adapt is None else [mean, target * mean]
    return torch.cat([target, interest, target * interest, (target - read).abs(), *of_mean, count])


def slow_logits(case: Case, batch: Batch, from_bank: bool) -> Tensor:
    model, bounds = case.model, batch.history.offsets().tolist()
    rows, bank = [], model.bank
    if model.history == "full" and not from_bank:  # every item's content by itself, with gradient
        every = [model.fusion(case.tokens.read(torch.tensor([i])))[0] for i in range(len(bank))]
        bank = torch.stack([unit_norm(row, model.norm) for row in every])
    for b, item in enumerate(batch.item.tolist()):
        if not from_bank:
            content = unit_norm(model.fusion(case.tokens.read(torch.tensor([item])))[0], model.norm)
        elif model.adapt is None:
            content = model.bank[item]
        else:
            content = unit_norm(model.adapt(model.bank[item]), model.norm)
        rows.append(slow_extra(model, content, batch.history.values()[bounds[b] : bounds[b + 1]].tolist(), bank))
    return model.ranker(batch, torch.stack(rows))


@pytest.mark.parametrize(("fusion", "rank", "from_bank", "history"), [
    (True, 2, False, "lora"), (True, 0, False, "lora"), (True, 2, True, "lora"), (False, 0, True, "lora"),
    (False, 3, True, "lora"), (True, 2, False, "frozen"), (False, 0, True, "frozen"), (True, 2, False, "full"),
    (True, 0, False, "full"), (True, 2, True, "full"),
])  # fmt: skip
def test_logits_row_by_row(fusion: bool, rank: int, from_bank: bool, history: str, seed: int) -> None:
    case = Case(seed, fusion=fusion, rank=rank, contrast=fusion, history=history)
    model = case.model.eval()
    assert (case.batch.history.offsets().diff() == 0).any()
    logits, content = model(case.batch, None if from_bank else case.streams())
    want = slow_logits(case, case.batch, from_bank)
    torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
    assert content.shape == (len(case.batch.distinct if from_bank else model.items(case.batch)), C)
    trained = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn_like(logits)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), trained, allow_unused=True) for x in (logits, want))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_starts_as_content_similarity(seed: int) -> None:
    """A history whose bank rows are orthogonal: at the start the target reads its own kind out of it."""
    model = EM3(DIN(3, 9, dim=V, extra_dim=EM3.extra_dim(C)), FusionQFormer([5], C, num_queries=1, num_heads=1),
                num_items=8, content_dim=C, num_heads=1)  # fmt: skip
    model.bank.copy_(20 * torch.eye(8))
    case = Case(seed)
    history = case.batch.history
    features = model.compare(model.bank[history.values().clamp(max=7)[:1]].expand(40, C), type(history)(
        torch.arange(8).repeat(40), torch.arange(41) * 8))  # fmt: skip
    torch.testing.assert_close(features[:, 3 * C : 4 * C], torch.zeros(40, C), atol=1e-4, rtol=0)


def test_the_attention_knows_how_old_an_event_is(seed: int) -> None:
    case = Case(seed, position_buckets=3, time_buckets=12, pooling="din")
    batches = Batches(case.data, 4, ages=True)
    batch, part = batches.of(np.arange(40)), case.model.interest
    age, bounds = batch.history_age, batch.history.offsets().tolist()
    assert case.batch.history_age is None
    for b in range(40):  # the same events as histories are made of
        row = case.data.rows
        mine = [t for u, t in zip(case.data.events.user[: row.before[b]], case.data.events.time, strict=False) if u == row.user[b]]
        assert age[bounds[b] : bounds[b + 1]].tolist() == [row.time[b] - t for t in mine[-4:]]
    position = torch.cat([torch.arange(n).flip(0) for n in batch.history.offsets().diff().tolist()])
    buckets = [(1.0 + t.clamp(min=0)).log2().floor().long() for t in (position, age)]
    assert len(set(buckets[1].tolist())) > 2
    target = torch.randn(40, C, dtype=torch.float64)
    loras = {f"lora_{k}": (getattr(part, f"lora_{k}_a"), getattr(part, f"lora_{k}_b"), part.scaling) for k in "kv"}
    read = lora_target_attention(
        target, batch.history, case.model.bank, part.w_q, part.w_k, part.w_v, part.w_o, num_heads=2, pooling="din", **loras,
        biases=[(part.position_bias, buckets[0].clamp(max=2)), (part.time_bias, buckets[1].clamp(max=11))],
    )  # fmt: skip
    got = case.model.compare(target, batch.history, age=age)
    torch.testing.assert_close(got[:, 3 * C : 4 * C], (target - read).abs(), rtol=1e-9, atol=1e-9)
    losses = case.model.losses(batch, case.streams(batch))
    losses.total.backward()
    assert part.time_bias.grad.any()
    assert part.position_bias.grad.any()
    with pytest.raises(ValueError, match="age: was None, must be seconds"):
        case.model(case.batch)


def test_contrast_sees_each_known_item_once(seed: int) -> None:
    case = Case(seed)
    batch, model = case.batch, case.model
    known = [i for i in batch.distinct.tolist() if case.batches.item_ids()[i] > 0]
    assert 1 < len(known) < len(batch.distinct) < len(batch.item)
    content = torch.randn(len(batch.distinct), C, dtype=torch.float64, requires_grad=True)
    place = {item: u for u, item in enumerate(batch.distinct.tolist())}
    want = contrastive_loss(
        torch.stack([model.to_id(content[place[i]]) for i in known]),
        torch.stack([model.ranker.items.weight[i + 1] for i in known]), logit_scale=model.contrast.logit_scale,
    )  # fmt: skip
    got = model.contrast_of(batch, content)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    got.backward()
    moved = content.grad.any(1)
    assert [bool(moved[place[i]]) for i in batch.distinct.tolist()] == [i in known for i in batch.distinct.tolist()]
    assert not model.ranker.items.weight.grad[0].any()


@pytest.mark.parametrize("side", ["both", "content", "id"])
def test_contrast_trains_the_side_it_should(side: str, seed: int) -> None:
    case = Case(seed, contrast_gradient=side)
    model = case.model.eval()
    losses = model.losses(case.batch, case.streams())
    losses.contrast.backward()
    assert (model.fusion.query.grad is not None) == (side != "id")
    assert (model.ranker.items.weight.grad is not None) == (side != "content")
    assert model.to_id.weight.grad.any()
    assert model.contrast.log_scale.grad.any()
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(("interest", "ranker.head")))


def test_losses(seed: int) -> None:
    case = Case(seed, contrast_weight=0.7)
    model, batch = case.model.eval(), case.batch
    losses = model.losses(batch, case.streams())
    logits, content = model(batch, case.streams())
    p = logits.sigmoid()
    ranking = -(batch.label * p.log() + (1 - batch.label) * (1 - p).log()).mean()
    torch.testing.assert_close(losses.ranking, ranking)
    torch.testing.assert_close(losses.contrast, model.contrast_of(batch, content))
    torch.testing.assert_close(losses.total, ranking + 0.7 * losses.contrast)
    torch.testing.assert_close(losses.content, content)
    assert losses.contrast > 0
    without = Case(seed, contrast=False)
    losses = without.model.losses(without.batch, without.streams())
    assert losses.contrast == 0
    assert losses.total is losses.ranking
    with pytest.raises(ValueError, match="id_dim: was None, must be the width"):
        without.model.contrast_of(without.batch, losses.content)


def test_a_batch_of_unseen_items_has_no_contrast(seed: int) -> None:
    case = Case(seed)
    blind = dataclasses.replace(case.batch, item_id=torch.zeros_like(case.batch.item_id))
    losses = case.model.losses(blind, case.streams())
    assert losses.contrast == 0
    losses.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in case.model.parameters())


def test_the_bank_has_no_gradient_and_is_written_back(seed: int) -> None:
    case = Case(seed)
    model, batch = case.model, case.batch
    before = model.bank.clone()
    losses = model.losses(batch, case.streams())
    assert torch.equal(model.bank, before)
    losses.total.backward()
    assert model.bank.grad is None
    model.write_back(batch, losses.content)
    rest = torch.ones(len(before), dtype=torch.bool)
    rest[batch.distinct] = False
    assert torch.equal(model.bank[batch.distinct], losses.content.detach())
    assert torch.equal(model.bank[rest], before[rest])
    assert not model.bank.requires_grad


def test_writing_back_before_backward_does_not_pass(seed: int) -> None:
    case = Case(seed)
    losses = case.model.losses(case.batch, case.streams())
    case.model.write_back(case.batch, losses.content)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.total.backward()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_refresh(chunk: int, seed: int) -> None:
    case = Case(seed)
    model = case.model
    state = torch.get_rng_state()
    model.refresh(case.tokens.read, chunk=chunk)
    assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn
    assert model.training
    want = torch.stack([model.eval().content(case.tokens.read(torch.tensor([i])))[0] for i in range(len(model.bank))])
    torch.testing.assert_close(model.bank, want.detach(), rtol=1e-9, atol=1e-9)
    assert max(map(len, case.tokens.reads)) <= max(chunk, 1)
    model.refresh(case.tokens.read)
    assert not model.training

    before = model.bank.clone()
    model.bank.zero_()
    model.refresh(case.tokens.read, torch.tensor([4, 2]), chunk=chunk)
    assert model.bank.any(1).nonzero()[:, 0].tolist() == [2, 4]
    torch.testing.assert_close(model.bank[[2, 4]], before[[2, 4]])


def test_refresh_leaves_each_module_in_its_mode(seed: int) -> None:
    case = Case(seed)
    model = case.model.train()
    model.ranker.eval()
    model.fusion.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.refresh(case.tokens.read)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError):
        model.refresh(lambda rows: 1 / 0)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("history", ["lora", "full"])
def test_content_of_other_items_than_the_batchs_is_refused(history: str, seed: int) -> None:
    case = Case(seed, history=history)
    items = case.model.items(case.batch)
    for wrong in (items[:-1], torch.cat([items, items[:1]])):
        with pytest.raises(ValueError, match=f"^streams: were of {len(wrong)} items, must be of the {len(items)} of "):
            case.model(case.batch, case.tokens.read(wrong))


def test_scoring_from_the_bank_after_a_refresh(seed: int) -> None:
    case = Case(seed)
    model = case.model.eval()
    model.refresh(case.tokens.read)
    from_tokens, from_bank = model(case.batch, case.streams())[0], model(case.batch)[0]
    torch.testing.assert_close(from_tokens, from_bank, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fusion", [True, False])
def test_no_tokens_and_no_history_are_finite(fusion: bool, seed: int) -> None:
    case = Case(seed, fusion=fusion, contrast=fusion)
    data = random_data(seed, users=4, events=0)
    nobody = dataclasses.replace(data, rows=dataclasses.replace(data.rows, item=np.ones_like(data.rows.item)))
    batch = Batches(nobody, 3).of(np.arange(30))
    assert batch.distinct.tolist() == [1]
    assert all(len(s.values()) == 0 for s in case.tokens.read(batch.distinct))
    case.model.bank.zero_()
    losses = case.model.losses(batch, case.tokens.read(batch.distinct) if fusion else None)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in case.model.parameters())


def test_a_history_with_no_content_equal_to_the_target(seed: int) -> None:
    """|c - r| has no gradient where both agree; it must not be NaN."""
    case = Case(seed)
    case.model.bank.fill_(1.0)
    target = torch.ones(40, C, dtype=torch.float64, requires_grad=True)
    case.model.compare(target, case.batch.history).sum().backward()
    assert target.grad.isfinite().all()


def test_frozen_features_learn_without_touching_the_bank(seed: int) -> None:
    case = Case(seed, fusion=False, rank=0, contrast=False)
    model = case.model
    before = model.bank.clone()
    assert model.bank.shape == (9, WIDTH)
    model.losses(case.batch).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(model.bank, before)
    with pytest.raises(ValueError, match=re.escape("fusion=None")):
        model(case.batch, case.streams())


@pytest.mark.parametrize("history", ["frozen", "lora", "full"])
def test_every_trained_parameter_of_em3_learns(history: str, seed: int) -> None:
    case = Case(seed, history=history)
    case.model.losses(case.batch, case.streams()).total.backward()
    without = {name for name, p in case.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert without == set()
    assert {name for name, p in case.model.named_parameters() if not p.requires_grad} == {"interest.w_k", "interest.w_v"}
    assert any("lora" in name for name, _ in case.model.named_parameters()) == (history != "frozen")


def test_a_full_history_reads_each_item_once_and_not_the_bank(seed: int) -> None:
    case = Case(seed, history="full")
    bounds, seen = torch.tensor([0, 5, 5, 9]), torch.tensor([0, 2, 3, 4, 5, 5, 0, 8, 2])
    model, batch = case.model, dataclasses.replace(
        case.batches.of(np.arange(3)), history=Jagged(seen, bounds), history_id=Jagged(seen + 1, bounds))  # fmt: skip
    named = sorted({*batch.item.tolist(), *seen.tolist()})
    assert model.items(batch).tolist() == named
    assert len(named) > len(batch.distinct)
    model.bank.fill_(torch.nan)
    losses = model.losses(batch, case.streams(batch))
    assert case.tokens.reads == [named]
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.write_back(batch, losses.content)
    assert torch.equal(model.bank[named], losses.content.detach())
    torch.testing.assert_close(  # the contrast is of the targets alone
        losses.contrast, model.contrast_of(batch, model.bank[batch.distinct]), rtol=1e-9, atol=1e-9)  # fmt: skip


def test_any_ranker_will_do(seed: int) -> None:
    """A linear model of one's own: forward(batch, extra) and item_embedding are all that EM3 asks for."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(10, V), nn.Linear(EM3.extra_dim(C), 1)

        def item_embedding(self, ids: Tensor) -> Tensor:
            return self.table(ids)

        def forward(self, batch: Batch, extra: Tensor) -> Tensor:
            return self.out(extra)[:, 0] + self.table(batch.item_id).sum(1)

    case = Case(seed)
    model = EM3(Own(), FusionQFormer([5, 3], C, num_queries=2, num_heads=2), num_items=9, content_dim=C, id_dim=V).double()
    loss = model.losses(case.batch, case.streams()).total
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss.backward()
    optimizer.step()
    assert model.losses(case.batch, case.streams()).total < loss


def test_state_dict_holds_the_bank(seed: int) -> None:
    first, second = Case(seed), Case(seed + 1)
    second.model.load_state_dict(first.model.state_dict())
    assert torch.equal(first.model.bank, second.model.bank)
    assert torch.equal(first.model.eval()(first.batch)[0], second.model.eval()(first.batch)[0])


def test_half_precision_bank_is_written_in_its_own_dtype(seed: int) -> None:
    case = Case(seed)
    case.model.bank = case.model.bank.float()
    case.model.write_back(case.batch, torch.randn(len(case.batch.distinct), C, dtype=torch.float64))
    assert case.model.bank.dtype == torch.float32
    assert F.cosine_similarity(case.model.bank[case.batch.distinct], case.model.bank[case.batch.distinct]).min() > 0.9


@pytest.mark.parametrize(("wrong", "message"), [
    ({"contrast_gradient": "neither"}, "contrast_gradient: was 'neither', must be one of both, content, id"),
    ({"history": "none"}, "history: was 'none', must be one of frozen, lora, full"),
    ({"fusion": None, "history": "full"}, "history: was 'full', must be 'frozen' or 'lora' for frozen features (fusion=None)"),
    ({"bank_dim": 5}, "bank_dim: was 5, must be 8 like content_dim unless fusion is None"),
    ({"bank_dim": 0}, "bank_dim: was 0, must be an integer of at least 1"),
    ({"num_items": 0}, "num_items: was 0, must be an integer of at least 1"),
    ({"id_dim": 0}, "id_dim: was 0, must be an integer of at least 1"),
    ({"fusion": "x"}, "fusion: was str, must be a torch.nn.Module"),
    ({"contrast_weight": "x"}, "contrast_weight: was 'x', must be a number"),
    ({"contrast_weight": -1}, "contrast_weight: was -1, must be at least 0 and finite"),
    ({"num_heads": 3}, "num_heads: was 3"),
    ({"rank": -1}, "rank: was -1"),
])  # fmt: skip
def test_error_messages(wrong: dict, message: str) -> None:
    ranker = DIN(3, 3, dim=V, extra_dim=EM3.extra_dim(C))
    with pytest.raises(ValueError, match=re.escape(message)):
        EM3(ranker, **({"fusion": FusionQFormer([4], C, num_queries=1), "num_items": 3, "content_dim": C} | wrong))
