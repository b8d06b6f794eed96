"""``contrastive_loss``: every backend against the whole matrix of logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends import cpp
from em3.backends.cpp import contrastive_loss as compiled
from em3.backends.torch import contrastive_loss as tiled
from em3.ops import _contrastive_whole
from tests import oracle

BACKENDS = oracle.backends("contrastive_loss")
COMPILED = BACKENDS[:1]
# Under -1 no logit is small enough for the single exponential: the way of a GPU, and of inputs that no shift fits.
SUMS = [tiled.LARGEST_LOGIT, -1.0]


def op(backend: str) -> Any:
    return lambda **kwargs: em3.ops.contrastive_loss(backend=backend, **kwargs)


def make(b: int, v: int, *, k: int = 0, ids: int | None = None, log_q: bool = False, weight: bool = False,
         scale: float = 7.0, bias: float = -2.0, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Random arguments; ``ids`` is the number of different items to draw from, ``bias`` of the kind "sigmoid"."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    args = dict(content=rand(b, v), ids_embedding=rand(b, v), logit_scale=torch.tensor(scale).double().requires_grad_())
    if not options.get("normalize", True):
        args["logit_scale"] = torch.tensor(scale / v).double().requires_grad_()
    if options.get("kind") == "sigmoid":
        args["logit_bias"] = torch.tensor(bias).double().requires_grad_()
    if k:
        args["negatives"] = rand(k, v)
    if ids is not None:
        args["item_ids"] = torch.randint(ids, (b,))
    if log_q:
        args["log_q"] = torch.rand(b, dtype=torch.float64).mul(-3).requires_grad_()
    if weight:
        args["weight"] = torch.rand(b, dtype=torch.float64).requires_grad_()
    return args | options


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, ...], kind: str = "infonce") -> dict[str, Any]:
    direction = draw(st.sampled_from(["both", "content_to_id", "id_to_content"]))
    ids = draw(st.sampled_from([None, 1, 3, 1000]))
    return dict(
        b=draw(st.sampled_from(sizes)), v=draw(st.sampled_from([3, 16, 33])), ids=ids, direction=direction,
        k=0 if direction == "id_to_content" else draw(st.sampled_from([0, 1, 5])),
        duplicates=draw(st.sampled_from(["mask", "keep"] + ["positive"] * (ids is not None))),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])), normalize=draw(st.booleans()),
        log_q=draw(st.booleans()), weight=draw(st.booleans()), scale=draw(st.sampled_from([1.0, 7.0])), kind=kind,
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])) if kind == "infonce" else 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [(4, 3), None], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("largest", SUMS, ids=["one exponential", "logsumexp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_the_reference(backend, tile, largest, dtype, seed, monkeypatch):
    oracle.skip_unless_served(backend, dtype)
    if tile:
        monkeypatch.setattr(tiled, "TILE", tile)
    monkeypatch.setattr(tiled, "LARGEST_LOGIT", largest)

    @settings(max_examples=60)
    @given(case=cases((2, 3, 9, 17)), salt=st.integers(0, 2**31))
    def check(case, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(op(backend), reference.contrastive_loss, make(**case), dtype, salt)

    check()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_operators_match_the_reference(backend, kind, seed, monkeypatch):
    """As a graph has them, without the compiled code around them."""
    monkeypatch.setattr(_contrastive_whole, "serves", lambda *args: False)

    @settings(max_examples=40)
    @given(case=cases((2, 3, 9, 17), kind), salt=st.integers(0, 2**31))
    def check(case, salt):
        torch.manual_seed(seed ^ salt)
        oracle.check(op(backend), reference.contrastive_loss, make(**case), torch.float32, salt)

    check()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("kept", [False, True], ids=["made twice", "kept"])
def test_logits_made_twice_or_kept(backend, kept, seed, monkeypatch):
    monkeypatch.setattr(_contrastive_whole, "keeps", lambda *args: kept)

    @settings(max_examples=40)
    @given(case=cases((1, 2, 33, 130)), kind=st.sampled_from(["infonce", "sigmoid"]), salt=st.integers(0, 2**31))
    def check(case, kind, salt):
        torch.manual_seed(seed ^ salt)
        case = case | dict(kind=kind, label_smoothing=case["label_smoothing"] if kind == "infonce" else 0.0)
        oracle.check(op(backend), reference.contrastive_loss, make(**case), torch.float32, salt)

    check()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("v", [16, 128])
def test_memory_is_linear_in_the_batch(backend, v):
    """Of whatever autograd keeps between forward and backward: some numbers a row, or few enough logits."""
    b, kept = 600, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    args = oracle.convert(make(b, v, ids=b, log_q=True, weight=True), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(backend)(**args)
    rows = sum(nbytes for address, nbytes in kept.items() if address not in {t.data_ptr() for t in oracle.leaves(args)})
    assert rows <= b * (8 * 2 + 4 * 2 + 8 * 4) + 64  # two sums, two lengths, the loss, the positive, the item and its place


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", [
    dict(), dict(kind="sigmoid", duplicates="positive"), dict(duplicates="positive", label_smoothing=0.1),
], ids=str)  # fmt: skip
def test_only_what_takes_a_gradient_gets_one(backend, options):
    """Each argument alone, each twice over one graph, and none."""
    args = oracle.convert(make(7, 4, k=2, ids=3, log_q=True, weight=True, **options), torch.float32)
    names = [name for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    loss = op(backend)(**args)
    assert type(loss.grad_fn).__name__ == "_WholeBackward"
    want = dict(zip(names, torch.autograd.grad(loss, [args[name] for name in names], retain_graph=True), strict=True))
    for name in names:
        torch.testing.assert_close(torch.autograd.grad(3 * loss, args[name], retain_graph=True)[0], 3 * want[name])
        one = {key: value if key == name or not isinstance(value, torch.Tensor) else value.detach() for key, value in args.items()}
        torch.testing.assert_close(torch.autograd.grad(op(backend)(**one), args[name])[0], want[name])
    with torch.no_grad():
        assert not op(backend)(**args).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
@pytest.mark.parametrize("duplicates", ["mask", "positive", "keep"])
def test_half_types(backend, dtype, duplicates):
    args = make(64, 32, ids=20, log_q=True, weight=True, duplicates=duplicates, label_smoothing=0.1)
    oracle.check(op(backend), reference.contrastive_loss, args, dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_half_rows_are_read_and_written_as_they_are(backend, dtype, kind, seed):
    """Few rows, whole tiles, odd widths and batches, and candidates of every number."""

    @settings(max_examples=12)
    @given(case=cases((3, 8, 33, 130), kind), k=st.sampled_from([0, 1, 300]), salt=st.integers(0, 2**31))
    def check(case, k, salt):
        torch.manual_seed(seed ^ salt)
        case = case | dict(k=0 if case["direction"] == "id_to_content" else k)
        oracle.check(op(backend), reference.contrastive_loss, make(**case), dtype, salt)

    check()


@pytest.mark.parametrize("backend", COMPILED)
def test_logits_of_half_types_are_as_exact_as_those_of_floats(backend):
    """The loss of rows in bf16 is that of the same rows in float32, also where these are multiplied as they are."""
    args = oracle.convert(oracle.convert(make(70, 129, k=9, scale=50.0), torch.bfloat16), torch.float32)
    half = args | {name: args[name].bfloat16() for name in ("content", "ids_embedding", "negatives")}
    inputs = dict(logit_scale=50.0, reduction="none")
    with torch.no_grad():
        got, want = (op(backend)(**{name: a for name, a in given.items() if name != "logit_scale"}, **inputs) for given in (half, args))
    assert oracle.relative_error(got, want.bfloat16()) < 1e-3


@pytest.mark.parametrize("backend", COMPILED)
def test_large_half_gradients_are_finished_step_by_step(backend):
    """Half a megabyte of float32 sums and more, of a number of rows that eight steps do not divide."""
    args = make(523, 256, k=519, ids=300, weight=True)
    oracle.check(op(backend), reference.contrastive_loss, args, torch.bfloat16)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("largest", SUMS, ids=["one exponential", "logsumexp"])
def test_many_negatives_for_few_rows(backend, dtype, largest, seed, monkeypatch):
    """Frozen ones as a queue's are, and learned ones; on several threads, which share the negatives among them."""
    monkeypatch.setattr(tiled, "LARGEST_LOGIT", largest)
    threads = torch.get_num_threads()

    @settings(max_examples=15)
    @given(b=st.sampled_from([1, 2, 7, 8, 9, 30]), k=st.sampled_from([150, 1500]), v=st.sampled_from([5, 16, 72]),
           frozen=st.booleans(), sigmoid=st.booleans(), count=st.sampled_from([1, 3]), salt=st.integers(0, 2**31))  # fmt: skip
    def check(b, k, v, frozen, sigmoid, count, salt):
        torch.manual_seed(seed ^ salt)
        torch.set_num_threads(count)
        args = make(b, v, k=k, ids=4, log_q=True, weight=True, kind="sigmoid" if sigmoid else "infonce")
        args["negatives"].requires_grad_(not frozen)
        oracle.check(op(backend), reference.contrastive_loss, args, dtype, salt)
        oracle.same_bits_twice(op(backend), oracle.convert(args, dtype))

    try:
        check()
    finally:
        torch.set_num_threads(threads)


