"""``em3.patch`` on PEFT's LoRA layers: the same numbers however its adapters are used, and nothing left behind."""

from __future__ import annotations

import copy
import io

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")

import em3
from em3.adapters import lora_patch

from ..oracle import relative_error


def adapted(bias: bool = True, **options):
    """Two layers with three adapters of different ranks; ``c`` is in the second alone."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=bias), torch.nn.Tanh(), torch.nn.Linear(6, 5))
    made = None
    for name, rank, targets in (("u", 4, ["0", "2"]), ("b", 2, ["0", "2"]), ("c", 3, ["2"])):
        config = peft.LoraConfig(**dict(r=rank, lora_alpha=rank * 3 + 1, target_modules=targets) | options)
        if made is None:
            made = peft.get_peft_model(model, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.fixture
def calls(monkeypatch):
    seen = []
    real = lora_patch.lora_linear
    monkeypatch.setattr(lora_patch, "lora_linear", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    return seen


def run(model, x, **kwargs):
    """The output, and the gradients of the input and of every parameter that takes one."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = model(x, **kwargs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out))
    return {"output": out.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(got, want, limit=1e-5):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) <= limit, name


def compare(model, x, **kwargs):
    """Patched against unpatched."""
    em3.unpatch(model)
    want = run(model, x, **kwargs)
    em3.patch(model)
    same(run(model, x, **kwargs), want)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_adapter_after_the_other(bias, rslora, calls, seed):
    model, x = adapted(bias, use_rslora=rslora), torch.randn(3, 4, 8)
    for name, layers in (("u", 2), ("b", 2), ("c", 1)):
        model.set_adapter(name)
        calls.clear()
        compare(model, x)
        assert len(calls) == layers
        assert all(args[3].dim() == 2 for args, _ in calls)


def test_several_active_adapters(calls, seed):
    model, x = adapted(), torch.randn(7, 8)
    model.base_model.set_adapter(["u", "c", "b"])
    compare(model, x)
    assert [len(args[3]) for args, _ in calls] == [6, 9]  # ranks side by side


def test_merged_and_disabled(calls, seed):
    model, x = adapted(), torch.randn(7, 8)
    compare(model, x)
    want = model(x).detach()
    for adapters in (["u"], ["u", "b"]):
        model.merge_adapter(adapters)
        assert len(calls) % 2 == 0
        calls.clear()
        merged = model(x)
        assert not calls
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        if adapters == ["u"]:
            torch.testing.assert_close(merged, want, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        calls.clear()
        off = model(x)
        assert not calls
    em3.unpatch(model)
    with model.disable_adapter():
        assert torch.equal(model(x), off)
    em3.patch(model)
    compare(model, x)
    plain = model.merge_and_unload()
    assert not any(hasattr(m, "lora_A") for m in plain.modules())
    torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 8), (6, 2, 2, 8)])
def test_mixed_batches(shape, calls, seed):
    model, x = adapted().eval(), torch.randn(shape)
    for names in (["u", "b", "__base__", "c", "u", "c"], ["b"] * 6, ["__base__"] * 6, ["c", "__base__"] * 3):
        calls.clear()
        compare(model, x, adapter_names=names)
        of_layers = [bool({"u", "b"} & set(names)), bool({"u", "b", "c"} & set(names))]
        assert len(calls) == sum(of_layers)
        assert all(args[3].dim() == 3 for args, _ in calls)


def test_mixed_batches_in_float64(calls, seed):
    """Scalings such as 4 / sqrt(3) are not rounded on the way."""
    model, x = adapted(use_rslora=True).double().eval(), torch.randn(6, 8, dtype=torch.float64)
    em3.unpatch(model)
    names = ["u", "b", "__base__", "c", "u", "c"]
    want = run(model, x, adapter_names=names)
    em3.patch(model)
    same(run(model, x, adapter_names=names), want, 1e-13)
    assert len(calls) == 2


def test_errors_of_mixed_batches_stay(seed):
    model, x = adapted().eval(), torch.randn(2, 8)
    em3.patch(model)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, adapter_names=["u", "d"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(x, adapter_names=["u"])
    model.merge_adapter(["u"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=["u", "b"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(x, adapter_names=["u", "b"])


def test_an_adapter_added_since(calls, seed):
    model, x = adapted(), torch.randn(3, 8)
    em3.patch(model)
    model.add_adapter("d", peft.LoraConfig(r=2, target_modules=["0", "1", "2"][::2], init_lora_weights=False))
    model.set_adapter("d")
    compare(model, x)
    model.delete_adapter("d")
    model.set_adapter("u")
    compare(model, x)
    assert len(calls) == 4


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_bias=True)], ids=str)
def test_what_takes_its_own_way(options, calls, seed):
    """DoRA and adapters with biases; the plain ones beside them are served."""
    model, x = adapted(), torch.randn(7, 8)
    model.add_adapter("d", peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **options))
    model.set_adapter("d")
    em3.patch(model)
    got = run(model, x)
    assert not calls
    em3.unpatch(model)
    same(got, run(model, x), 0)
    model.set_adapter("u")
    compare(model, x)
    assert len(calls) == 2


