"""The two small encoders trained on the catalogue itself: which picture belongs to which text?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.contrastive_loss import ContentIDContrastiveLoss
from .base import EncoderError, pad
from .small import PATCH, PatchEncoder, WordEncoder
from .vocabulary import MASK

CANDIDATES = 64  # among how many held-out items the right one must be found
FEWEST_PAIRS = 16


@dataclass(frozen=True)
class ContrastResult:
    """How the training went. Accuracies are those of finding an unseen item's text by its picture, and vice versa."""

    pairs: int  # items trained on
    held_out: int  # items measured on
    candidates: int  # held-out items told apart at a time
    chance: float  # accuracy of guessing
    image_to_text: float
    text_to_image: float
    losses: list[float]  # mean of each epoch
    seconds: float


def train_by_contrast(image_encoder: PatchEncoder, text_encoder: WordEncoder, pictures: Tensor, present: Tensor,
                      texts: Sequence[str], *, epochs: int = 12, batch_size: int = 64, lr: float = 1e-3,
                      held_out: float = 0.1, seed: int = 0,
                      progress: Callable[[int, int], None] | None = None) -> ContrastResult:  # fmt: skip
    """Train both encoders in place, by five losses of equal weight:

    - *contrast*: mean-pooled tokens of pictures and of texts are told apart in the batch, both ways, by
      :func:`em3.ops.contrastive_loss`. Items with the same text are no negatives of each other.
    - *masked words*: some word pieces of all texts are hidden, and guessed from the rest.
    - *words*: all pieces of a text are guessed from its mean-pooled tokens. Contrast alone gives up words that no
      picture shows.
    - *picture words*: the pieces of the text are guessed from the mean-pooled tokens of the picture (Joulin et al.,
      "Learning Visual Features from Large Weakly Supervised Data", arXiv 1511.02251).
    - *pixels*: every token of a picture draws its patch at half the resolution. What no text mentions is kept too.

    Items without a picture take part in both losses on words only; items without a text not at all. The same seed, thread
    count and encoders give the same weights on a CPU. Both encoders are in evaluation mode afterwards.

    Args:
        image_encoder, text_encoder: on one device.
        pictures: uint8 ``[n, 3, h, w]``, see :func:`em3.encoders.load_pictures`.
        present: bool ``[n]``, whether the item has a picture.
        texts: ``n`` texts, ``""`` = none.
        epochs: how often each pair is seen.
        batch_size: pairs in a batch.
        lr: the largest learning rate of AdamW; it warms up for 5% of the steps and falls to 0 along a cosine.
        held_out: the share of the pairs, at most a half, that is not trained on but measured.
        seed: of everything random.
        progress: called with the steps done and their number after each.

    Raises:
        ValueError: for lengths that differ, options out of range, or an encoder that :func:`set_trainable` has changed.
        EncoderError: for fewer than 16 items with a picture and a text.
    """
    start = time.perf_counter()
    _check(image_encoder, text_encoder, pictures, present, texts, epochs, batch_size, held_out)
    words, mask = pad([text_encoder.prepare(text) for text in texts])  # [n, L]
    same = _same_text(words)
    pairs = torch.nonzero(present.cpu() & mask.any(1)).flatten()
    lonely = torch.nonzero(~present.cpu() & mask.any(1)).flatten()
    if len(pairs) < FEWEST_PAIRS:
        raise EncoderError(
            f"pictures, texts: {len(pairs)} items have both a picture and a text, must be at least {FEWEST_PAIRS}"
        )
    with torch.random.fork_rng(devices=[image_encoder.device] if image_encoder.device.type == "cuda" else []):
        torch.manual_seed(seed)
        pairs = pairs[torch.randperm(len(pairs))]
        cut = max(2, round(held_out * len(pairs)))
        unseen, pairs = pairs[:cut], pairs[cut:]
        objective = _Objective(image_encoder, text_encoder).to(image_encoder.device)
        data = _Data(pictures, words, mask, same)
        losses = _train(objective, data, pairs, lonely, epochs, batch_size, lr, progress)
    candidates = min(CANDIDATES, len(unseen))
    to_text, to_image = _accuracy(objective, data, unseen, candidates)
    return ContrastResult(
        pairs=len(pairs), held_out=len(unseen), candidates=candidates, chance=1 / candidates, image_to_text=to_text,
        text_to_image=to_image, losses=losses, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _check(image_encoder: PatchEncoder, text_encoder: WordEncoder, pictures: Tensor, present: Tensor,
           texts: Sequence[str], epochs: int, batch_size: int, held_out: float) -> None:  # fmt: skip
    if not len(pictures) == len(present) == len(texts):
        raise ValueError(
            f"pictures, present, texts: had {len(pictures)}, {len(present)}, {len(texts)} items, must be equally many"
        )
    if min(epochs, batch_size) < 1 or not 0 < held_out <= 0.5:
        raise ValueError(
            f"epochs, batch_size, held_out: were {epochs}, {batch_size}, {held_out}, must be >= 1, >= 1, within 0 to 0.5"
        )
    for encoder in (image_encoder, text_encoder):
        if encoder.trained is not None:
            raise ValueError(f"{encoder.kind}_encoder: was set to train {encoder.trained}, must be as it was made")


@dataclass(frozen=True)
class _Data:
    pictures: Tensor  # [n, 3, h, w] uint8
    words: Tensor  # [n, L] int64
    mask: Tensor  # [n, L] bool
    same: Tensor  # [n] int64, equal for equal texts


class _Objective(nn.Module):
    """The encoders under the heads that only their training needs."""

    def __init__(self, image_encoder: PatchEncoder, text_encoder: WordEncoder) -> None:
        super().__init__()
        self.image, self.text = image_encoder, text_encoder
        size, width = len(text_encoder.vocabulary), text_encoder.width
        self.image_head = nn.Linear(image_encoder.width, width, bias=False)
        self.text_head = nn.Linear(width, width, bias=False)
        self.word_head = nn.Linear(width, width)
        self.word_bias = nn.Parameter(torch.zeros(size))
        self.picture_words = nn.Linear(image_encoder.width, size)
        self.text_words = nn.Linear(width, size)
        self.pixels = nn.Linear(image_encoder.width, 3 * (PATCH // 2) ** 2)
        self.contrast = ContentIDContrastiveLoss()

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor, same: Tensor) -> Tensor:
        """``pixels [P, 3, h, w]`` of the first ``P`` of the ``B`` texts ``words, mask [B, L]``; ``same [P]`` -> the loss."""
        paired = len(pixels)
        chosen = mask & (torch.rand(mask.shape, device=mask.device) < 0.15)
        # A fifth of the chosen pieces stays in sight: tokens of visible words must remember their word as well.
        hidden = chosen & (torch.rand(mask.shape, device=mask.device) < 0.8)
        tokens, _ = self.text(words.masked_fill(hidden, MASK), mask)  # [B, L, C]
        patches = self.image(pixels, mask.new_ones(paired))[0]  # [P, N, C]
        picture = patches.mean(1)  # [P, C]
        text = _mean(tokens, mask)  # [B, C]
        contrast = self.contrast(self.image_head(picture), self.text_head(text[:paired]), item_ids=same)
        logits = self.word_head(tokens[chosen]) @ self.text.words.weight.T + self.word_bias
        guessed = F.cross_entropy(logits, words[chosen], reduction="sum") / chosen.sum().clamp(min=1)
        told = _surprise(self.picture_words(picture), words[:paired], mask[:paired])
        kept = _surprise(self.text_words(text), words, mask)
        # The share of the variance that the drawing leaves unexplained.
        target = _patches(F.avg_pool2d(pixels / 127.5 - 1, 2), PATCH // 2)  # [P, N, 3 * 8 * 8]
        redrawn = F.mse_loss(self.pixels(patches), target) / target.var().clamp(min=1e-6)
        return contrast + guessed + told + kept + redrawn

    def embeddings(self, pixels: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the contrast compares: ``[P, C]`` of pictures and of texts, of length 1."""
        picture = self.image(pixels, mask.new_ones(len(pixels)))[0].mean(1)
        text = _mean(self.text(words, mask)[0], mask)
        return F.normalize(self.image_head(picture), dim=-1), F.normalize(self.text_head(text), dim=-1)


def _train(objective: _Objective, data: _Data, pairs: Tensor, lonely: Tensor, epochs: int, batch_size: int, lr: float,
           progress: Callable[[int, int], None] | None) -> list[float]:  # fmt: skip
    device = objective.image.device
    steps = -(-len(pairs) // batch_size)  # an epoch; batches differ by one item at most, so that none is tiny
    optimizer = torch.optim.AdamW(objective.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps * epochs))
    losses = []
    objective.train()
    for epoch in range(epochs):
        total = 0.0
        parts = (rows[torch.randperm(len(rows))].tensor_split(steps) for rows in (pairs, lonely))
        for step, (rows, others) in enumerate(zip(*parts, strict=True)):
            texts = torch.cat([rows, others])
            longest = int(data.mask[texts].sum(1).max())
            words, mask = (t[texts, :longest].to(device) for t in (data.words, data.mask))
            pixels = _augmented(data.pictures[rows].to(device))
            loss = objective(pixels, words, mask, data.same[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            if progress is not None:
                progress(epoch * steps + step + 1, epochs * steps)
        losses.append(total / steps)
    objective.eval()
    return losses


def _rate(step: int, steps: int) -> float:
    """The learning rate's factor: up along a line, down along a cosine."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _augmented(pictures: Tensor) -> Tensor:
    """uint8 ``[B, 3, h, w]`` -> floats of the same range: a part of at least 80% of each side, half of them mirrored."""
    b = len(pictures)
    random = torch.rand(4, b, device=pictures.device)
    size = 0.8 + 0.2 * random[0]
    flip = torch.where(random[1] < 0.5, -1.0, 1.0)
    x, y = ((2 * r - 1) * (1 - size) for r in random[2:])
    zero = torch.zeros_like(size)
    affine = torch.stack([size * flip, zero, x, zero, size, y], 1).view(b, 2, 3)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def _accuracy(objective: _Objective, data: _Data, rows: Tensor, candidates: int) -> tuple[float, float]:
    """Shares of held-out items whose text is the nearest to their picture, and the other way round."""
    device = objective.image.device
    right = torch.zeros(2)
    whole = rows[: len(rows) // candidates * candidates]  # fewer candidates would be an easier question
    for part in whole.split(candidates):
        batch = (data.pictures[part], data.words[part], data.mask[part])
        picture, text = objective.embeddings(*(t.to(device) for t in batch))
        similarity = (picture @ text.T).cpu()
        same = data.same[part]
        for way, scores in enumerate((similarity, similarity.T)):
            right[way] += (same[scores.argmax(1)] == same).sum()
    to_text, to_image = (right / len(whole)).tolist()
    return to_text, to_image


def _surprise(logits: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """How badly ``logits [B, vocabulary]`` guess the pieces ``words, mask [B, L]`` of their item, in any order."""
    log_p = logits.log_softmax(-1).gather(1, words)  # [B, L]
    return -_mean(log_p[..., None], mask).mean()


def _patches(pictures: Tensor, side: int) -> Tensor:
    """``[P, 3, h, w]`` -> ``[P, N, 3 side side]``, patches in the order of a patch encoder's tokens."""
    return F.unfold(pictures, side, stride=side).transpose(1, 2)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """``tokens [B, N, C]``, ``mask [B, N]`` with a token in every row -> ``[B, C]``."""
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _same_text(words: Tensor) -> Tensor:
    """``[n, L]`` -> ``[n]``, equal numbers for equal rows."""
    return torch.unique(words, dim=0, return_inverse=True)[1]
