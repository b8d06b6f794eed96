"""``contrastive_loss``: every backend against the whole matrix of logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends.torch import contrastive_loss as tiled
from tests import oracle

BACKENDS = oracle.backends("contrastive_loss")
# Under -1 no logit is small enough for the single exponential: the way of a GPU, and of inputs that no shift fits.
SUMS = [tiled.LARGEST_LOGIT, -1.0]


def op(backend: str) -> Any:
    return lambda **kwargs: em3.ops.contrastive_loss(backend=backend, **kwargs)


def make(b: int, v: int, *, k: int = 0, ids: int | None = None, log_q: bool = False, weight: bool = False,
         scale: float = 7.0, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Random arguments; ``ids`` is the number of different items to draw from."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    args = dict(content=rand(b, v), ids_embedding=rand(b, v), logit_scale=torch.tensor(scale).double().requires_grad_())
    if not options.get("normalize", True):
        args["logit_scale"] = torch.tensor(scale / v).double().requires_grad_()
    if k:
        args["negatives"] = rand(k, v)
    if ids is not None:
        args["item_ids"] = torch.randint(ids, (b,))
    if log_q:
        args["log_q"] = rand(b)
    if weight:
        args["weight"] = torch.rand(b, dtype=torch.float64).requires_grad_()
    return args | options


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, ...]) -> dict[str, Any]:
    direction = draw(st.sampled_from(["both", "content_to_id", "id_to_content"]))
    ids = draw(st.sampled_from([None, 1, 3, 1000]))
    return dict(
        b=draw(st.sampled_from(sizes)), v=draw(st.sampled_from([3, 16, 33])), ids=ids, direction=direction,
        k=0 if direction == "id_to_content" else draw(st.sampled_from([0, 1, 5])),
        duplicates=draw(st.sampled_from(["mask", "keep"] + ["positive"] * (ids is not None))),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])), normalize=draw(st.booleans()),
        log_q=draw(st.booleans()), weight=draw(st.booleans()), scale=draw(st.sampled_from([1.0, 7.0])),
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", oracle.HALF, ids=str)
@pytest.mark.parametrize("duplicates", ["mask", "positive", "keep"])
def test_half_types(backend, dtype, duplicates):
    args = make(64, 32, ids=20, log_q=True, weight=True, duplicates=duplicates)
    oracle.check(op(backend), reference.contrastive_loss, args, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("largest", SUMS, ids=["one exponential", "logsumexp"])
def test_gradcheck(backend, duplicates, largest, monkeypatch):
    oracle.skip_unless_served(backend, torch.float64)
    monkeypatch.setattr(tiled, "TILE", (2, 3))
    monkeypatch.setattr(tiled, "LARGEST_LOGIT", largest)
    oracle.gradcheck(op(backend), make(5, 3, k=2, ids=3, log_q=True, weight=True, duplicates=duplicates, reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_real_tiles(backend):
    b = max(tiled.TILE) + 37
    oracle.check(op(backend), reference.contrastive_loss, make(b, 16, ids=b // 2, log_q=True, weight=True), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_contrast(backend, reduction):
    empty = oracle.convert(make(0, 4, reduction=reduction), torch.float32)
    out, *grads = oracle.run(op(backend), empty, 0)
    assert not out.any()
    assert not any(g.any() for g in grads)
    alone = oracle.convert(make(6, 4, ids=1, reduction=reduction), torch.float32)  # every other row is masked
    out, *grads = oracle.run(op(backend), alone, 0)
    assert not out.any()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero vectors", "identical rows", "scale 100", "weights of zero"])
def test_hard_inputs(backend, kind):
    args = make(40, 8, weight=True, scale=100.0 if kind == "scale 100" else 7.0)
    with torch.no_grad():
        if kind == "zero vectors":
            args["content"][3:9] = 0
            args["ids_embedding"][5:12] = 0
        if kind == "identical rows":
            args["content"][:] = args["content"][0].clone()
        if kind == "weights of zero":
            args["weight"].zero_()
    out, *grads = oracle.run(op(backend), oracle.convert(args, torch.float32), 0)
    want, *want_grads = oracle.run(reference.contrastive_loss, args, 0)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    for g, w in zip(grads, want_grads, strict=True):
        assert torch.isfinite(g).all()
        if kind != "weights of zero":
            assert oracle.relative_error(g, w, 1e-2) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_q_is_subtracted_from_every_candidate(backend):
    x = torch.eye(2)
    log_q = torch.tensor([0.9, 0.1]).log()
    got = op(backend)(content=x, ids_embedding=x, logit_scale=2.0, log_q=log_q, direction="content_to_id", reduction="none")
    own, other = torch.tensor(2.0).exp() / torch.tensor([0.9, 0.1]), 1 / torch.tensor([0.1, 0.9])
    torch.testing.assert_close(got, -(own / (own + other)).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_same_bits(backend):
    args = oracle.convert(make(30, 12, ids=9), torch.float32)
    oracle.same_bits_twice(op(backend), args)
    wide = torch.randn(60, 20)
    wide[::2, 4:16] = args["content"].detach()
    strided = args | dict(content=wide[::2, 4:16].requires_grad_())
    for a, b in zip(oracle.run(op(backend), args, 0), oracle.run(op(backend), strided, 0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_fullgraph_and_autocast(backend):
    args = oracle.convert(make(20, 8, k=3, ids=9, log_q=True, weight=True, duplicates="positive"), torch.float32)
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
    scale, offset = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), torch.randn(8, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3, 1]) if duplicates else None
    args = (x, y, scale, ids, offset, True, True, backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.em3.contrastive_loss, args, test_utils=tests)
    row, col = (t.detach() for t in torch.ops.em3.contrastive_loss(*args))
    inputs = [t.detach() for t in (x, y, scale)]
    for need in ([1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]):
        back = (torch.randn(6), torch.randn(6), *inputs, ids, offset.detach(), row, col, [bool(n) for n in need], backend)
        torch.library.opcheck(torch.ops.em3.contrastive_loss_backward, back)


def test_second_order_gradients_are_an_error():
    args = make(6, 4)
    first = torch.autograd.grad(em3.ops.contrastive_loss(**args), oracle.leaves(args), create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_loss has no second-order gradients"):
        torch.autograd.grad(first[0].sum(), args["content"])


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_shapes_without_data(duplicates):
    args = make(6, 4, k=2, ids=3, log_q=True, weight=True, duplicates=duplicates)
    args = oracle.moved(oracle.convert(args, torch.float32), "meta")
    out, *grads = oracle.run(op("auto"), args, 0)
    assert out.is_meta
    assert out.shape == ()
    assert [g.shape for g in grads] == [t.shape for t in oracle.leaves(args)]


@pytest.mark.parametrize("name", ["ids_embedding", "negatives", "item_ids", "log_q", "weight", "logit_scale"])
def test_arguments_on_another_device(name):
    """Every tensor but the first, one after the other."""
    args = oracle.convert(make(6, 4, k=2, ids=3, log_q=True, weight=True), torch.float32)
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name}: was on meta, must be on cpu like content"):
        em3.ops.contrastive_loss(**args)


def messages() -> dict[str, tuple[dict[str, Any], str]]:
    f = torch.randn
    return {
        "content": (dict(content=f(3)), r"content: was \[3\], must be \[B, V\]"),
        "ids_embedding": (dict(ids_embedding=f(3, 5)), r"ids_embedding: was \[3, 5\], must be \[3, 4\]"),
        "dtype": (dict(ids_embedding=f(3, 4).double()), r"ids_embedding: was torch.float64, must be torch.float32 like content"),
        "device": (dict(log_q=torch.empty(3, device="meta")), r"log_q: was on meta, must be on cpu like content"),
        "item_ids shape": (dict(item_ids=torch.arange(4)), r"item_ids: was \[4\], must be \[3\]"),
        "item_ids dtype": (dict(item_ids=f(3)), r"item_ids: was torch.float32, must be torch.int64 or torch.int32"),
        "log_q": (dict(log_q=f(2)), r"log_q: was \[2\], must be \[3\]"),
        "weight": (dict(weight=torch.ones(3, dtype=torch.long)), r"weight: was torch.int64, must be of a floating-point dtype"),
        "logit_scale": (dict(logit_scale=f(2)), r"logit_scale: was \[2\], must be a number or a tensor with one element"),
        "logit_scale type": (dict(logit_scale="2"), r"logit_scale: was str, must be a number"),
        "negatives": (dict(negatives=f(2, 5)), r"negatives: was \[2, 5\], must be \[K, 4\]"),
        "negatives way": (dict(negatives=f(2, 4), direction="id_to_content"), r"negatives: were given with direction='id_to_content'"),
        "duplicates": (dict(duplicates="drop"), r"duplicates: was 'drop', must be one of 'mask', 'positive', 'keep'"),
        "positive": (dict(duplicates="positive"), r"item_ids: was None, must be given for duplicates='positive'"),
        "direction": (dict(direction="up"), r"direction: was 'up', must be one of 'both'"),
        "reduction": (dict(reduction="max"), r"reduction: was 'max', must be one of 'mean'"),
    }  # fmt: skip


@pytest.mark.parametrize("case", messages())
def test_error_messages(case):
    changed, message = messages()[case]
    good = dict(content=torch.randn(3, 4), ids_embedding=torch.randn(3, 4), logit_scale=2.0)
    em3.ops.contrastive_loss(**good)
    with pytest.raises(ValueError, match=message):
        em3.ops.contrastive_loss(**good | changed)