def test_dropout(calls, seed):
    """Handed on in training; the mean over many rows is what comes without it. Two that drop have masks of their own."""
    model, x = adapted(lora_dropout=0.4), torch.randn(1, 8)
    em3.patch(model)
    layer = model.base_model.model[0]
    drawn = layer(x.expand(4000, -1)).detach()
    still = layer.eval()(x).detach()
    assert [k["dropout"] for _, k in calls] == [0.4, 0.0]
    assert float(((drawn.mean(0) - still) / (drawn.std(0) / 4000**0.5)).abs().max()) < 6
    compare(model.eval(), torch.randn(7, 8))
    model.train().base_model.set_adapter(["u", "b"])
    calls.clear()
    torch.manual_seed(0)
    got = run(model, x)
    assert not calls
    em3.unpatch(model)
    torch.manual_seed(0)
    same(got, run(model, x), 0)


def test_nothing_but_other_variants(seed):
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), peft.LoraConfig(target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match=r"base_model.model.0: adapter 'default' was of DoraLinearVariant, must be plain LoRA"):
        em3.patch(model)
    embedding = peft.get_peft_model(torch.nn.Sequential(torch.nn.Embedding(8, 6)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"^model: was PeftModel, must hold .*lora.Linear.*; it holds none$"):
        em3.patch(embedding)


def test_half_models(calls, seed):
    """float32 adapters in a bfloat16 model, PEFT's default, are not rounded; under autocast all are, as without the patch."""
    x = torch.randn(7, 8)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)).bfloat16(),
                                peft.LoraConfig(target_modules=["0"], init_lora_weights=False))  # fmt: skip
    em3.patch(model)
    got = model(x.bfloat16())
    assert not calls
    em3.unpatch(model)
    assert torch.equal(model(x.bfloat16()), got)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(x)
        em3.patch(model)
        got = model(x)
    assert len(calls) == 1
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.05)
    em3.unpatch(model)
    half, exact = model.bfloat16(), copy.deepcopy(model).double()
    want = half(x.bfloat16())
    em3.patch(half)
    calls.clear()
    got = half(x.bfloat16())
    assert len(calls) == 1
    assert got.dtype == torch.bfloat16
    exact = exact(x.bfloat16().double()).detach()
    assert relative_error(got.detach(), exact) <= 2 * relative_error(want.detach(), exact)


def test_state_and_classes_stay(seed):
    model, x = adapted(), torch.randn(3, 8)
    classes, state = {n: type(m) for n, m in model.named_modules()}, copy.deepcopy(model.state_dict())
    inside = {n: set(vars(m)) for n, m in model.named_modules()}
    want = run(model, x)
    expected = {"base_model.model.0": "lora_linear", "base_model.model.2": "lora_linear"}
    assert em3.patch(model) == em3.patch(model) == expected
    assert isinstance(model.base_model.model[0], peft.tuners.lora.Linear)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same(run(other, x), want)
        assert type(other.base_model.model[0]) is type(model.base_model.model[0])
    assert em3.unpatch(model) == expected
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == inside
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    same(run(model, x), want, 0)
    with pytest.raises(AttributeError, match="has no attribute 'PatchedNothing'"):
        lora_patch.PatchedNothing  # noqa: B018


def test_compiles_whole(seed):
    model, x = adapted(), torch.randn(3, 8)
    em3.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_on_the_projections_of_a_qformer(monkeypatch, seed):
    """Adapters on queries are called, those on keys and values are part of the weight that is folded into the queries."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from em3.adapters import qformer_patch

    from . import qformers

    seen = []
    real = qformer_patch.qformer_attention
    monkeypatch.setattr(qformer_patch, "qformer_attention", lambda *a, **k: seen.append(k) or real(*a, **k))
    config = peft.LoraConfig(r=3, target_modules=r".*crossattention.*\.(query|key|value)", init_lora_weights=False, lora_dropout=0.2)
    model = peft.get_peft_model(qformers.qformer("Blip2"), config).eval()
    query, tokens = torch.randn(3, 5, qformers.WIDTH), torch.randn(3, 7, qformers.TOKENS)
    want = qformers.run(model, query, tokens)
    done = em3.patch(model)
    assert sorted(done.values()) == ["lora_linear"] * 6 + ["qformer_attention"] * 2
    qformers.assert_same(qformers.run(model, query, tokens), want, lambda: qformers.exactly(model, query, tokens))
    assert len(seen) == 2
    with model.disable_adapter():
        off = qformers.call(model, query, tokens).last_hidden_state
    assert len(seen) == 4
    model.merge_adapter()
    merged = qformers.call(model, query, tokens).last_hidden_state
    torch.testing.assert_close(merged, want["output"], rtol=1e-3, atol=1e-4)
    assert len(seen) == 6
    model.unmerge_adapter()
    model.train()
    first, second = (qformers.call(model, query, tokens).last_hidden_state for _ in range(2))
    assert len(seen) == 6  # a dropped input is no weight
    assert not torch.allclose(first, second)
    em3.unpatch(model)
    with model.eval().disable_adapter():
        torch.testing.assert_close(qformers.call(model, query, tokens).last_hidden_state, off, rtol=1e-4, atol=1e-5)
