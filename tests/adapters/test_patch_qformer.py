"""``em3.patch`` on transformers' Q-Formers: the same numbers, and nothing left behind by ``unpatch``."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import em3
from em3.adapters import _patched, qformer_patch

from .qformers import NAMES, TOKENS, WIDTH, assert_same, call, exactly, qformer, run

CROSS = {f"encoder.layer.{i}.crossattention.attention": "qformer_attention" for i in (0, 2)}
LENGTHS = torch.tensor([7, 2, 4])


def inputs():
    return torch.randn(3, 5, WIDTH), torch.randn(3, 7, TOKENS)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of the operation."""
    seen = []
    real = qformer_patch.qformer_attention
    monkeypatch.setattr(qformer_patch, "qformer_attention", lambda *a, **k: seen.append(k) or real(*a, **k))
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_same_numbers(name, masked, attention, calls, seed):
    model, (query, tokens) = qformer(name, attention=attention), inputs()
    kwargs = {"encoder_attention_mask": (torch.arange(7) < LENGTHS[:, None]).long()} if masked else {}
    state, want = copy.deepcopy(model.state_dict()), run(model, query, tokens, **kwargs)
    assert em3.patch(model) == CROSS
    assert_same(run(model, query, tokens, **kwargs), want, lambda: exactly(model, query, tokens, **kwargs))
    assert len(calls) == 2
    assert all((k["masks"] != [None]) == masked for k in calls)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert em3.unpatch(model) == CROSS
    for key, value in run(model, query, tokens, **kwargs).items():
        assert torch.equal(value, want[key]), key
    assert len(calls) == 2


def test_an_instruction(calls, seed):
    """InstructBLIP: text passes through the same layers, the cross-attention sees the queries alone."""
    model, (query, tokens) = qformer("InstructBlip"), inputs()
    mask = torch.arange(7) < LENGTHS[:, None]
    kwargs = dict(input_ids=torch.randint(1, 50, (3, 4)), attention_mask=torch.ones(3, 9), encoder_attention_mask=mask)
    kwargs["attention_mask"][1, 7:] = 0
    want = run(model, query, tokens, **kwargs)
    em3.patch(model)
    assert_same(run(model, query, tokens, **kwargs), want, lambda: exactly(model, query, tokens, **kwargs))
    assert len(calls) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_item_without_tokens(attention, seed):
    model, (query, tokens) = qformer("Blip2", attention=attention), inputs()
    mask = torch.arange(7) < torch.tensor([7, 0, 4])[:, None]
    want = run(model, query, tokens, encoder_attention_mask=mask)
    em3.patch(model)
    assert_same(run(model, query, tokens, encoder_attention_mask=mask), want,
                lambda: exactly(model, query, tokens, encoder_attention_mask=mask))  # fmt: skip


def test_queries_that_all_items_share(calls, seed):
    model, (query, tokens) = qformer("Blip2", layers=1), inputs()
    want = run(model, query[:1], tokens)
    other = run(model, query, tokens[:1])
    em3.patch(model)
    assert_same(run(model, query[:1], tokens), want, lambda: exactly(model, query[:1], tokens))
    assert_same(run(model, query, tokens[:1]), other, lambda: exactly(model, query, tokens[:1]))
    assert len(calls) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_that_differs_between_queries_takes_the_modules_own_way(attention, calls, seed):
    model, (query, tokens) = qformer("Blip2", attention=attention), inputs()
    mask = torch.rand(3, 1, 5, 7) > 0.3
    mask[..., 0] = True
    if attention == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    want = run(model, query, tokens, encoder_attention_mask=mask)
    em3.patch(model)
    _patched.say_once.cache_clear()
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    log, level = logging.getLogger("em3"), logging.getLogger("em3").level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        got = run(model, query, tokens, encoder_attention_mask=mask)
        run(model, query, tokens, encoder_attention_mask=mask)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    assert not calls
    (message,) = logged
    assert message.startswith("a call of Blip2QFormerMultiHeadAttention is not served by em3: encoder_attention_mask must be")


def test_a_mask_of_whole_numbers_is_left_to_the_module(calls, seed):
    """Numbers that are added to scores: the module's own way adds 0 and 1."""
    model, (query, tokens) = qformer("Blip2", attention="eager"), inputs()
    mask = torch.randint(0, 2, (3, 1, 5, 7))
    want = run(model, query, tokens, encoder_attention_mask=mask)
    em3.patch(model)
    got = run(model, query, tokens, encoder_attention_mask=mask)
    assert not calls
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_attention_maps(seed):
    """As the eager attention returns them, whatever the implementation."""
    eager, (query, tokens) = qformer("Blip2", attention="eager"), inputs()
    sdpa = qformer("Blip2").eval()
    sdpa.load_state_dict(eager.state_dict())
    mask = torch.arange(7) < LENGTHS[:, None]
    want = call(eager.eval(), query, tokens, encoder_attention_mask=mask, output_attentions=True)
    em3.patch(sdpa)
    got = call(sdpa, query, tokens, encoder_attention_mask=mask, output_attentions=True)
    assert len(got.cross_attentions) == len(want.cross_attentions) == 2
    for a, b in zip(got.cross_attentions, want.cross_attentions, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-6)
    em3.patch(eager)
    again = call(eager, query, tokens, encoder_attention_mask=mask, output_attentions=True)
    for a, b in zip(again.attentions, want.attentions, strict=True):  # those among the queries too, which are its own
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.cross_attentions[1], got.cross_attentions[1], rtol=1e-4, atol=1e-6)
    assert call(sdpa, query, tokens).cross_attentions is None


