"""``lora_linear`` as one step of autograd: how it behaves as a part of a user's graph."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import em3
from em3.backends import cpp
from em3.ops import lora_linear

from .. import oracle
from .test_lora_linear import ROUTES, make

LEADING = [(), (4,), (2, 3), (2, 0, 3)]
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


@pytest.mark.parametrize("g", [None, 3])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_its_output_may_be_changed_in_place(leading, g, seed):
    args = make(leading, g=g, dtype=torch.float32)
    lora_linear(**args).add_(1).relu_().sum().backward()
    assert all(args[name].grad.shape == args[name].shape for name in NAMES)


def test_its_graph_keeps_no_input_that_it_does_not_read(seed):
    args = make(frozen=NAMES[1:], dtype=torch.float32)
    x = args["x"] * 1
    alive = weakref.ref(x)
    loss = lora_linear(**(args | {"x": x})).sum()
    del x
    assert alive() is None
    loss.backward()
    assert args["x"].grad is not None


def test_nothing_is_recorded_where_no_gradient_is_asked_for(seed):
    args = make(dtype=torch.float32)
    with torch.no_grad():
        assert not lora_linear(**args).requires_grad
    frozen = make(frozen=NAMES, dtype=torch.float32)
    assert not lora_linear(**frozen).requires_grad
    with torch.inference_mode():
        assert lora_linear(**frozen).is_inference()


@pytest.mark.parametrize("g", [None, 3])
@pytest.mark.parametrize("wanted", NAMES)
def test_no_gradient_of_a_gradient(wanted, g, seed):
    """Also where what comes from above is a constant, and so nothing but the inputs would have shown it."""
    args = make(g=g, frozen=[name for name in NAMES if name != wanted], dtype=torch.float32)
    args["weight"].requires_grad_()
    (first,) = torch.autograd.grad(lora_linear(**args).sum(), args[wanted], create_graph=True)
    if wanted == "bias":  # which nothing that could take a gradient enters
        return
    with pytest.raises(RuntimeError, match="lora_linear has no second-order gradients"):
        (first.square().sum() + args["weight"].sum()).backward()


@pytest.mark.parametrize("name", ["weight", "lora_a", "scaling", *ROUTES])
def test_what_was_changed_before_the_backward_is_an_error(name, seed):
    args = make((4, 5), g=3, route=name if name in ROUTES else "adapter", per_adapter=True, frozen=NAMES[1:], dtype=torch.float32)
    y = lora_linear(**args)
    args[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_can_be_traced(seed):
    layer, x = em3.LoRALinear(5, 4, 2), torch.randn(3, 5)
    torch.nn.init.normal_(layer.lora_b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the shapes that a trace takes for constants, and of its age
        traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x + 1), layer(x + 1))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def attend(x):
    return em3.QFormerAttention([8], 8, num_heads=2)(x, [torch.randn(1, 3, 8)])


def read(x):
    return em3.LoRATargetAttention(8, 8, num_heads=2)(x[:1], torch.randint(9, (1, 4)), torch.randn(9, 8))


def adapt(x):
    return em3.LoRALinear(8, 8, 2)(x)


@pytest.mark.parametrize(("call", "name"), [(attend, "qformer_attention"), (read, "lora_target_attention"), (adapt, "lora_linear")])
def test_who_watches_operators_sees_the_registered_one(call, name, seed):
    with Names() as names:
        call(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert {f"em3.{name}.default", f"em3.{name}_backward.default"} <= set(names.seen)


def test_a_graph_of_make_fx_computes_with_what_it_is_given(seed):
    args = make(frozen=NAMES, dtype=torch.float32)

    def of(x):
        return lora_linear(**(args | {"x": x}))

    graph, other = make_fx(of)(args["x"]), torch.randn_like(args["x"])
    torch.testing.assert_close(graph(other), of(other))


@pytest.mark.skipif(cpp.unavailable() is not None, reason=f"em3._C: {cpp.unavailable()}")
@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_adapters_of_half_types_are_not_converted_as_a_whole(route, dtype, seed):
    """What a call of few rows makes does not grow with the bank of adapters; its gradients alone do."""
    args = oracle.convert(make((2,), 8, 8, 2, 500, route=route, frozen=NAMES[:3]), dtype)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Sizes(), torch.no_grad():
        lora_linear(**args, backend="cpp")
    assert max(sizes) <= 501
    del sizes[:]
    y = lora_linear(**args, backend="cpp")
    with Sizes():
        grads = torch.autograd.grad(y.sum(), oracle.leaves(args))
    assert [t.dtype for t in grads] == [dtype] * 2
    assert sum(size > 501 for size in sizes) <= 2 * 2  # made, and handed on
