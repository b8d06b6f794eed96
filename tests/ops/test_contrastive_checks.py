"""What ``contrastive_loss`` and its relatives refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import em3
from tests import oracle
from tests.ops.test_contrastive_loss import BACKENDS, make


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
        "probabilities": (dict(log_q=torch.tensor([-1.0, 0.5, -2.0])), r"log_q: held 0.5, must be at most 0 and finite, the logarithm of a"),
        "weight": (dict(weight=torch.ones(3, dtype=torch.long)), r"weight: was torch.int64, must be of a floating-point dtype"),
        "logit_scale": (dict(logit_scale=f(2)), r"logit_scale: was \[2\], must be a number or a tensor with one element"),
        "logit_scale type": (dict(logit_scale="2"), r"logit_scale: was str, must be a number"),
        "negatives": (dict(negatives=f(2, 5)), r"negatives: was \[2, 5\], must be \[K, 4\]"),
        "negatives way": (dict(negatives=f(2, 4), direction="id_to_content"), r"negatives: were given with direction='id_to_content'"),
        "duplicates": (dict(duplicates="drop"), r"duplicates: was 'drop', must be one of 'mask', 'positive', 'keep'"),
        "positive": (dict(duplicates="positive"), r"item_ids: was None, must be given for duplicates='positive'"),
        "kind": (dict(kind="siglip"), r"kind: was 'siglip', must be one of 'infonce', 'sigmoid'"),
        "bias": (dict(logit_bias=1.0), r"logit_bias: was given with kind='infonce', where it cancels out"),
        "no bias": (dict(kind="sigmoid"), r"logit_bias: was None, must be a number or a tensor with one element for kind="),
        "bias shape": (dict(kind="sigmoid", logit_bias=f(2)), r"logit_bias: was \[2\], must be a number or a tensor with one"),
        "bias dtype": (dict(kind="sigmoid", logit_bias=torch.tensor(2)), r"logit_bias: was torch.int64, must be of a floating"),
        "smoothing": (dict(label_smoothing=1.5), r"label_smoothing: was 1.5, must be from 0 to 1"),
        "smooth pairs": (dict(kind="sigmoid", logit_bias=1.0, label_smoothing=0.1), r"label_smoothing: was 0.1 with kind='sigmoid'"),
        "direction": (dict(direction="up"), r"direction: was 'up', must be one of 'both'"),
        "reduction": (dict(reduction="max"), r"reduction: was 'max', must be one of 'mean'"),
        "list": (dict(content=[[1.0]]), r"content: was list, must be a tensor \[B, V\]"),
        "array": (dict(ids_embedding=f(3, 4).numpy()), r"ids_embedding: was ndarray, must be a tensor \[B, V\]"),
        "list of negatives": (dict(negatives=[[1.0] * 4]), r"negatives: was list, must be a tensor \[K, V\]"),
        "list of items": (dict(item_ids=[1, 2, 3]), r"item_ids: was list, must be a tensor \[3\]"),
        "integers": (dict(content=torch.ones(3, 4).long()), r"content: was torch.int64, must be "),
        "sparse": (dict(content=f(3, 4).to_sparse()), r"content: was of layout torch.sparse_coo, must be torch.strided"),
        "true": (dict(logit_scale=True), r"logit_scale: was bool, must be a number"),
        "smoothing type": (dict(label_smoothing="0.1"), r"label_smoothing: was '0.1', must be from 0 to 1"),
        "normalize": (dict(normalize="no"), r"normalize: was 'no', must be True or False"),
        "probability of 0": (dict(log_q=torch.tensor([0.5, 0.0, 0.5]).log()), r"log_q: held -inf, must be at most 0 and finite"),
        "log_q nan": (dict(log_q=torch.tensor([0.0, torch.nan, 0.0])), r"log_q: held nan, must be at most 0 and finite"),
        "negative weight": (dict(weight=torch.tensor([1.0, -2.0, 0.0])), r"weight: held -2, must be at least 0 and finite"),
        "weight nan": (dict(weight=torch.tensor([1.0, torch.nan, 0.0])), r"weight: held nan, must be at least 0 and finite"),
    }  # fmt: skip


@pytest.mark.parametrize("case", messages())
def test_error_messages(case):
    changed, message = messages()[case]
    good = dict(content=torch.randn(3, 4), ids_embedding=torch.randn(3, 4), logit_scale=2.0)
    em3.ops.contrastive_loss(**good)
    with pytest.raises(ValueError, match=message):
        em3.ops.contrastive_loss(**good | changed)
    if case != "dtype":  # which autocast settles
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=message):
            em3.ops.contrastive_loss(**good | changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_for_their_logarithms_are_an_error(backend, dtype):
    """One that rounding has put above 1 is none."""
    oracle.skip_unless_served(backend, dtype)
    x, q = torch.randn(3, 4, dtype=dtype), torch.rand(3)
    for kind in (dict(), dict(kind="sigmoid", logit_bias=-1.0)):
        em3.ops.contrastive_loss(x, x, logit_scale=2.0, log_q=torch.full((3,), 1e-6), backend=backend, **kind)
        with pytest.raises(ValueError, match=r"log_q: held 0\.\d+, must be at most 0"):
            em3.ops.contrastive_loss(x, x, logit_scale=2.0, log_q=q, backend=backend, **kind)
    with pytest.raises(ValueError, match=r"log_q: held 0\.\d+, must be at most 0"):
        em3.ops.contrastive_metrics(x, x, logit_scale=2.0, log_q=q)


def test_a_graph_notices_probabilities_for_their_logarithms():
    call = torch.compile(lambda x, q: em3.ops.contrastive_loss(x, x, logit_scale=2.0, log_q=q), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"log_q: held 0\.\d+, must be at most 0"):
        call(torch.randn(3, 4), torch.rand(3))


def test_numbers_of_numpy_are_numbers():
    x = torch.randn(3, 4)
    want = em3.ops.contrastive_loss(x, x, logit_scale=2.0)
    for scale in (np.float32(2), np.float64(2), 2, torch.tensor(2.0)):
        assert torch.equal(em3.ops.contrastive_loss(x, x, logit_scale=scale), want)
