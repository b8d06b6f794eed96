"""``qformer_attention``: every backend and strategy against the plain formulation in float64."""

from __future__ import annotations

import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.ops import _checks, _qformer_operator
from em3.ops.qformer_attention import cheaper
from tests import oracle

WAYS = [
    *(pytest.param("absorb", *p.values, marks=p.marks) for p in oracle.backends("qformer_attention")),
    ("project", "torch"),
]


def as_streams(values: list[torch.Tensor], offsets: list[torch.Tensor | None]) -> list[Any]:
    return [v if o is None else em3.Jagged(v, o) for v, o in zip(values, offsets, strict=True)]


def op(strategy: str, backend: str) -> Any:
    def call(values, offsets, **kwargs):
        return em3.ops.qformer_attention(
            streams=as_streams(values, offsets), strategy=strategy, backend=backend, **kwargs
        )

    return call


def plain(values, offsets, **kwargs):
    return reference.qformer_attention(streams=as_streams(values, offsets), **kwargs)


def make(batch: int, q: int, heads: int, e: int, widths: list[int], lengths: list[list[int] | int], *,
         masked: bool = False, per_item: bool = False, bias: bool = True, grad: bool = True) -> dict[str, Any]:  # fmt: skip
    """Random arguments. ``lengths[m]`` is N of a padded stream, or the item lengths of a jagged one."""
    d = heads * e

    def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_(grad)

    values, offsets, masks = [], [], []
    for width, length in zip(widths, lengths, strict=True):
        if isinstance(length, int):
            values.append(rand(batch, length, width))
            offsets.append(None)
            masks.append(torch.rand(batch, length) > 0.4 if masked else None)
        else:
            values.append(rand(sum(length), width))
            offsets.append(torch.tensor([0, *length]).cumsum(0))
            masks.append(None)
    args = dict(
        query=rand(*([batch] if per_item else []), q, d), values=values, offsets=offsets, masks=masks, num_heads=heads,
        w_q=rand(d, d, scale=d**-0.5), w_k=[rand(d, c, scale=c**-0.5) for c in widths],
        w_v=[rand(d, c, scale=c**-0.5) for c in widths], w_o=rand(d, d, scale=d**-0.5),
    )  # fmt: skip
    if bias:
        args |= dict(b_q=rand(d), b_k=[rand(d) for _ in widths], b_v=[rand(d) for _ in widths], b_o=rand(d))
    return args


