"""``contrastive_loss`` against the full matrix of logits, and the losses of OpenCLIP, sentence-transformers and others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import em3

from .forms import Call, Dims, Form, Inputs, Operation, Work, leaves

SCALE = 14.0  # 1 / 0.07, where CLIP starts
BLOCK = 256  # rows of the matrix that are held at a time


def make(dims: Dims, device: str, dtype: torch.dtype) -> Inputs:
    content = torch.randn(dims["B"], dims["V"])
    tensors = {"content": content, "ids_embedding": content + torch.randn_like(content), "logit_scale": torch.tensor(SCALE)}
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}


def ours(inputs: Inputs, backend: str) -> Tensor:
    return em3.ops.contrastive_loss(**inputs, backend=backend)


def _unit(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return F.normalize(inputs["content"], dim=-1), F.normalize(inputs["ids_embedding"], dim=-1)


def in_blocks(inputs: Inputs) -> Tensor:
    """Both directions, some rows of the matrix after the other, computed again in the backward.

    It is what a user would write to save memory, and the truth: in float64 a batch of 65,536 would fill 34 GB with the
    matrix.
    """
    x, y = _unit(inputs)
    scale = inputs["logit_scale"]

    def rows(part: Tensor, others: Tensor) -> Tensor:
        return (scale * part @ others.T).logsumexp(1).sum()

    total = -2 * scale * (x * y).sum()
    for anchors, others in ((x, y), (y, x)):
        for part in anchors.split(BLOCK):
            total = total + checkpoint(rows, part, others, use_reentrant=False)
    return total / (2 * len(x))


def blocks(inputs: Inputs) -> Call:
    return Call(lambda: in_blocks(inputs), leaves(inputs))


def plain(inputs: Inputs) -> Call:
    labels = torch.arange(len(inputs["content"]), device=inputs["content"].device)

    def forward() -> Tensor:
        x, y = _unit(inputs)
        logits = inputs["logit_scale"] * x @ y.T
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return Call(forward, leaves(inputs))


def open_clip(inputs: Inputs) -> Call:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return Call(lambda: loss(*_unit(inputs), inputs["logit_scale"]), leaves(inputs))


def sentence_transformers(inputs: Inputs) -> Call:
    """Its symmetric loss on embeddings that are there already; its scale takes no gradient."""
    from sentence_transformers.losses import MultipleNegativesSymmetricRankingLoss

    loss = MultipleNegativesSymmetricRankingLoss(nn.Identity(), scale=float(inputs["logit_scale"].detach()))
    embeddings = [inputs["content"], inputs["ids_embedding"]]
    return Call(lambda: loss.compute_loss_from_embeddings(embeddings, torch.empty(0)), _embeddings(inputs))


def pytorch_metric_learning(inputs: Inputs) -> Call:
    """NT-Xent in both directions; its temperature takes no gradient."""
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=1 / float(inputs["logit_scale"].detach()))
    x, y = inputs["content"], inputs["ids_embedding"]
    labels = torch.arange(len(x), device=x.device)
    others = labels.clone()  # the same tensor would mean that a row must not be paired with itself

    def forward() -> Tensor:
        ways = [loss(a, labels, ref_emb=b, ref_labels=others) for a, b in ((x, y), (y, x))]
        return (ways[0] + ways[1]) / 2

    return Call(forward, _embeddings(inputs))


def _embeddings(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("content", "ids_embedding")}


def plain_work(dims: Dims) -> Work:
    """``2 B^2 V`` FLOPs forward and twice that backward. The matrix is written, read and written as log-probabilities in
    each direction (5 times its size), and 6 times backward."""
    b, v = dims["B"], dims["V"]
    return Work(2 * b * b * v, 4 * b * b * v, 5 * b * b + 2 * b * v, 6 * b * b + 4 * b * v)


def blocks_work(dims: Dims) -> Work:
    """Each direction for itself: ``4 B^2 V`` FLOPs forward, the same again and twice as much backward. A block is small
    enough for the caches; its candidates are read for every one."""
    b, v = dims["B"], dims["V"]
    return Work(4 * b * b * v, 12 * b * b * v, 2 * b * v * (1 + b / BLOCK), 4 * b * v * (1 + b / BLOCK))


def our_work(dims: Dims) -> Work:
    """``2 B^2 V`` FLOPs forward; backward the logits once more and two products of the same size. The matrix never
    leaves the caches; the embeddings are read, and their gradients written."""
    b, v = dims["B"], dims["V"]
    return Work(2 * b * b * v, 6 * b * b * v, 2 * b * v, 4 * b * v)


OPERATION = Operation(
    "contrastive_loss", make, in_blocks, plain, ours, plain_work, our_work,
    (Form("blocks", blocks, blocks_work),
     *(Form(peer.__name__, peer, plain_work, package=peer.__name__, distribution=distribution)
       for peer, distribution in ((open_clip, "open_clip_torch"), (sentence_transformers, "sentence-transformers"),
                                  (pytorch_metric_learning, "pytorch-metric-learning")))),
)  # fmt: skip
