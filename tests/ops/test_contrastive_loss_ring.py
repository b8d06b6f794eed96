"""``contrastive_loss`` over the ranks of a process group, against the whole matrix of the concatenated batch in float64."""

from __future__ import annotations

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import em3
from em3 import reference
from em3.backends.torch import contrastive_loss as tiled
from em3.ops import _dispatch
from tests import oracle
from tests.ops import test_contrastive_metrics as metrics
from tests.ops.ranks import Ranks, spread
from tests.ops.test_contrastive_loss import BACKENDS, SUMS, cases, make

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

# Rows of each rank, and extra negatives of each where there are any.
SHARDS = [([9], [2]), ([5, 4], [0, 3]), ([0, 9], [1, 1]), ([6, 0, 3], [0, 2, 1]), ([3, 1, 5, 0], [1, 0, 1, 2])]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(4, str(tmp_path_factory.mktemp("store") / "store"))
    yield made
    made.close()


def _set(memory, group, tile, largest):
    tiled.TILE, tiled.LARGEST_LOGIT = tile, largest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_the_loss_of_the_concatenated_batch(backend, dtype, ranks, seed):
    """Values and every gradient, of every option, duplicates across ranks among them."""
    oracle.skip_unless_served(backend, dtype)

    @settings(max_examples=40)
    @given(case=cases((9,)), shards=st.sampled_from(SHARDS), largest=st.sampled_from(SUMS), salt=st.integers(0, 2**31))
    def check(case, shards, largest, salt):
        torch.manual_seed(seed ^ salt)
        sizes, extras = shards
        case["k"] = sum(extras) if case["k"] else 0
        ranks.run(_set, [((4, 3), largest)] * len(sizes))
        op = spread(ranks, sizes, extras)
        oracle.check(lambda **args: op(**args, backend=backend), reference.contrastive_loss, make(**case), dtype, salt)

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sigmoid_is_that_of_the_concatenated_batch(dtype, ranks, seed):
    @settings(max_examples=40)
    @given(case=cases((9,), "sigmoid"), shards=st.sampled_from(SHARDS), salt=st.integers(0, 2**31))
    def check(case, shards, salt):
        torch.manual_seed(seed ^ salt)
        sizes, extras = shards
        case["k"] = sum(extras) if case["k"] else 0
        ranks.run(_set, [((4, 3), 150.0)] * len(sizes))
        oracle.check(spread(ranks, sizes, extras), reference.contrastive_loss, make(**case), dtype, salt)

    check()


def _metrics(memory, group, args):
    return tuple(em3.ops.contrastive_metrics(**args, group=group))


def test_metrics_are_those_of_the_concatenated_batch(ranks, seed):
    @settings(max_examples=30)
    @given(case=cases((9,)), shards=st.sampled_from(SHARDS), salt=st.integers(0, 2**31))
    def check(case, shards, salt):
        torch.manual_seed(seed ^ salt)
        sizes, extras = shards
        case["k"] = sum(extras) if case["k"] else 0
        args = metrics.arguments(case)
        each = [{} for _ in sizes]
        for name, value in args.items():
            parts = [value] * len(sizes)
            if isinstance(value, torch.Tensor) and value.dim():
                parts = value.split(extras if name == "negatives" else sizes)
            for mine, part in zip(each, parts, strict=True):
                mine[name] = part
        ranks.run(_set, [((4, 3), 150.0)] * len(sizes))
        for got in ranks.run(_metrics, [(mine,) for mine in each]):
            metrics.agrees(got, reference.contrastive_metrics(**args))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_and_real_tiles(backend, ranks):
    sizes = [300, 41, 0, 222]
    ranks.run(_set, [((64, 128), 150.0)] * 4)
    args = make(sum(sizes), 16, ids=200, log_q=True, weight=True, backend=backend)
    for dtype in (torch.bfloat16, torch.float32):
        oracle.check(spread(ranks, sizes, [0] * 4), _reference, args, dtype)


def _reference(backend, **args):
    return reference.contrastive_loss(**args)


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_the_same_bits_twice(duplicates, ranks):
    args = oracle.convert(make(40, 8, ids=20, log_q=True, weight=True, duplicates=duplicates), torch.float32)
    oracle.same_bits_twice(spread(ranks, [11, 20, 9], [0] * 3), args)


