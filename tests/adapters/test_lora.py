"""PEFT's adapters in ``LoRALinear`` and back: the same numbers, the same files."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")

import em3
from em3.adapters import load_lora, lora_state, read_lora, save_lora

from ..oracle import relative_error


def base():
    inner = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4, bias=False))
    return torch.nn.Sequential(torch.nn.Linear(8, 6), inner, torch.nn.Linear(4, 3))


def trained(model, **options):
    """PEFT around a copy of ``model``, with factors as of a training."""
    config = peft.LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["0", "2"]) | options)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return adapted


def factors(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"rank_pattern": {"1.0": 2}, "alpha_pattern": {"^2": 9}}, {"target_modules": r"1\.[02]"},
], ids=str)  # fmt: skip
def test_a_folder_there_and_back(options, tmp_path, seed):
    model, x = base(), torch.randn(7, 8)
    theirs = trained(model, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    layers = load_lora(model, tmp_path / "theirs")
    assert layers == {name: m for name, m in model.named_modules() if isinstance(m, em3.LoRALinear)}
    assert {"base_model.model." + name for name in layers} == {n.partition(".lora_")[0] for n, _ in factors(theirs).items()}
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert {layer.dropout for layer in layers.values()} == {options.get("lora_dropout", 0.0)}
    want, got = theirs.eval()(x), model.eval()(x)
    assert relative_error(got.detach(), want.detach()) <= 1e-5
    grad = torch.randn(want.shape)
    want.backward(grad)
    got.backward(grad)
    for name, p in factors(theirs).items():
        layer, factor = re.match(r"base_model\.model\.(.+)\.lora_([AB])\.", name).groups()
        mine = getattr(layers[layer], f"lora_{factor.lower()}")
        assert relative_error(mine.grad, p.grad) <= 1e-5
    assert layers
    assert all(layer.weight.grad is None for layer in layers.values())
    config, state = read_lora(tmp_path / "theirs")
    save_lora(model, tmp_path / "ours", config)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    assert state.keys() == lora_state(model).keys()


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_was_trained_here(rslora, tmp_path, seed):
    """Without a configuration: ranks of their own, and a name that another one ends with."""
    model, x = base(), torch.randn(7, 8)
    plain = copy.deepcopy(model)
    model[2] = em3.LoRALinear.from_linear(model[2], 3, alpha=5, use_rslora=rslora)
    model[1][2] = em3.LoRALinear.from_linear(model[1][2], 2, alpha=7, use_rslora=rslora)
    for layer in (model[2], model[1][2]):
        torch.nn.init.normal_(layer.lora_b)
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert relative_error(theirs(x).detach(), model(x).detach()) <= 1e-5
    assert len(factors(theirs)) == 4


def test_of_a_configuration_and_a_state(seed):
    model, x = base().double(), torch.randn(7, 8, dtype=torch.float64)
    theirs = trained(model)
    state = peft.get_peft_model_state_dict(theirs)
    load_lora(model, (theirs.peft_config["default"], state))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        model[0].lora_a.zero_()  # a copy
    assert state["base_model.model.0.lora_A.weight"].any()


@pytest.mark.parametrize(("options", "message"), [
    (dict(use_dora=True), "config.use_dora: was True, must be unset: LoRALinear is plain LoRA"),
    (dict(use_bdlora={"nblocks": 2}), "config.use_bdlora: was {'nblocks': 2}, must be unset"),
    (dict(lora_bias=True), "config.lora_bias: was True, must be unset"),
    (dict(bias="all"), "config.bias: was 'all', must be 'none'"),
    (dict(init_lora_weights="pissa"), "config.init_lora_weights: was 'pissa', which changes the weight under the adapter"),
    (dict(peft_type="IA3"), "config.peft_type: was 'IA3', must be 'LORA'"),
    (dict(r=3), "0.lora_A: was [4, 8], must be [3, 8]"),
])  # fmt: skip
def test_configurations_that_are_refused(options, message, seed):
    model = base()
    theirs = trained(model)
    fields = theirs.peft_config["default"].to_dict() | options
    before = list(model.modules())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_lora(model, (fields, peft.get_peft_model_state_dict(theirs)))
    assert list(model.modules()) == before


def test_states_that_do_not_fit(seed):
    model = base()
    theirs = trained(model, target_modules=["1.0"])
    config, state = theirs.peft_config["default"], peft.get_peft_model_state_dict(theirs)
    a, b = state
    cases = [
        ({}, "state: was empty"),
        ({a: state[a]}, "state: held lora_A of 1.0 alone, must hold both factors"),
        (state | {"base_model.model.1.0.lora_magnitude_vector": state[a]}, "state: held 'base_model.model.1.0.lora_magnitude_vector'"),
        ({a.replace("1.0", "1.9"): state[a], b.replace("1.0", "1.9"): state[b]}, "model.1.9: is missing, which the adapter was"),
        ({a.replace("1.0", "1.1"): state[a], b.replace("1.0", "1.1"): state[b]}, "model.1.1: was torch.nn.modules.activation.Tanh, must be"),
        ({a: state[a].bfloat16(), b: state[b]}, "1.0.lora_A: was torch.bfloat16, must be torch.float32 like its layer"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            load_lora(model, (config, wrong))
    with pytest.raises(ValueError, match=r"^config: was int, must be a peft.LoraConfig"):
        load_lora(model, (3, state))


def test_what_cannot_be_saved(tmp_path, seed):
    model = base()
    with pytest.raises(ValueError, match=r"^model: was Sequential without an em3.LoRALinear"):
        save_lora(model, tmp_path)
    model[0] = em3.LoRALinear.from_linear(model[0], 2, alpha=4)
    config = json.loads(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_lora(model, tmp_path, config)
    for wrong, message in [({"r": 3}, "config.r: was 3 for 0, must be 2, the layer's rank"),
                           ({"use_dora": True}, "config.use_dora: was True, must be unset"),
                           ({"target_modules": ["2"]}, "config.target_modules: was ['2'], must name 0, which the model has"),
                           ({"exclude_modules": "0"}, "config.exclude_modules: was '0', must not name 0, which the model has"),
                           ({"lora_alpha": 1}, "config.lora_alpha: was 1 for 0, must be 4, the layer's alpha"),
                           ({"lora_dropout": 0.5}, "config.lora_dropout: was 0.5, must be 0.0 as in 0"),
                           ({"use_rslora": True}, "config.use_rslora: was True, must be False as in 0")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            save_lora(model, tmp_path / "not", config | wrong)
    model[2] = em3.LoRALinear.from_linear(model[2], 2, use_rslora=True)
    with pytest.raises(ValueError, match=r"^use_rslora: differed between layers"):
        save_lora(model, tmp_path / "not")
    model[2] = em3.LoRALinear(4, 3, 2, num_adapters=2)
    with pytest.raises(ValueError, match=r"^2.num_adapters: was 2, must be None"):
        save_lora(model, tmp_path / "not")
    assert not (tmp_path / "not").exists()