@st.composite
def shapes(draw: st.DrawFn, tiny: bool = True) -> dict[str, Any]:
    """Any shape; without ``tiny`` only those large enough for a rounding error to be typical of its type."""
    batch = draw(st.integers(0 if tiny else 3, 5))
    lengths: list[list[int] | int] = []
    for _ in range(draw(st.integers(1, 3))):
        jagged = draw(st.booleans())
        one = st.sampled_from([0, 1, 2, 3, 17, 40] if tiny else [17, 40])
        lengths.append(draw(st.lists(one, min_size=batch, max_size=batch)) if jagged else draw(one))
    return dict(
        batch=batch, q=draw(st.sampled_from([0, 1, 2, 5, 8] if tiny else [4, 8])), lengths=lengths,
        heads=draw(st.sampled_from([1, 2, 3] if tiny else [2, 3])), e=draw(st.sampled_from([1, 4, 7, 16] if tiny else [16])),
        widths=[draw(st.sampled_from([1, 3, 16, 33] if tiny else [16, 33])) for _ in lengths],
        masked=draw(st.booleans()), per_item=draw(st.booleans()), bias=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(strategy, backend, dtype, seed):
    oracle.skip_unless_served(backend, dtype)

    @settings(max_examples=60 if dtype == torch.float32 else 20)
    @given(shape=shapes(tiny=dtype not in oracle.HALF), salt=st.integers(0, 2**31))
    def check(shape, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(op(strategy, backend), plain, make(**shape), dtype, salt)

    check()


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
def test_tokens_of_another_dtype(strategy, backend, dtype):
    """Stored tokens under float32 weights are read exactly, so only the rounding of their own gradient is in the result."""
    args = oracle.convert(make(4, 3, 2, 16, [24, 16], [30, [9, 0, 31, 1]], masked=True), torch.float32)
    args["values"][0] = args["values"][0].detach().to(dtype).requires_grad_()
    exact = args | dict(values=[x.detach().float().requires_grad_() for x in args["values"]])
    got, want = (oracle.run(op(strategy, backend), given, 0) for given in (args, exact))
    assert [t.dtype for t in got[:3]] == [torch.float32, torch.float32, dtype]
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(a, b, scale=0.01) < (1e-5 if a.dtype == torch.float32 else 1e-2)
    torch._dynamo.reset()
    compiled = torch.compile(op(strategy, backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), got[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_a_real_size(strategy, backend):
    args = make(4, 8, 8, 64, [512, 200], [256, [100, 0, 513, 1]], masked=True)
    oracle.check(op(strategy, backend), plain, args, torch.float32)


@pytest.mark.parametrize("strategy", ["absorb", "project"])
@pytest.mark.parametrize("per_item", [False, True])
def test_gradcheck(strategy, per_item):
    args = make(3, 2, 2, 3, [4, 3], [3, [2, 0, 3]], masked=True, per_item=per_item)
    oracle.gradcheck(op(strategy, "torch"), args)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_jagged_equals_padded(strategy, backend):
    jagged = make(4, 3, 2, 8, [16], [[5, 0, 9, 1]])
    values, mask = reference.padding.padded(jagged["values"][0].detach(), jagged["offsets"][0])
    padded = jagged | dict(values=[values.requires_grad_()], offsets=[None], masks=[mask])
    a = oracle.run(op(strategy, backend), oracle.convert(jagged, torch.float32), 0)
    b = oracle.run(op(strategy, backend), oracle.convert(padded, torch.float32), 0)
    # order of leaves: query, values, ...; the values' gradients have different layouts
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[2], b[2][mask])
    assert not b[2][~mask].any(), "padding received a gradient"
    for x, y in zip(a[3:], b[3:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("kind", ["padded", "masked", "jagged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_items_without_tokens(strategy, backend, kind, dtype):
    oracle.skip_unless_served(backend, dtype)
    lengths = {"padded": [0], "masked": [6], "jagged": [[0, 0, 0]]}[kind]
    args = oracle.convert(make(3, 2, 2, 4, [8], lengths), dtype)
    if kind == "masked":
        args["masks"] = [torch.zeros(3, 6, dtype=torch.bool)]
    with oracle.poisoned():
        out, *grads = oracle.run(op(strategy, backend), args, 0)
    assert torch.equal(out, args["b_o"].detach().expand(3, 2, 8))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not any(g.any() for g in grads[:-1]), "something besides b_o received a gradient"


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_strides_do_not_matter(strategy, backend):
    args = oracle.convert(make(3, 4, 2, 8, [12], [10], masked=True), torch.float32)
    want = oracle.run(op(strategy, backend), args, 0)
    spread = torch.empty(10, 3, 30)[:, :, 5:17].transpose(0, 1)  # item and token strides swapped, a gap behind each row
    strided = dict(args, values=[spread.copy_(args["values"][0].detach()).detach().requires_grad_()],
                   w_q=args["w_q"].detach().t().contiguous().t().requires_grad_(),
                   w_k=[args["w_k"][0].detach().t().contiguous().t().requires_grad_()],
                   query=args["query"].detach().t().contiguous().t().requires_grad_())  # fmt: skip
    assert not strided["values"][0].is_contiguous()
    for a, b in zip(want, oracle.run(op(strategy, backend), strided, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_same_bits_twice(strategy, backend):
    oracle.same_bits_twice(op(strategy, backend), oracle.convert(make(9, 4, 2, 16, [40], [[3, 70, 0, 1, 9, 9, 200, 4, 5]]), torch.float32))


@pytest.mark.parametrize("backend", oracle.backends("qformer_attention"))
@pytest.mark.parametrize("step", [True, False], ids=["step", "operator"])
def test_frozen_tokens_get_no_gradient(backend, step, monkeypatch):
    """A frozen token store costs no dX: the backend is told not to compute it, and makes no tensor for it."""
    args = oracle.convert(make(2, 2, 2, 4, [8, 8], [5, [3, 4]]), torch.float32 if step else torch.bfloat16)
    args["values"][1] = args["values"][1].detach()
    asked = []
    where, name = (_qformer_operator, "backward") if step else (torch.ops.em3, "qformer_attention_backward")
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a: asked.append((a, real(*a))) or asked[-1][1])
    oracle.run(op("absorb", backend), args, 0)
    (given_args, (_, _, _, dvalues)) = asked[0]
    assert given_args[-4] == [True, False]
    assert [d.numel() for d in dvalues] == [args["values"][0].numel(), 0]


def test_its_graph_holds_no_tokens_after_the_backward():
    layer, tokens = em3.QFormerAttention([5], 8, num_heads=2), torch.randn(3, 4, 5, requires_grad=True) * 1
    alive = weakref.ref(tokens)
    loss = layer(torch.randn(2, 8), [tokens]).sum()
    del tokens
    loss.backward()
    assert alive() is None


def test_nested_and_duck_typed_streams():
    args = oracle.convert(make(3, 2, 2, 4, [8], [[4, 1, 6]], grad=False), torch.float32)
    values, offsets = args.pop("values")[0], args.pop("offsets")[0]
    args.pop("masks")

    class Foreign:
        """The shape of a TorchRec JaggedTensor: values() and offsets(), 32-bit at times."""

        def values(self):
            return values

        def offsets(self):
            return offsets.int()

    want = em3.ops.qformer_attention(streams=[em3.Jagged(values, offsets)], **args)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    for stream in (nested, [nested], Foreign(), [Foreign()]):
        torch.testing.assert_close(em3.ops.qformer_attention(streams=stream, **args), want)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("kind", ["padded", "jagged", "mixed"])
def test_torch_compile_fullgraph(strategy, backend, kind):
    lengths = {"padded": [6], "jagged": [[4, 0, 6]], "mixed": [5, [4, 0, 6]]}[kind]
    args = oracle.convert(make(3, 2, 2, 4, [8] * len(lengths), lengths), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op(strategy, backend), fullgraph=True, backend="aot_eager")
    for a, b in zip(oracle.run(op(strategy, backend), args, 0), oracle.run(compiled, args, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["absorb", "project"])
def test_autocast(strategy, dtype):
    args = oracle.convert(make(2, 2, 2, 4, [8], [[3, 5]]), torch.float32)
    call = op(strategy, "auto")
    with torch.autocast("cpu", dtype=dtype):
        out = call(**args)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(**args)
    assert out.dtype == compiled.dtype == dtype
    torch.testing.assert_close(compiled, out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(out, plain(**args).to(dtype), rtol=5e-2, atol=5e-2)
    grads = torch.autograd.grad(out.float().sum(), oracle.leaves(args))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", oracle.backends("qformer_attention"))
@pytest.mark.parametrize("dynamic", ["padded", "jagged"])
def test_opcheck(backend, dynamic):
    u = [torch.randn(2, 1, 3, 8, requires_grad=True), torch.randn(2, 1, 3, 4, requires_grad=True)]
    c = torch.randn(2, 2, 1, 3, requires_grad=True)
    if dynamic == "padded":
        values = [torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 3, 4)]
        offsets, masks = [None, None], [torch.rand(2, 5) > 0.3, None]
    else:
        values = [torch.randn(7, 8), torch.randn(4, 4, requires_grad=True)]
        offsets, masks = [torch.tensor([0, 3, 7]), torch.tensor([0, 0, 4])], [None, None]
    w = [torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 4)]
    args = (u, c, w, values, offsets, masks, 2, None, 0.0, backend)
    torch.library.opcheck(torch.ops.em3.qformer_attention, args)
    y, o, mass, lse = torch.ops.em3.qformer_attention(*args)
    u, w, values, y = ([t.detach() for t in group] for group in (u, w, values, y))
    back = (torch.randn_like(o), torch.randn_like(mass), u, c.detach(), w, values, offsets, masks, y, o.detach(),
            mass.detach(), lse, True, [True, False], [True, False], None, 0.0, backend)  # fmt: skip
    torch.library.opcheck(torch.ops.em3.qformer_attention_backward, back)


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("kind", ["padded", "jagged", "mixed"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_of_an_item_reaches_the_others(strategy, backend, kind, poison):
    """NaN in a token stays with its item, forward and backward."""
    lengths = {"padded": [6], "jagged": [[4, 0, 6, 1]], "mixed": [5, [4, 0, 6, 1]]}[kind]
    args = oracle.convert(make(4, 3, 2, 4, [8] * len(lengths), lengths, per_item=True), torch.float32)
    want = op(strategy, backend)(**args)
    spoiled = oracle.convert(args, torch.float32)
    with torch.no_grad():
        (spoiled["values"][0][0] if kind != "jagged" else spoiled["values"][0])[0] = poison  # a token of item 0
    got = op(strategy, backend)(**spoiled)
    assert not torch.isfinite(got[0]).any()
    torch.testing.assert_close(got[1:], want[1:])
    tensors = ["query", "w_q", "w_o", "b_q", "b_o"]  # and the weights of the streams
    inputs = [[a[n] for n in tensors] + a["w_k"] + a["w_v"] + a["b_k"] + a["b_v"] for a in (spoiled, args)]
    grad = torch.randn(want[1:].shape)
    if strategy == "absorb":  # each item's own gradients; sums over items are as bad as their worst part
        (a, *_), (b, *_) = (torch.autograd.grad(y[1:], i, grad) for y, i in zip((got, want), inputs, strict=True))
        torch.testing.assert_close(a[1:], b[1:])


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("kind", ["masked", "behind the last item"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_no_item_holds_is_never_seen(strategy, backend, kind, poison):
    lengths = {"masked": [6, 3], "behind the last item": [[4, 0, 6], 2]}[kind]
    clean = oracle.convert(make(3, 3, 2, 4, [8, 8], lengths, masked=kind == "masked"), torch.float32)
    if kind == "masked":
        clean["masks"][0][1] = False
        nowhere = ~clean["masks"][0]
    else:
        clean["values"][0] = torch.cat([clean["values"][0].detach(), torch.randn(5, 8)]).requires_grad_()
        nowhere = torch.arange(15) >= 10
    spoiled = oracle.convert(clean, torch.float32)
    with torch.no_grad():
        spoiled["values"][0][nowhere] = poison
    for a, b in zip(oracle.run(op(strategy, backend), spoiled, 0), oracle.run(op(strategy, backend), clean, 0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", oracle.backends("qformer_attention"))
def test_offsets_that_change_before_the_backward_are_refused(backend):
    args = oracle.convert(make(3, 2, 2, 4, [8], [[4, 1, 6]]), torch.float32)
    for wrong, message in (([0, 4, 5, 10**9], "must not run past"), ([0, 9, 5, 11], "must not decrease"), ([2, 4, 5, 11], "must begin")):
        changed = args | {"offsets": [args["offsets"][0].clone()]}
        out = op("absorb", backend)(**changed)
        changed["offsets"][0].numpy()[:] = wrong
        with pytest.raises(ValueError, match=rf"streams\[0\].offsets: .* {message}"):
            out.sum().backward()


@pytest.mark.parametrize("backend", oracle.backends("qformer_attention"))
def test_second_order_gradients_are_an_error(backend):
    args = oracle.convert(make(2, 2, 2, 4, [8], [5]), torch.float32)
    first = torch.autograd.grad(op("absorb", backend)(**args).square().sum(), oracle.leaves(args), create_graph=True)
    with pytest.raises(RuntimeError, match="qformer_attention has no second-order gradients"):
        torch.autograd.grad(first[1].sum(), args["query"])


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
def test_training_after_an_evaluation_in_inference_mode(strategy, backend):
    """Memory that is kept from call to call is not an inference tensor. In a thread of its own, where none is kept yet."""
    args = oracle.convert(make(4, 3, 2, 4, [8], [[4, 0, 6, 1]]), torch.float32)

    def work():
        with torch.inference_mode():
            want = op(strategy, backend)(**args)
        return want, oracle.run(op(strategy, backend), args, 0)[0]

    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(*pool.submit(work).result())


@pytest.mark.parametrize("strategy", ["absorb", "project"])
@pytest.mark.parametrize("per_item", [False, True])
def test_shapes_without_data(strategy, per_item):
    """On the meta device, as in the shape propagation of a model that is not loaded yet."""
    args = oracle.moved(oracle.convert(make(3, 2, 2, 4, [8, 6], [5, 4], masked=True, per_item=per_item), torch.float32), "meta")
    out, *grads = oracle.run(op(strategy, "auto"), args, 0)
    assert out.is_meta
    assert out.shape == (3, 2, 8)
    assert [g.shape for g in grads] == [t.shape for t in oracle.leaves(args)]
    jagged = oracle.moved(oracle.convert(make(3, 2, 2, 4, [8], [[4, 1, 2]]), torch.float32), "meta")
    assert op("absorb", "auto")(**jagged).shape == (3, 2, 8)
    with pytest.raises(ValueError, match=r"streams\[0\].offsets: was on meta, .*use strategy='absorb'"):
        op("project", "auto")(**jagged)


def test_wild_offsets_that_nobody_looked_at(monkeypatch):
    """As on a GPU: they are held within the values, and ask for no memory beyond the values' own rows."""
    monkeypatch.setattr(_checks, "looks", lambda tensor: False)
    for strategy in ("absorb", "project"):
        args = oracle.convert(make(3, 2, 2, 4, [8], [[4, 1, 6]]), torch.float32)
        tame = op(strategy, "torch")(**args | {"offsets": [torch.tensor([0, 4, 11, 11])]})
        wild = op(strategy, "torch")(**args | {"offsets": [torch.tensor([-(10**15), 4, 10**15, 10**12])]})
        torch.testing.assert_close(wild, tame)


DEVICES = ["streams[0]", "streams[1]", "streams[1].offsets", "masks[0]", "w_q", "w_o", "b_q", "b_o",
           *(f"{name}[{m}]" for name in ("w_k", "w_v", "b_k", "b_v") for m in (0, 1))]  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
def test_arguments_on_another_device(name):
    """Every tensor but the first, one after the other."""
    args = oracle.convert(make(2, 2, 2, 4, [8, 6], [5, [3, 4]], masked=True), torch.float32)
    place, _, entry = "offsets[1]".partition("[") if name.endswith("offsets") else name.partition("[")
    place, entry = {"streams": "values"}.get(place, place), entry.strip("]")
    if entry:
        args[place][int(entry)] = args[place][int(entry)].to("meta")
    else:
        args[place] = args[place].to("meta")
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: was on meta, must be on cpu like query")):
        op("auto", "auto")(**args)


def test_scale():
    args = oracle.convert(make(2, 3, 2, 4, [8], [7], bias=False), torch.float64)
    for strategy in ("absorb", "project"):
        got = op(strategy, "torch")(scale=0.9, **args)
        torch.testing.assert_close(got, plain(scale=0.9, **args))


@pytest.mark.parametrize(("strategy", "backend"), WAYS)
@pytest.mark.parametrize("per_item", [False, True])
def test_without_the_first_and_the_last_projection(strategy, backend, per_item):
    args = make(3, 2, 2, 8, [12], [7], per_item=per_item) | dict(w_q=None, b_q=None, w_o=None, b_o=None)
    oracle.check(op(strategy, backend), plain, args, torch.float32)
    with pytest.raises(ValueError, match=r"b_o: was given, must be None without w_o"):
        op(strategy, backend)(**args | dict(b_o=torch.randn(16)))


def test_the_cost_model_takes_the_cheaper_form():
    def streams(n: int) -> list[em3.jagged.Stream]:
        return [em3.jagged.Stream(torch.empty(32, n, 512, device="meta"), None, None)]

    assert cheaper(streams(256), 8, 8, 512) == "absorb"
    assert cheaper(streams(256), 128, 8, 512) == "project"


def test_the_cost_model_counts_the_padding_of_keys_and_values():
    """One long item among short ones: projected, all would be as long."""
    def skewed(*lengths):
        x, bounds = torch.randn(sum(lengths), 64), torch.tensor([0, *lengths]).cumsum(0)
        return [em3.jagged.Stream(x, bounds, None)]

    assert cheaper(skewed(*[64] * 8), 128, 2, 64) == "project"
    assert cheaper(skewed(505, *[1] * 7), 128, 2, 64) == "absorb"


def messages() -> dict[str, tuple[dict[str, Any], str]]:
    f = torch.randn
    jagged = em3.Jagged(f(6, 8), torch.tensor([0, 2, 6]))

    def bounds(*numbers: int) -> em3.Jagged:
        return em3.Jagged(f(6, 8), torch.tensor(numbers))

    return {
        "no weights": (dict(w_k=None), r"w_k\[0\]: was NoneType, must be a tensor \[D, C\]"),
        "a weight missing": (dict(w_v=[None]), r"w_v\[0\]: was NoneType, must be a tensor \[D, C\]"),
        "a number of weights": (dict(w_k=3), r"w_k: was int, must be a tensor, or a list of one for each of the 1 streams"),
        "heads of a word": (dict(num_heads="2"), r"num_heads: was '2', must be at least 1"),
        "true heads": (dict(num_heads=True), r"num_heads: was True, must be at least 1"),
        "dropout type": (dict(dropout="x"), r"dropout: was 'x', must be a probability"),
        "scale type": (dict(scale="x"), r"scale: was 'x', must be a finite number"),
        "scale nan": (dict(scale=float("nan")), r"scale: was nan, must be a finite number"),
        "no stream": (dict(streams=[]), r"streams: was empty, must hold at least one stream"),
        "flat stream": (dict(streams=[f(6, 8)]), r"streams\[0\]: was \[6, 8\], must be padded \[B, N, C\] or jagged"),
        "foreign": (dict(streams=["x"]), r"streams\[0\]: was str, must be a padded tensor, or jagged"),
        "mask shape": (dict(masks=[torch.ones(2, 4, dtype=torch.bool)]), r"masks\[0\]: was torch.bool \[2, 4\], must be torch.bool \[2, 3\]"),
        "mask dtype": (dict(masks=[torch.ones(2, 3)]), r"masks\[0\]: was torch.float32 \[2, 3\], must be torch.bool"),
        "mask of jagged": (dict(streams=[jagged], masks=[torch.ones(6, dtype=torch.bool)]), r"masks\[0\]: was given for a jagged stream, must be None"),
        "masks count": (dict(masks=[None, None]), r"masks: held 2 entries, must hold one for each of the 1 streams"),
        "w_k count": (dict(w_k=[f(4, 8), f(4, 8)]), r"w_k: held 2 entries, must hold one for each of the 1 streams"),
        "query rank": (dict(query=f(4)), r"query: was \[4\], must be \[Q, D\] or \[B, Q, D\]"),
        "query batch": (dict(query=f(3, 2, 4)), r"query: was \[3, 2, 4\], must be \[2, Q, 4\]"),
        "heads": (dict(num_heads=3), r"num_heads: was 3, must be at least 1 and divide the width 4 of query"),
        "no heads": (dict(num_heads=0), r"num_heads: was 0, must be at least 1"),
        "w_q": (dict(w_q=f(4, 5)), r"w_q: was \[4, 5\], must be \[4, 4\]"),
        "w_k": (dict(w_k=[f(4, 7)]), r"w_k\[0\]: was \[4, 7\], must be \[4, 8\]"),
        "w_v": (dict(w_v=[f(3, 8)]), r"w_v\[0\]: was \[3, 8\], must be \[4, 8\]"),
        "b_v": (dict(b_v=[f(5)]), r"b_v\[0\]: was \[5\], must be \[4\]"),
        "items": (dict(streams=[f(2, 3, 8), f(3, 3, 8)], w_k=[f(4, 8)] * 2, w_v=[f(4, 8)] * 2), r"streams\[1\]: had 3 items, must have 2 like streams\[0\]"),
        "dtype": (dict(streams=[f(2, 3, 8).long()]), r"streams\[0\]: was torch.int64, must be torch.float32, "),
        "integer": (dict(query=torch.ones(2, 4, dtype=torch.long)), r"query: was torch.int64, must be torch.float32"),
        "device": (dict(w_o=torch.empty(4, 4, device="meta")), r"w_o: was on meta, must be on cpu like query"),
        "strategy": (dict(strategy="fast"), r"strategy: was 'fast', must be one of 'auto', 'absorb', 'project'"),
        "backend": (dict(backend="troch"), r"backend: was 'troch', must be one of .*did you mean 'torch'"),
        "first offset": (dict(streams=[bounds(1, 2, 6)]), r"streams\[0\].offsets: began with 1, must begin with 0"),
        "falling": (dict(streams=[bounds(0, 4, 2)]), r"streams\[0\].offsets: fell from 4 to 2 at entry 2, must not decrease"),
        "running past": (dict(streams=[bounds(0, 4, 7)]), r"streams\[0\].offsets: ended at 7, must not run past the 6 rows"),
    }  # fmt: skip


@pytest.mark.parametrize("case", messages())
@pytest.mark.parametrize("strategy", ["absorb", "project"])
def test_error_messages(case, strategy):
    changed, message = messages()[case]
    f = torch.randn
    good = dict(query=f(2, 4), streams=[f(2, 3, 8)], w_q=f(4, 4), w_k=[f(4, 8)], w_v=[f(4, 8)], w_o=f(4, 4),
                num_heads=2, strategy=strategy)  # fmt: skip
    em3.ops.qformer_attention(**good)
    with pytest.raises(ValueError, match=message):
        em3.ops.qformer_attention(**good | changed)


@pytest.mark.parametrize("offsets", [1.5, torch.zeros(2), torch.zeros(2, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)])
def test_jagged_refuses_bad_offsets(offsets):
    with pytest.raises(ValueError, match=r"offsets: was .*, must be an int64 or int32 tensor \[B \+ 1\]"):
        em3.Jagged(torch.randn(3, 2), offsets)


def test_nested_tensors_that_cannot_be_read_in_place():
    strided = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.strided)
    holes = torch.nested.narrow(torch.randn(2, 5, 8), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged)
    f = torch.randn
    rest = dict(w_q=f(4, 4), w_k=[f(4, 8)], w_v=[f(4, 8)], w_o=f(4, 4), num_heads=2)
    with pytest.raises(ValueError, match=r"streams\[0\]: was a nested tensor of layout"):
        em3.ops.qformer_attention(f(2, 4), [strided], **rest)
    with pytest.raises(ValueError, match=r"streams\[0\]: was a nested tensor with holes"):
        em3.ops.qformer_attention(f(2, 4), [holes], **rest)
