"""``contrastive_metrics``: accuracy@1 and mean rank against the whole matrix of logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em3
from em3 import reference
from em3.backends.torch import contrastive_loss as tiled
from tests import oracle
from tests.ops.test_contrastive_loss import cases, make

IGNORED = ("reduction", "kind", "label_smoothing")


def arguments(case):
    args = {name: value for name, value in make(**case).items() if name not in IGNORED}
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def agrees(got, want):
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tile", [(4, 3), None], ids=["many tiles", "one tile"])
def test_matches_the_reference(tile, seed, monkeypatch):
    if tile:
        monkeypatch.setattr(tiled, "TILE", tile)

    @settings(max_examples=60)
    @given(case=cases((1, 2, 9, 17)), salt=st.integers(0, 2**31))
    def check(case, salt):
        torch.manual_seed(seed ^ salt)
        args = arguments(case)
        agrees(em3.ops.contrastive_metrics(**args), reference.contrastive_metrics(**args))

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("duplicates", ["mask", "positive", "keep"])
def test_candidates_as_good_as_the_positive(dtype, duplicates):
    """Small whole numbers, whose products are exact in every dtype: many candidates are equal."""
    for _ in range(20):
        content, ids = torch.randint(-1, 2, (12, 3)), torch.randint(-1, 2, (12, 3))
        options = dict(item_ids=torch.randint(9, (12,)), duplicates=duplicates, logit_scale=2.0, normalize=False)
        got = em3.ops.contrastive_metrics(content.to(dtype), ids.to(dtype), **options)
        agrees(got, reference.contrastive_metrics(content.double(), ids.double(), **options))


def test_extremes():
    same = torch.ones(8, 4)
    agrees(em3.ops.contrastive_metrics(same, same, logit_scale=1.0), torch.tensor([0.0, 4.5], dtype=torch.float64))
    agrees(em3.ops.contrastive_metrics(torch.eye(8), torch.eye(8), logit_scale=1.0), torch.tensor([1.0, 1.0]).double())
    agrees(em3.ops.contrastive_metrics(torch.eye(8), -torch.eye(8), logit_scale=1.0), torch.tensor([0.0, 8.0]).double())
    for args in (dict(content=torch.ones(0, 4), ids_embedding=torch.ones(0, 4)),
                 dict(content=same, ids_embedding=same, weight=torch.zeros(8))):  # fmt: skip
        agrees(em3.ops.contrastive_metrics(**args, logit_scale=1.0), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("v", [8, 64, 257])
def test_rows_that_have_become_the_same(dtype, v):
    """The products of one row with itself are rounded in one way or the other, here and there."""
    for _ in range(20):
        same = torch.randn(1, v, dtype=dtype).expand(32, v)
        for options in (dict(), dict(log_q=torch.full((32,), -7.3)), dict(normalize=False)):
            got = em3.ops.contrastive_metrics(same, same, logit_scale=14.0, **options)
            agrees(got, torch.tensor([0.0, 16.5], dtype=torch.float64))


def test_what_is_no_number_is_no_score():
    content, ids = torch.randn(2, 9, 4).unbind()
    content[3, 1] = torch.nan
    assert all(score.isnan() for score in em3.ops.contrastive_metrics(content, ids, logit_scale=1.0))


def test_no_gradient_and_fullgraph_and_autocast():
    args = oracle.convert(make(20, 8, k=3, ids=9, log_q=True, weight=True), torch.float32)
    want = em3.ops.contrastive_metrics(**args)
    assert not want.accuracy.requires_grad
    assert not want.mean_rank.requires_grad
    torch._dynamo.reset()
    agrees(torch.compile(em3.ops.contrastive_metrics, fullgraph=True, backend="aot_eager")(**args), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agrees(em3.ops.contrastive_metrics(**args), want)


@pytest.mark.parametrize("ids", [False, True])
def test_opcheck(ids):
    items = torch.tensor([0, 1, 0, 2, 3, 1]) if ids else None
    scale = torch.tensor(3.0, dtype=torch.float64)
    for of_row, of_col in ((torch.randn(6), torch.randn(6)), (None, torch.randn(6)), (torch.randn(6), None)):
        of_row, of_col = (None if of is None else torch.stack([of, of + 0.1], 1) for of in (of_row, of_col))
        args = (torch.randn(6, 4), torch.randn(8, 4), scale, items, torch.rand(8), of_row, of_col)
        torch.library.opcheck(torch.ops.em3.contrastive_ranks, args)


def test_error_messages():
    x = torch.randn(3, 4)
    for wrong, message in ((dict(log_q=torch.randn(2)), r"log_q: was \[2\], must be \[3\]"),
                           (dict(direction="up"), "direction: was 'up'"),
                           (dict(duplicates="positive"), "item_ids: was None, must be given for duplicates='positive'"),
                           (dict(group="world"), "^group: was str, must be a torch.distributed.ProcessGroup")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            em3.ops.contrastive_metrics(x, x, logit_scale=1.0, **wrong)
