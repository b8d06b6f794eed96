"""A step in parts has the gradients of the step in one piece, and holds less at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from em3.models import DIN
from em3.train import micro_batch
from em3.train.arms import IDOnly, WithEncoders

from ..models.test_em3 import Case
from .test_loop import TRAIN, Setting, lines


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole(model, batch, read):
    losses = model.losses(batch, None if read is None else read(model.items(batch)))
    losses.total.backward()
    return losses, gradients(model)


def same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize("options", [
    dict(history="full"), dict(contrast_gradient="both"), dict(contrast_gradient="content"), dict(contrast_gradient="id"), dict(contrast=False), dict(fusion=False),
], ids=str)  # fmt: skip
def test_gradients_are_those_of_one_piece(options, size, seed):
    case = Case(seed, **options)
    read = case.tokens.read if options.get("fusion", True) else None
    model = case.model.eval()  # without dropout
    want, expected = whole(model, case.batch, read)
    got = micro_batch.backward(model, case.batch, read, size)
    for mine, other in zip(got, want, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, other.detach(), rtol=1e-10, atol=1e-12)
    same(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_masks_of_dropout_are_the_same_in_both_passes(seed):
    """In one part everything is drawn in the order of the step in one piece."""
    case = Case(seed)
    torch.manual_seed(seed)
    _, expected = whole(case.model.train(), case.batch, case.tokens.read)
    torch.manual_seed(seed)
    micro_batch.backward(case.model, case.batch, case.tokens.read, 1000)
    after = torch.rand(3)
    same(gradients(case.model), expected, rtol=1e-9, atol=1e-12)
    torch.manual_seed(seed)
    case.model.losses(case.batch, case.streams())
    assert torch.equal(torch.rand(3), after)  # the second pass moves no state


def test_encoders_that_are_trained(seed):
    """Tokens with a graph behind them, made anew for every part."""
    case = Case(seed)
    gains = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def read(items):
        return [type(s)(s.values() * g, s.offsets()) for s, g in zip(case.tokens.read(items), gains, strict=True)]

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gains = gains

    model = WithEncoders(case.model, Tokens()).eval()
    _, expected = whole(model, case.batch, read)
    assert expected["tokens.gains"].all()
    micro_batch.backward(model, case.batch, read, 5)
    same(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_a_history_with_gradient_needs_tokens(seed):
    case = Case(seed, history="full")
    with pytest.raises(ValueError, match="read: was None, must give the tokens"):
        micro_batch.backward(case.model, case.batch, None, 5)


def test_a_ranker_alone(seed):
    case = Case(seed)
    model = IDOnly(DIN(*case.batches.num_ids, dim=4, hidden=(5,), dropout=0.0)).double()
    batch = dataclasses.replace(case.batch, label=case.batch.label.double())
    _, expected = whole(model, batch, None)
    micro_batch.backward(model, batch, None, 7)
    same(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_it_holds_less_at_a_time(seed):
    case = Case(seed)
    own = {t.untyped_storage().data_ptr() for t in [*case.model.parameters(), *case.model.buffers()]}
    held, most = [0], [0]

    class Kept:
        """What autograd keeps for the backward, for as long as it does."""

        def __init__(self, tensor):
            self.tensor = tensor
            self.bytes = 0 if tensor.untyped_storage().data_ptr() in own else tensor.numel() * tensor.element_size()
            held[0] += self.bytes
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= self.bytes

    def peak(step):
        held[0] = most[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            step()
        return most[0]

    at_once = peak(lambda: whole(case.model, case.batch, case.tokens.read))
    in_parts = peak(lambda: micro_batch.backward(case.model, case.batch, case.tokens.read, 4))
    assert in_parts < at_once / 3


@pytest.mark.parametrize("arm", ["id_only", "two_stage", "em3"])
def test_a_training_in_parts(arm, seed, tmp_path):
    """Losses of a whole training, dropout left out. A gradient that is all but zero may change its sign with the order of a
    sum, and Adam then makes a step the other way: hence the tolerance."""
    found = []
    for size in (None, 5):
        setting = Setting(seed, arm, dataclasses.replace(TRAIN, epochs=1, micro_batch=size))
        training = setting.training(tmp_path / str(size))
        for module in training.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        training.run()
        found.append([line for line in lines(tmp_path / str(size)) if "loss" in line])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)
        assert other["contrast"] == pytest.approx(one["contrast"], rel=2e-2)
