"""``lora_linear``: every backend against the reference in float64, and what the public function promises."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from em3.backends.torch import lora_linear as torch_backend
from em3.ops import _checks, _dispatch, lora_linear
from em3.ops._dropout import Dropout
from em3.reference.lora_linear import lora_linear as reference

from .. import oracle

BACKENDS = oracle.backends("lora_linear")
# (leading shape, C, D, R, G or None): one adapter, few rows and many; many adapters, low rank and high, few rows
# and many an adapter.
SHAPES = [
    ((9,), 7, 5, 3, None), ((2, 550), 33, 17, 8, None), ((40,), 16, 16, 1, 1), ((2, 50), 31, 9, 5, 3),
    ((300,), 24, 40, 4, 20), ((500,), 19, 23, 33, 5), ((130,), 8, 8, 64, 9),
]  # fmt: skip
ROUTES = ["adapter", "offsets"]


def make(leading=(6,), c=5, d=4, r=3, g=None, *, route="adapter", bias=True, per_adapter=False,
         frozen=(), dtype=torch.float64):  # fmt: skip
    def draw(name, *shape):
        return torch.randn(shape, dtype=dtype).requires_grad_(name not in frozen)

    many = () if g is None else (g,)
    args = {
        "x": draw("x", *leading, c), "weight": draw("weight", d, c), "bias": draw("bias", d) if bias else None,
        "lora_a": draw("lora_a", *many, r, c), "lora_b": draw("lora_b", *many, d, r), "scaling": 1.7,
    }  # fmt: skip
    if per_adapter and g is not None:
        args["scaling"] = torch.rand(g, dtype=dtype) + 0.5
    if g is not None:
        rows = torch.Size(leading).numel()
        if route == "adapter":
            args["adapter"] = torch.randint(-1, g, leading)
        else:  # empty segments where two cuts meet; a tail without adapter
            cuts = torch.randint(0, rows + 1, (g,)).sort()[0]
            args["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
    return args


def op(backend):
    return lambda **args: lora_linear(**args, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend, seed):
    oracle.skip_unless_served(backend, dtype)
    for route in ROUTES if shape[-1] is not None else ROUTES[:1]:
        for frozen in (("weight", "bias"), ()):
            oracle.check(op(backend), reference, make(*shape, route=route, frozen=frozen), dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_backend_in_small_pieces(shape, dtype, seed, monkeypatch):
    """Every chunk boundary, and the merged weight at every number of rows."""
    monkeypatch.setattr(torch_backend, "CHUNK", 2000)
    monkeypatch.setattr(torch_backend, "MERGE_ROWS", 1)
    for frozen in (("weight", "bias"), ("x",), ()):
        oracle.check(op("torch"), reference, make(*shape, frozen=frozen), dtype, seed)


@st.composite
def calls(draw):
    leading = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    c, d = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    r, g = draw(st.sampled_from([1, 2, 3, 5, 33])), draw(st.sampled_from([None, 1, 2, 3, 7]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    names = ["x", "weight", "bias", "lora_a", "lora_b"]
    frozen = draw(st.sets(st.sampled_from(names), max_size=4))
    args = make(
        leading, c, d, r, g, route=draw(st.sampled_from(ROUTES)), bias=draw(st.booleans()),
        per_adapter=draw(st.booleans()), frozen=frozen,
    )  # fmt: skip
    args["lora_b"].requires_grad_()
    index = draw(st.sampled_from(["as is", "sorted", "none", "int32"]))
    if "adapter" in args and index == "sorted":
        args["adapter"] = args["adapter"].view(-1).sort()[0].view(leading)
    elif "adapter" in args and index == "none":
        args["adapter"] = torch.full(leading, -1)
    elif index == "int32":
        args |= {k: args[k].int() for k in ROUTES if k in args}
    return args


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=120)
@given(args=calls(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_any_call_matches_reference(backend, args, dtype):
    if dtype == torch.float64 and backend != "torch":
        dtype = torch.float32
    oracle.check(op(backend), reference, args, dtype)


def dropping(backend, p, salt):
    def call(**args):
        torch.manual_seed(salt)
        return lora_linear(**args, dropout=p, backend=backend)

    return call


def dropped(p, salt):
    """The reference with the mask that the operation draws after the same ``manual_seed``."""

    def call(**args):
        torch.manual_seed(salt)
        return reference(**args, drop=Dropout(p, torch.randint(torch.iinfo(torch.int64).max, (1,))))

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_matches_reference(backend, dtype, seed):
    oracle.skip_unless_served(backend, dtype)

    @hypothesis_settings(max_examples=25)
    @given(args=calls(), p=st.sampled_from([0.1, 0.5, 1.0]), salt=st.integers(0, 2**31))
    def check(args, p, salt):
        oracle.check(dropping(backend, p, salt), dropped(p, salt), args, dtype, salt)

    check()
    for shape in SHAPES[1::3]:  # rows enough for several chunks and tiles
        oracle.check(dropping(backend, 0.3, seed), dropped(0.3, seed), make(*shape), dtype, seed)


def test_dropout_is_that_of_peft(seed):
    """The layer sees all of x, the adapter each number with probability 1 - p, over 1 - p; another call drops others."""
    args = make((2000,), 4, 4, 4, dtype=torch.float32, bias=False) | {"scaling": 1.0}
    args |= {"x": torch.ones(2000, 4), "weight": torch.zeros(4, 4), "lora_a": torch.eye(4), "lora_b": torch.eye(4)}
    first = dropping(None, 0.3, 1)(**args)
    kept = first > 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 0.7))
    assert (kept.double().mean() - 0.7).abs() < 5 * (0.21 / kept.numel()) ** 0.5
    assert torch.equal(first, dropping(None, 0.3, 1)(**args))
    assert not torch.equal(first, dropping(None, 0.3, 2)(**args))
    weight = torch.randn(4, 4)
    everything = dropping(None, 1.0, 1)(**args | {"weight": weight})
    torch.testing.assert_close(everything, torch.nn.functional.linear(args["x"], weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g", [None, 4])
def test_strided_inputs(g, dtype, backend, seed):
    def strided(t):
        doubled = torch.stack([t.detach().transpose(-1, -2), torch.full_like(t, torch.nan).transpose(-1, -2)], -1)
        return doubled[..., 0].transpose(-1, -2)

    names = ["x", "weight", "lora_a", "lora_b"]

    def through_strides(**args):
        new = {n: torch.empty_strided(args[n].shape, strided(args[n]).stride(), dtype=args[n].dtype) for n in names}
        return lora_linear(**(args | {n: v.copy_(args[n]) for n, v in new.items()}), backend=backend)

    args = make((60, 20), 12, 10, 6, g)
    if g is not None:
        args["adapter"] = args["adapter"].t().contiguous().t()
    oracle.check(through_strides, reference, args, dtype, seed)


@pytest.mark.parametrize("g", [None, 3])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck(g, route, trained, seed, monkeypatch):
    frozen = () if trained else ("weight", "bias")
    args = make((2, 5), 4, 3, 2, g, route=route, per_adapter=True, frozen=frozen)
    oracle.gradcheck(op(None), args)
    monkeypatch.setattr(torch_backend, "MERGE_ROWS", 1)
    oracle.gradcheck(op(None), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("r", [3, 40])
def test_nothing_of_an_adapter_reaches_other_rows(backend, r, seed):
    """NaN in an adapter stays with its rows, and NaN in a row stays out of the other adapters' gradients."""
    args = make((400,), 6, 7, r, 3, dtype=torch.float32)
    mine = args["adapter"] == 1
    for poison in (torch.nan, torch.inf):
        spoiled = oracle.convert(args, torch.float32)
        with torch.no_grad():
            spoiled["lora_a"][1], spoiled["lora_b"][1] = poison, poison
            spoiled["x"][mine] = poison
        clean = {**args, "adapter": args["adapter"].masked_fill(mine, -1)}
        got, want = (lora_linear(**a, backend=backend) for a in (spoiled, clean))
        torch.testing.assert_close(got[~mine], want[~mine])
        others = torch.tensor([0, 2])
        of_spoiled, of_clean = (
            torch.autograd.grad(y[~mine].sum(), [a["lora_a"], a["lora_b"]]) for y, a in ((got, spoiled), (want, clean))
        )
        for a, b in zip(of_spoiled, of_clean, strict=True):
            torch.testing.assert_close(a[others], b[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_adapter_are_the_linear_layer(backend, seed):
    args = make((50,), 6, 7, 3, 4, dtype=torch.float32)
    args["adapter"] = torch.full((50,), -1)
    with torch.no_grad():
        args["lora_a"].fill_(torch.inf)
        args["lora_b"].fill_(torch.inf)
    y = lora_linear(**args, backend=backend)
    want = torch.nn.functional.linear(args["x"], args["weight"], args["bias"])
    torch.testing.assert_close(y, want)
    for grad in torch.autograd.grad(y.sum(), [args["lora_a"], args["lora_b"]]):
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_ranks(backend, seed):
    """Ranks 2 and 5 in one call, padded with zeros, give what each gives alone; the padding gets no gradient."""
    args = make((30,), 6, 7, 5, 2)
    with torch.no_grad():
        args["lora_a"][0, 2:], args["lora_b"][0, :, 2:] = 0, 0
    args = oracle.convert(args, torch.float32)
    args["adapter"] = torch.arange(30) % 2
    y = lora_linear(**args, backend=backend)
    alone = {k: args[k] for k in ("weight", "bias", "scaling")}
    for g, rank in ((0, 2), (1, 5)):
        low_rank = {"lora_a": args["lora_a"][g, :rank], "lora_b": args["lora_b"][g, :, :rank]}
        torch.testing.assert_close(y[g::2], lora_linear(args["x"][g::2], **alone, **low_rank, backend=backend))
    da, db = torch.autograd.grad(y.sum(), [args["lora_a"], args["lora_b"]])
    assert not da[0, 2:].any()
    assert not db[0, :, 2:].any()


def test_memory_of_many_large_adapters_is_bounded(seed):
    """1,024 adapters of rank 64: temporaries stay small beside the adapters themselves (see the peak of any one)."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    t, g, r, c = 1024, 1024, 64, 64
    args = make((t,), c, c, r, g, frozen=("weight", "bias"), dtype=torch.float32)
    factors = torch_backend._factors(args["lora_a"].detach(), args["lora_b"].detach(), 1.0, None)
    rows = torch_backend._rows(factors[0], args["adapter"], None, args["x"])
    with Watch(), torch.no_grad():
        low = rows.shrink(args["x"], factors[0])
        rows.collect(low, args["x"])
        rows.expand_(torch.zeros(t, c), low, factors[1])
    assert largest <= (g + 1) * r * c, f"a temporary of {largest} elements beside adapters of {g * r * c}"


def test_no_gradient_costs_nothing(seed, monkeypatch):
    """The backward is asked for exactly what is required, and x is kept only where something needs it."""
    asked = []
    chosen = torch_backend.backward

    def spy(*args):
        asked.append((args[1] is not None, args[-1]))
        return chosen(*args)

    monkeypatch.setattr(torch_backend, "backward", spy)
    everything = ("x", "weight", "bias", "lora_a", "lora_b")
    for wanted in everything:
        args = make(frozen=tuple(n for n in everything if n != wanted))
        lora_linear(**args).sum().backward()
        assert asked.pop() == (wanted in ("weight", "lora_a", "lora_b"), [n == wanted for n in everything])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_twice(shape, backend, seed):
    oracle.same_bits_twice(op(backend), make(*shape, dtype=torch.float32))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("g", [None, 3])
def test_opcheck(g, route, seed):
    args = make((8,), 5, 4, 3, g, route=route, per_adapter=True, dtype=torch.float32)
    number, tensor = (1.0, args["scaling"]) if isinstance(args["scaling"], torch.Tensor) else (args["scaling"], None)
    rest = (number, tensor, args.get("adapter"), args.get("offsets"), None, 0.0)
    x, weight, bias, a, b = (args[k] for k in ("x", "weight", "bias", "lora_a", "lora_b"))
    torch.library.opcheck(torch.ops.em3.lora_linear.default, (x, weight, bias, a, b, *rest, "auto"))
    torch.library.opcheck(torch.ops.em3.lora_linear.default, (x, weight, bias, a, b, *rest[:-2], torch.tensor([7]), 0.5, "auto"))
    plain = [t.detach() for t in (torch.randn(8, 4), x, weight, a, b)]
    for need in ([True] * 5, [True, False, False, True, True], [False, False, True, True, False]):
        torch.library.opcheck(torch.ops.em3.lora_linear_backward.default, (*plain, *rest, need, "auto"))


@pytest.mark.parametrize("g", [None, 3])
def test_compiles_without_graph_break(g, seed):
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for leading in ((4, 6), (3, 9)):
        args = make(leading, g=g, dtype=torch.float32)
        got, want = oracle.run(compiled, args, seed), oracle.run(lora_linear, args, seed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("r", [3, 40])
@pytest.mark.parametrize("g", [None, 3])
def test_autocast(g, r, inside, backend, seed):
    """The same bits as a call with bf16 arguments: inside the operator nothing is rounded further."""
    args = make((400,), r=r, g=g, dtype=torch.float32)
    grad = torch.randn(400, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**args, backend=backend)
        if inside:
            grads = torch.autograd.grad(y, oracle.leaves(args), grad)
    if not inside:
        grads = torch.autograd.grad(y, oracle.leaves(args), grad)
    half = oracle.convert(args, torch.bfloat16)
    want = lora_linear(**half, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    for got, expected in zip(grads, torch.autograd.grad(want, oracle.leaves(half), grad), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
def test_indices_that_change_before_the_backward_are_refused(route, backend, seed):
    args = make((40,), g=3, route=route, dtype=torch.float32)
    y = lora_linear(**args, backend=backend)
    args[route].numpy()[-1] = 10**9
    with pytest.raises(ValueError, match=rf"{route}: (held|ended at) 1000000000"):
        y.sum().backward()


@pytest.mark.parametrize("g", [None, 3])
def test_second_order_gradients_are_an_error(g, seed):
    args = make((40,), g=g)
    first = torch.autograd.grad(lora_linear(**args).square().sum(), oracle.leaves(args), create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear has no second-order gradients"):
        torch.autograd.grad(first[0].sum(), args["x"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("g", [None, 3])
def test_shapes_without_data(g, route, seed):
    args = oracle.moved(make((8, 5), g=g, route=route, dtype=torch.float32) | {"scaling": 1.0}, "meta")
    out, *grads = oracle.run(lora_linear, args, seed)
    assert out.is_meta
    assert out.shape == (8, 5, 4)
    assert [t.shape for t in grads] == [t.shape for t in oracle.leaves(args)]


@pytest.mark.parametrize("name", ["weight", "bias", "lora_a", "lora_b", "scaling", *ROUTES])
def test_arguments_on_another_device(name, seed):
    """Every tensor but the first, one after the other."""
    args = make((8,), g=3, route=name if name in ROUTES else "adapter", per_adapter=True, dtype=torch.float32)
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name}: was on meta, must be on cpu like x"):
        lora_linear(**args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_agrees_with_peft(backend, rslora, seed):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(24, 17)})
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["layer"]), model)
    theirs = model["layer"]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, 300, 24, requires_grad=True)
    scaling = 6 / (2 if rslora else 4)
    ours = lora_linear(x, theirs.base_layer.weight, theirs.base_layer.bias, a, b, scaling=scaling, backend=backend)
    want = theirs(x)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(want)
    for got, expected in zip(*(torch.autograd.grad(y, [x, a, b], grad) for y in (ours, want)), strict=True):
        assert oracle.relative_error(got, expected) < 1e-5


ONE = make(dtype=torch.float32)
MANY = make((2, 3), g=3, dtype=torch.float32)
BY_OFFSETS = make(g=3, route="offsets", dtype=torch.float32) | {"offsets": torch.tensor([0, 2, 2, 5])}
F32 = torch.float32
ERRORS = [
    (ONE, {"x": torch.tensor(1.0)}, "x: was a scalar, must be [..., C]"),
    (ONE, {"x": torch.zeros(6, 9)}, "weight: was [4, 5], must be [D, 9]"),
    (ONE, {"x": torch.zeros(6, 5, dtype=torch.int64)}, "x: was torch.int64, must be torch.float32"),
    (ONE, {"weight": torch.zeros(4, 5, dtype=torch.float64)}, "weight: was torch.float64, must be torch.float32 like x"),
    (ONE, {"weight": torch.zeros(4, 5, device="meta")}, "weight: was on meta, must be on cpu like x"),
    (ONE, {"lora_b": torch.zeros(4, 3, dtype=torch.bfloat16)}, "lora_b: was torch.bfloat16, must be torch.float32"),
    (ONE, {"bias": torch.zeros(5)}, "bias: was [5], must be [4]"),
    (ONE, {"lora_a": torch.zeros(5)}, "lora_a: was [5], must be [R, 5] or [G, R, 5]"),
    (ONE, {"lora_a": torch.zeros(3, 6)}, "lora_a: was [3, 6], must be [R, 5]"),
    (ONE, {"lora_b": torch.zeros(4, 2)}, "lora_b: was [4, 2], must be [4, 3]"),
    (ONE, {"lora_b": torch.zeros(5, 3)}, "lora_b: was [5, 3], must be [4, 3]"),
    (ONE, {"lora_a": torch.zeros(0, 5), "lora_b": torch.zeros(4, 0)}, "lora_a: was [0, 5], must have a rank R of at least 1"),
    (ONE, {"adapter": torch.zeros(6, dtype=torch.int64)}, "adapter: was given, must be None when lora_a is [R, C]"),
    (ONE, {"offsets": torch.tensor([0, 6])}, "offsets: was given, must be None when lora_a is [R, C]"),
    (ONE, {"scaling": torch.ones(1)}, "scaling: was a tensor [1], must be a number when lora_a is [R, C]"),
    (MANY, {"lora_a": torch.zeros(0, 3, 5), "lora_b": torch.zeros(0, 4, 3)}, "lora_a: was [0, 3, 5], must hold at least one"),
    (MANY, {"lora_b": torch.zeros(2, 4, 3)}, "lora_b: was [2, 4, 3], must be [3, 4, 3]"),
    (MANY, {"lora_b": torch.zeros(4, 3)}, "lora_b: was [4, 3], must be [3, 4, 3]"),
    (MANY, {"adapter": None}, "adapter, offsets: neither was given, exactly one must be when lora_a is [G, R, C]"),
    (MANY, {"adapter": None, "lora_a": torch.zeros(1, 3, 5), "lora_b": torch.zeros(1, 4, 3)}, "for one adapter on all rows pass"),
    (MANY, {"offsets": torch.tensor([0, 1, 2, 3])}, "adapter, offsets: both were given, exactly one must be"),
    (MANY, {"adapter": torch.zeros(6, dtype=torch.int64)}, "adapter: was [6], must be [2, 3]"),
    (MANY, {"adapter": torch.zeros(2, 3)}, "adapter: was torch.float32, must be torch.int32 or torch.int64"),
    (MANY, {"adapter": torch.full((2, 3), 3)}, "adapter: held 3, must be from -1 (-1 = none) to 2, the last adapter"),
    (MANY, {"adapter": torch.full((2, 3), -2)}, "adapter: held -2, must be from -1 (-1 = none) to 2"),
    (MANY, {"adapter": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "adapter: was on meta, must be on cpu like x"),
    (MANY, {"scaling": torch.ones(2)}, "scaling: was [2], must be [3]"),
    (MANY, {"scaling": torch.ones(3, dtype=torch.int64)}, "scaling: was torch.int64, must be of a floating-point dtype"),
    (MANY, {"scaling": torch.ones(3, requires_grad=True)}, "scaling: required a gradient, must be a constant"),
    (MANY, {"scaling": torch.ones(3, device="meta")}, "scaling: was on meta, must be on cpu like x"),
    (BY_OFFSETS, {"offsets": torch.tensor([0, 2, 5])}, "offsets: was [3], must be [4]"),
    (BY_OFFSETS, {"offsets": torch.tensor([0.0, 2, 3, 5])}, "offsets: was torch.float32, must be torch.int32 or torch.int64"),
    (BY_OFFSETS, {"offsets": torch.tensor([1, 2, 3, 5])}, "offsets: began with 1, must begin with 0"),
    (BY_OFFSETS, {"offsets": torch.tensor([0, 3, 2, 5])}, "offsets: fell from 3 to 2 at entry 2, must not decrease"),
    (BY_OFFSETS, {"offsets": torch.tensor([0, 2, 3, 7])}, "offsets: ended at 7, must not run past the 6 rows"),
    (ONE, {"dropout": 1.5}, "dropout: was 1.5, must be a probability from 0 to 1"),
    (ONE, {"dropout": float("nan")}, "dropout: was nan, must be a probability from 0 to 1"),
    (ONE, {"backend": "tocrh"}, "backend: was 'tocrh', must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "changed", "message"), ERRORS, ids=[m for _, _, m in ERRORS])
def test_error_messages(args, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_linear(**(args | changed))


def test_unlooked_indices_never_read_outside(seed, monkeypatch):
    """As on a GPU, where nothing is looked at: an adapter outside counts as none."""
    monkeypatch.setattr(_checks, "looks", lambda tensor: False)
    args = make((400,), g=3, dtype=torch.float32)
    wild = args["adapter"].masked_fill(args["adapter"] == -1, 10**9)
    wild[::7] = -5
    tame = args["adapter"].clone()
    tame[::7] = -1
    got, want = (oracle.run(lora_linear, args | {"adapter": index}, seed) for index in (wild, tame))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    oracle.run(lora_linear, make((40,), g=3, route="offsets") | {"offsets": torch.tensor([9, 10**9, -4, 60])}, seed)


def test_unknown_backend_for_the_operation():
    x, weight, a, b = torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1, 2), torch.zeros(2, 1)
    with pytest.raises(_dispatch.BackendError, match="lora_linear has no backend"):
        torch.ops.em3.lora_linear(x, weight, None, a, b, 1.0, None, None, None, None, 0.0, "none")