def test_label_smoothing_is_that_of_cross_entropy():
    args = make(9, 5, k=3, log_q=True)
    content, ids, negatives = args["content"], args["ids_embedding"], args["negatives"]
    unit = torch.nn.functional.normalize
    logits = args["logit_scale"] * unit(content) @ unit(torch.cat([ids, negatives])).T
    logits = logits - torch.cat([args["log_q"], torch.zeros(3)])
    want = torch.nn.functional.cross_entropy(logits, torch.arange(9), label_smoothing=0.3)
    got = em3.ops.contrastive_loss(**args, direction="content_to_id", label_smoothing=0.3)
    torch.testing.assert_close(got, want)


def test_label_smoothing_leaves_masked_duplicates_out():
    """Of two rows of an item and one of another, each of the two has two candidates."""
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    logits = 2 * x @ y.T
    pairs = torch.stack([logits[0, [0, 2]], logits[1, [1, 2]]])
    want = torch.nn.functional.cross_entropy(pairs, torch.zeros(2, dtype=torch.long), reduction="none", label_smoothing=0.2)
    got = em3.ops.contrastive_loss(
        x, y, item_ids=torch.tensor([5, 5, 8]), logit_scale=2.0, normalize=False, direction="content_to_id",
        reduction="none", label_smoothing=0.2,
    )  # fmt: skip
    torch.testing.assert_close(got[:2], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("largest", SUMS, ids=["one exponential", "logsumexp"])
def test_gradcheck(backend, duplicates, largest, monkeypatch):
    oracle.skip_unless_served(backend, torch.float64)
    monkeypatch.setattr(tiled, "TILE", (2, 3))
    monkeypatch.setattr(tiled, "LARGEST_LOGIT", largest)
    args = make(5, 3, k=2, ids=3, log_q=True, weight=True, duplicates=duplicates, reduction="none", label_smoothing=0.2)
    oracle.gradcheck(op(backend), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_real_tiles(backend):
    b = max(tiled.TILE) + 37
    args = make(b, 16, ids=b // 2, log_q=True, weight=True, label_smoothing=0.1)
    oracle.check(op(backend), reference.contrastive_loss, args, torch.float32)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_numbers_of_any_dtype_and_shape(backend, dtype, shape):
    """Scale and bias, and what is one number a row, beside embeddings in float32."""
    args = oracle.convert(make(9, 4, log_q=True, weight=True, kind="sigmoid", scale=3.0), torch.float32)
    want = torch.autograd.grad(op(backend)(**args), oracle.leaves(args))
    other = {name: args[name].detach().to(dtype) for name in ("logit_scale", "logit_bias", "log_q", "weight")}
    other |= {name: other[name].view(shape) for name in ("logit_scale", "logit_bias")}
    args |= {name: tensor.requires_grad_() for name, tensor in other.items()}
    got = torch.autograd.grad(op(backend)(**args), oracle.leaves(args))
    for leaf, g, w in zip(oracle.leaves(args), got, want, strict=True):
        assert (g.dtype, g.shape) == (leaf.dtype, leaf.shape)
        torch.testing.assert_close(g.float().view(w.shape), w, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@oracle.poisoned()
def test_nothing_to_contrast(backend, reduction):
    empty = oracle.convert(make(0, 4, reduction=reduction), torch.float32)
    out, *grads = oracle.run(op(backend), empty, 0)
    assert not out.any()
    assert not any(g.any() for g in grads)
    for options in (dict(label_smoothing=0.2), dict(kind="sigmoid")):
        empty = oracle.convert(make(0, 4, k=2, log_q=True, reduction=reduction, **options), torch.float32)
        out, *grads = oracle.run(op("auto"), empty, 0)
        assert not out.any()
        assert not any(g.any() for g in grads)
    alone = oracle.convert(make(6, 4, ids=1, reduction=reduction), torch.float32)  # every other row is masked
    out, *grads = oracle.run(op(backend), alone, 0)
    assert not out.any()
    assert not any(g.any() for g in grads)


@torch.no_grad()
def degrade(args, kind):
    """Give some of the embeddings, or the weights, values that are hard to compute with."""
    if kind == "zero vectors":
        args["content"][3:9] = 0
        args["ids_embedding"][5:12] = 0
    if kind == "identical rows":
        args["content"][:] = args["content"][0].clone()
    if kind == "weights of zero":
        args["weight"].zero_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero vectors", "identical rows", "scale 100", "weights of zero"])
def test_hard_inputs(backend, kind):
    args = make(40, 8, weight=True, scale=100.0 if kind == "scale 100" else 7.0)
    degrade(args, kind)
    out, *grads = oracle.run(op(backend), oracle.convert(args, torch.float32), 0)
    want, *want_grads = oracle.run(reference.contrastive_loss, args, 0)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    for g, w in zip(grads, want_grads, strict=True):
        assert torch.isfinite(g).all()
        assert oracle.relative_error(g, w, 1e-2) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_q_is_subtracted_from_every_candidate(backend):
    x = torch.eye(2)
    log_q = torch.tensor([0.9, 0.1]).log()
    got = op(backend)(content=x, ids_embedding=x, logit_scale=2.0, log_q=log_q, direction="content_to_id", reduction="none")
    own, other = torch.tensor(2.0).exp() / torch.tensor([0.9, 0.1]), 1 / torch.tensor([0.1, 0.9])
    torch.testing.assert_close(got, -(own / (own + other)).log())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["both", "content_to_id", "id_to_content"])
def test_items_of_very_different_frequency(backend, direction):
    """Probabilities down to e^-38, which one exponential still serves."""
    args = make(60, 16, ids=40, weight=True, direction=direction)
    args["log_q"] = torch.rand(60, dtype=torch.float64).mul(-38).requires_grad_()
    oracle.check(op(backend), reference.contrastive_loss, args, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_same_bits(backend):
    args = oracle.convert(make(30, 12, ids=9), torch.float32)
    oracle.same_bits_twice(op(backend), args)
    wide = torch.randn(60, 20)
    wide[::2, 4:16] = args["content"].detach()
    strided = args | dict(content=wide[::2, 4:16].requires_grad_())
    for a, b in zip(oracle.run(op(backend), args, 0), oracle.run(op(backend), strided, 0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_default_dtype_and_device(kind, given, dtype):
    """Memory of the compiled call is made in its own dtype, not in torch's default one."""
    args = oracle.convert(make(30, 12, k=3, ids=9, log_q=True, weight=True, kind=kind), given) | dict(logit_scale=5.0)
    want = oracle.run(op("cpp"), args, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            out = op("cpp")(**args)
            grads = torch.autograd.grad(out, oracle.leaves(args))
        got = oracle.run(op("cpp"), args, 0)
    finally:
        torch.set_default_dtype(before)
    assert all(t.dtype == given and t.device.type == "cpu" for t in (out, *grads))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [dict(duplicates="positive"), dict(label_smoothing=0.1), dict(kind="sigmoid")], ids=str)
def test_torch_compile_fullgraph_and_autocast(backend, options):
    args = oracle.convert(make(20, 8, k=3, ids=9, log_q=True, weight=True, **options), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op(backend), fullgraph=True, backend="aot_eager")
    for a, b in zip(oracle.run(op(backend), args, 0), oracle.run(compiled, args, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(backend)(**args)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, op(backend)(**args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", [False, True])
def test_opcheck(backend, duplicates):
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    scale, offset = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), torch.rand(8, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3, 1]) if duplicates else None
    args = (x, y, scale, ids, offset, True, True, backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.em3.contrastive_loss, args, test_utils=tests)
    row, col = (t.detach() for t in torch.ops.em3.contrastive_loss(*args))
    inputs = [t.detach() for t in (x, y, scale)]
    for need in ([1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]):
        back = (torch.randn(6), torch.randn(6), *inputs, ids, offset.detach(), row, col, [bool(n) for n in need], backend)
        torch.library.opcheck(torch.ops.em3.contrastive_loss_backward, back)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_second_order_gradients_are_an_error(kind):
    args = make(6, 4, kind=kind)
    first = torch.autograd.grad(em3.ops.contrastive_loss(**args), oracle.leaves(args), create_graph=True)
    with pytest.raises(RuntimeError, match=r"contrastive_(loss|sigmoid) has no second-order gradients"):
        torch.autograd.grad(first[0].sum(), args["content"])


@pytest.mark.parametrize("options", [
    dict(duplicates="mask", label_smoothing=0.1), dict(duplicates="positive"), dict(kind="sigmoid"),
])  # fmt: skip
def test_shapes_without_data(options):
    args = make(6, 4, k=2, ids=3, log_q=True, weight=True, **options)
    args = oracle.moved(oracle.convert(args, torch.float32), "meta")
    out, *grads = oracle.run(op("auto"), args, 0)
    assert out.is_meta
    assert out.shape == ()
    assert [g.shape for g in grads] == [t.shape for t in oracle.leaves(args)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_gradients_are_an_error_beside_a_first_order_term(backend):
    """The upstream gradient of ``backward()`` is a constant, and another term's gradient must not hide what is missing."""
    x, y = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    loss = em3.ops.contrastive_loss(x, y, logit_scale=7.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_loss has no second-order gradients"):
        (x.sum() + grad.square().sum()).backward()


@pytest.mark.skipif(cpp.unavailable() is not None, reason=f"em3._C: {cpp.unavailable()}")
def test_no_logits_are_kept_under_no_grad(monkeypatch):
    asked = []
    whole = compiled.whole_forward

    def spied(*args):
        asked.append(args[-1])
        return whole(*args)

    monkeypatch.setattr(compiled, "whole_forward", spied)
    x, y, scale = (torch.nn.Parameter(t) for t in (torch.randn(4, 6), torch.randn(4, 6), torch.tensor(7.0)))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert em3.ops.contrastive_loss(x, y, logit_scale=scale, backend="cpp").requires_grad == grad
    assert asked == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_squares_are_no_float32(backend):
    oracle.skip_unless_served(backend, torch.float32)
    args = make(6, 8)
    args["content"] = torch.randn(6, 8).double().mul(1e20).requires_grad_()
    args["ids_embedding"] = torch.randn(6, 8).double().mul(1e-11).requires_grad_()
    want = reference.contrastive_loss(**args)
    single = oracle.convert(args, torch.float32)
    got = op(backend)(**single)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    grads = (torch.autograd.grad(loss, given["ids_embedding"])[0] for loss, given in ((got, single), (want, args)))
    assert oracle.relative_error(*grads, 0.0) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operators", [False, True])
def test_logits_in_the_thousands_keep_their_digits(backend, operators, monkeypatch):
    """Near 3,000 a float32 has steps of 2e-4: what loses one, between a positive and the others or on the way to the backward,
    has lost 1e-4 of the gradient. The scale to base 2 is no float32."""
    if operators:  # as graphs and rings have them
        monkeypatch.setattr(_contrastive_whole, "serves", lambda *args: False)
    args = make(300, 64, normalize=False)
    args["logit_scale"] = torch.tensor(125.25).double().requires_grad_()
    content = torch.autograd.grad(reference.contrastive_loss(**args), args["content"])[0]
    single = oracle.convert(args, torch.float32)
    got = torch.autograd.grad(op(backend)(**single), single["content"])[0]
    assert oracle.relative_error(got, content, 0.0) < 2e-5