def test_nothing_to_contrast(ranks):
    for sizes in ([0, 0], [4, 2]):  # no rows at all; one item alone, on two ranks
        args = oracle.convert(make(sum(sizes), 4, ids=1, log_q=True, weight=True), torch.float32)
        out, *grads = oracle.run(spread(ranks, sizes, [0, 0]), args, 0)
        assert not out.any()
        assert not any(g.any() for g in grads)


class Model(nn.Module):
    """Content of a linear layer, a table of IDs, and the loss with its learnable scale: what DDP averages."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.content, self.ids = nn.Linear(5, 8).double(), nn.Embedding(30, 8).double()
        self.loss = em3.ContentIDContrastiveLoss(init_logit_scale=5.0, **options).double()

    def forward(self, tokens, items, group=None):
        return self.loss(self.content(tokens), self.ids(items), item_ids=items, group=group)


def _trained(memory, group, tokens, items, options):
    """The loss and the gradients that DDP leaves."""
    model = DistributedDataParallel(Model(**options), process_group=group)
    loss = model(tokens, items, group)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("sizes", [[7], [6, 6], [9, 0, 4], [3, 8, 1, 5]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_under_ddp(sizes, reduction, ranks):
    """The mean over the ranks is the loss of the concatenated batch and DDP's gradient is its gradient; of "sum", 1/W of it."""
    tokens, items = torch.randn(sum(sizes), 5, dtype=torch.float64), torch.randint(30, (sum(sizes),))
    whole = Model(reduction=reduction)
    want = whole(tokens, items)
    want.backward()
    scale = 1 if reduction == "mean" else len(sizes)
    each = zip(tokens.split(sizes), items.split(sizes), [dict(reduction=reduction)] * len(sizes), strict=True)
    found = ranks.run(_trained, list(each))
    torch.testing.assert_close(sum(loss for loss, _ in found) / len(sizes) * scale, want.detach())
    for _, grads in found:
        for got, parameter in zip(grads, whole.parameters(), strict=True):
            torch.testing.assert_close(got * scale, parameter.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("largest", SUMS, ids=["one exponential", "logsumexp"])
@pytest.mark.parametrize("ids", [False, True])
def test_a_block_of_a_backend(backend, largest, ids, monkeypatch):
    """More rows than columns, and more columns than rows: offsets and ids are those of the rows, then of the columns."""
    monkeypatch.setattr(tiled, "LARGEST_LOGIT", largest)
    kernel = _dispatch.module("contrastive_loss", backend)
    for b, n, k in ((7, 3, 2), (2, 9, 0), (203, 100, 7), (1, 0, 1)):
        x, y, offset = torch.randn(b, 5), torch.randn(n + k, 5), torch.randn(b + n + k)
        items = torch.randint(4, (b + n,)) if ids else None
        scale = torch.tensor(1.3, dtype=torch.float64)
        logits = (scale * x.double() @ y.double().T).requires_grad_()
        down, across = (t.double().requires_grad_() for t in offset.split([b, n + k]))
        same = torch.zeros(b, n + k, dtype=torch.bool)
        if ids:
            same[:, :n] = items[:b, None] == items[b:]
        free = logits.masked_fill(same, -torch.inf)
        want = (free + across).logsumexp(1), (free[:, :n] + down[:, None]).logsumexp(0)
        row, col = kernel.forward(x, y, scale, items, offset, True, True, n)
        torch.testing.assert_close(row.double(), want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(col.double(), want[1], rtol=1e-5, atol=1e-5)
        # As if further blocks had been met: the sums over all of them are larger than those of this one.
        drow, dcol, row, col = torch.randn(b), torch.randn(n), row.clamp(min=-9) + 0.5, col.clamp(min=-9) + 0.5
        share = drow[:, None] * (free + across - row[:, None]).exp()
        back = (dcol * (free[:, :n] + down[:, None] - col).exp()).detach()
        ds = share.detach().clone()
        ds[:, :n] += back
        got = kernel.backward(drow, dcol, x, y, scale, items, offset, row, col, [True] * 4, n)
        expected = (scale * ds @ y.double(), scale * ds.T @ x.double(), (ds * logits.detach() / scale).sum(),
                    torch.cat([back.sum(1), share.detach().sum(0)]))  # fmt: skip
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g.double(), e.double(), rtol=1e-4, atol=1e-4)


def _compiled(memory, group, args):
    torch._dynamo.reset()
    compiled = torch.compile(em3.ops.contrastive_loss, fullgraph=True, backend="aot_eager")
    return [oracle.run(functools.partial(op, group=group), args, 0) for op in (em3.ops.contrastive_loss, compiled)]


def test_torch_compile_fullgraph(ranks):
    args = make(6, 4, k=2, ids=4, log_q=True, weight=True, duplicates="positive")
    args = oracle.convert(args, torch.float32)
    ((eager, compiled),) = ranks.run(_compiled, [(args,)])
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


DIFFERENT = {
    "width": (dict(content=torch.ones(3, 4), ids_embedding=torch.ones(3, 4)), "the width 5 on rank 1 differs"),
    "duplicates": (dict(duplicates="keep"), "duplicates='mask' on rank 1 differs"),
    "direction": (dict(direction="id_to_content"), "direction='both' on rank 1 differs"),
    "kind": (dict(kind="sigmoid", logit_bias=-1.0), "kind='infonce' on rank 1 differs"),
    "label_smoothing": (dict(label_smoothing=0.1), "label_smoothing=0.0 on rank 1 differs"),
    "weight": (dict(weight=torch.ones(3)), "weight, not given, on rank 1 differs"),
    "gradient": (dict(content=torch.ones(3, 5, requires_grad=True)), "content without a gradient on rank 1 differs"),
    "scale": (dict(logit_scale=6.0), "logit_scale=1.0 on rank 1 differs"),
    "dtype": (dict(content=torch.ones(3, 5).double(), ids_embedding=torch.ones(3, 5).double()), "embeddings in torch.float32 on rank 1 differs"),
}


def _message(memory, group, args):
    try:
        em3.ops.contrastive_loss(**args, group=group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_would_not_meet_are_told(case, ranks):
    changed, message = DIFFERENT[case]
    good = dict(content=torch.ones(3, 5), ids_embedding=torch.ones(3, 5), logit_scale=1.0)
    found = ranks.run(_message, [(good | changed,), (good,), (good,)])
    assert all(text.startswith("group: ") and text.endswith("must be the same on every rank") for text in found)
    assert message + " from that on rank 0" in found[1]


def test_a_rank_that_refuses_its_numbers_tells_the_others(ranks):
    good = dict(content=torch.ones(3, 5), ids_embedding=torch.ones(3, 5), logit_scale=1.0, log_q=torch.zeros(3), weight=torch.ones(3))
    for wrong, message in ((dict(log_q=torch.ones(3)), "log_q: held 1, must be"), (dict(weight=-torch.ones(3)), "weight: held -1, must")):
        found = ranks.run(_message, [(good,), (good | wrong,), (good,)])
        assert found[1].startswith(message)
        assert all("with values that are allowed on rank" in found[i] for i in (0, 2))


def test_what_is_no_group():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^group: was str, must be a torch.distributed.ProcessGroup"):
        em3.ops.contrastive_loss(x, x, logit_scale=1.0, group="world")


def _with_a_rank_lost(memory, group, lost, way, step):
    """This rank's error and how long it took; rank ``lost`` dies or hangs at its second block of logits."""
    if dist.get_rank() == lost:
        whole, calls = getattr(tiled, step), []

        def fatal(*args):
            calls.append(1)
            if len(calls) == 2:
                os._exit(1) if way == "dies" else time.sleep(60)
            return whole(*args)

        setattr(tiled, step, fatal)
    x = torch.randn(4, 3, requires_grad=True)
    start = time.monotonic()
    try:
        em3.ops.contrastive_loss(x, x, logit_scale=1.0, group=group, backend="torch").backward()
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - start


@pytest.mark.parametrize(("way", "step"), [("dies", "backward"), ("hangs", "forward")])
def test_a_lost_rank_is_an_error_of_the_others(way, step, tmp_path):
    timeout, lost = 4.0, 1
    ranks = Ranks(3, str(tmp_path / "store"), timeout)
    try:
        ranks.tell(_with_a_rank_lost, [(lost, way, step)] * 3)
        for kind, message, seconds in ranks.answers([0, 2]):
            assert kind == "RingError"
            assert message.startswith("group: rank ")
            assert seconds < 2 * timeout  # two waits at most, one after the other
        if way == "dies":
            assert ranks.answers([lost]) == [None]
    finally:
        ranks.processes[lost].kill()
        ranks.close()