def test_dropout_in_training(calls, seed):
    """Handed on in training only; the mean over many draws is what comes without it."""
    model = qformer("Blip2", dropout=0.3, layers=1)
    module, (query, tokens) = model.encoder.layer[0].crossattention.attention, inputs()
    em3.patch(model)
    module.train()
    with torch.no_grad():
        drawn = module(query[:1].expand(2000, -1, -1), encoder_hidden_states=tokens[:1].expand(2000, -1, -1))[0]
        module.eval()
        still = module(query[:1], encoder_hidden_states=tokens[:1])[0][0]
    assert [k["dropout"] for k in calls] == [0.3, 0.0]
    assert float(((drawn.mean(0) - still) / (drawn.std(0) / 2000**0.5)).abs().max()) < 6
    model.train()
    first, second = (run(model, query, tokens)["output"] for _ in range(2))
    assert not torch.equal(first, second)


def test_autocast_and_half_types(seed):
    model, (query, tokens) = qformer("Blip2"), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = call(model, query, tokens).last_hidden_state
        em3.patch(model)
        got = call(model, query, tokens).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.1)
    module = model.bfloat16().encoder.layer[0].crossattention.attention
    got = module(query.bfloat16(), encoder_hidden_states=tokens.bfloat16())[0]
    em3.unpatch(model)
    want = module(query.bfloat16(), encoder_hidden_states=tokens.bfloat16())[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_gradient_checkpointing(seed):
    model, (query, tokens) = qformer("Blip2"), inputs()
    want = run(model.train(), query, tokens)
    em3.patch(model)
    model.gradient_checkpointing_enable()
    assert_same(run(model, query, tokens), want, lambda: exactly(model, query, tokens))


def test_compiles(seed):
    """The attention itself without a break; a mask is looked at by an assertion there."""
    model, (query, tokens) = qformer("Blip2", layers=1), inputs()
    em3.patch(model)
    module = model.encoder.layer[0].crossattention.attention
    mask = (torch.arange(7) < LENGTHS[:, None])[:, None, None].expand(-1, -1, 5, -1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for given in (None, mask):
        want = module(query, None, tokens, given)[0]
        torch.testing.assert_close(compiled(query, None, tokens, given)[0], want)


def test_twice_and_back(seed):
    model = qformer("Blip2")
    classes = {name: type(module) for name, module in model.named_modules()}
    inside = {name: set(vars(module)) for name, module in model.named_modules()}
    assert em3.unpatch(model) == {}
    assert em3.patch(model) == em3.patch(model) == CROSS
    module = model.encoder.layer[0].crossattention.attention
    assert isinstance(module, classes["encoder.layer.0.crossattention.attention"])
    em3.unpatch(model.encoder.layer[0])
    assert em3.patch(model) == CROSS
    assert em3.unpatch(model) == CROSS
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == inside


def test_copies_call_themselves(seed):
    model, (query, tokens) = qformer("Blip2", layers=1).eval(), inputs()
    em3.patch(model)
    want = call(model, query, tokens).last_hidden_state
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.encoder.layer[0].crossattention.attention) is type(model.encoder.layer[0].crossattention.attention)
        torch.testing.assert_close(call(other, query, tokens).last_hidden_state, want)
        with torch.no_grad():
            other.encoder.layer[0].crossattention.attention.value.weight.zero_()
        assert not torch.allclose(call(other, query, tokens).last_hidden_state, want)
    torch.testing.assert_close(call(model, query, tokens).last_hidden_state, want)
    with pytest.raises(AttributeError, match="has no attribute 'PatchedNothing'"):
        qformer_patch.PatchedNothing  # noqa: B018


def test_layers_that_are_more_than_a_product(calls, seed):
    """Left alone when patched, and not served when something was added since."""
    model, (query, tokens) = qformer("Blip2"), inputs()
    first, third = (model.encoder.layer[i].crossattention.attention for i in (0, 2))
    handle = first.key.register_forward_hook(lambda module, args, out: out * 2)
    assert em3.patch(model) == {"encoder.layer.2.crossattention.attention": "qformer_attention"}
    handle.remove()
    third.value.register_forward_hook(lambda module, args, out: out * 2)
    want = run(model, query, tokens)
    assert not calls
    em3.unpatch(model)
    for key, value in run(model, query, tokens).items():
        assert torch.equal(value, want[key]), key


def test_nothing_to_patch(seed):
    with pytest.raises(ValueError, match=r"^model: was Linear, must hold the cross-attention .*; it holds none$"):
        em3.patch(torch.nn.Linear(2, 2))
    for change in (em3.patch, em3.unpatch):
        with pytest.raises(ValueError, match=r"^model: was NoneType, must be a torch.nn.Module$"):
            change(None)
    model = qformer("Blip2", layers=1)
    attention = model.encoder.layer[0].crossattention.attention
    attention.key = torch.nn.Sequential(attention.key)
    with pytest.raises(ValueError, match=r"encoder.layer.0.crossattention.attention: key was torch.nn.modules.container.Sequential"):
        em3.patch(model)


def test_a_forward_of_another_form_is_refused(monkeypatch):
    model = qformer("Blip2", layers=1)
    cls = type(model.encoder.layer[0].crossattention.attention)
    monkeypatch.setattr(cls, "forward", lambda self, hidden_states, head_mask=None: None)
    with pytest.raises(ValueError, match="its forward takes hidden_states, head_mask, must take hidden_states, attention_mask"):
        em3.patch(model)
