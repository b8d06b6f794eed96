"""``LoRALinear``: parameters and their starting values; the mathematics is tested with the operation."""

from __future__ import annotations

import math

import pytest
import torch

from em3.layers.lora_linear import LoRALinear
from em3.ops import lora_linear


@pytest.mark.parametrize("num_adapters", [None, 1, 3])
def test_starts_as_the_linear_layer(num_adapters, seed):
    layer = LoRALinear(6, 5, 2, num_adapters=num_adapters)
    x = torch.randn(4, 7, 6)
    adapter = None if num_adapters is None else torch.randint(-1, num_adapters, (4, 7))
    torch.testing.assert_close(layer(x, adapter), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert not layer.lora_b.any()
    bound = 1 / math.sqrt(6)  # kaiming_uniform(a=sqrt 5) of a [R, C] matrix, for each adapter
    assert 0 < layer.lora_a.abs().max() <= bound


def test_every_adapter_starts_like_one(seed):
    """The fan of one adapter's matrix counts, not that of the stack."""
    a = LoRALinear(16, 4, 8, num_adapters=50).lora_a
    assert a.abs().max() > 0.95 / math.sqrt(16)
    assert len(torch.unique(a)) > 0.9 * a.numel()


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3.0), (True, 6.0)])
def test_calls_the_operation(use_rslora, scaling, seed):
    layer = LoRALinear(6, 5, 4, alpha=12, num_adapters=2, use_rslora=use_rslora)
    torch.nn.init.normal_(layer.lora_b)
    x, offsets = torch.randn(9, 6), torch.tensor([0, 4, 8])
    want = lora_linear(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, scaling=scaling, offsets=offsets)
    assert torch.equal(layer(x, offsets=offsets), want)


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_from_linear(train_base, bias, seed):
    linear = torch.nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    state = torch.get_rng_state()
    layer = LoRALinear.from_linear(linear, 2, alpha=4, train_base=train_base)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.lora_a.dtype == torch.float64
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    base = {"weight", "bias"} if bias else {"weight"}
    assert trained == {"lora_a", "lora_b"} | (base if train_base else set())
    torch.set_rng_state(state)
    layer_again = LoRALinear.from_linear(linear, 2, alpha=4, train_base=train_base)
    assert torch.equal(layer.lora_a, layer_again.lora_a)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).sum().backward()
    assert (layer.weight.grad is not None) == train_base
    assert layer.lora_b.grad is not None


def test_starts_where_peft_starts(seed):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(24, 17)})
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]), model)
    theirs = model["layer"]
    ours = LoRALinear.from_linear(theirs.base_layer, 4, alpha=6)
    assert ours.scaling == theirs.scaling["default"]
    for mine, other in ((ours.lora_a, theirs.lora_A), (ours.lora_b, theirs.lora_B)):
        assert mine.shape == other["default"].weight.shape
    ours.load_state_dict({
        "weight": theirs.base_layer.weight, "bias": theirs.base_layer.bias,
        "lora_a": theirs.lora_A["default"].weight, "lora_b": torch.randn(17, 4),
    })  # fmt: skip
    with torch.no_grad():
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
    x = torch.randn(8, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_drops_in_training_only(seed):
    layer = LoRALinear(6, 5, 2, dropout=0.5)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(20, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), LoRALinear.forward(layer, x))
    layer.dropout = 0.0
    assert torch.equal(layer(x), layer.train()(x))


def test_state_dict_round_trip(seed):
    first, second = (LoRALinear(6, 5, 2, num_adapters=3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert sorted(first.state_dict()) == ["bias", "lora_a", "lora_b", "weight"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_meta_device_and_repr():
    layer = LoRALinear(6, 5, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert "rank=2" in repr(layer)
    assert "num_adapters=None" in repr(layer)
