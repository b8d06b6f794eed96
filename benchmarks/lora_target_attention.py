"""``lora_target_attention`` against gathering the history, projecting it with LoRA (PEFT's too), and PyTorch's attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import em3
from em3 import reference

from . import attention_peers
from .forms import Call, Dims, Form, Inputs, Operation, Work, leaves, lengths, offsets, padding
from .lora_linear import peft_model

Project = Callable[[Tensor], Tensor]


def make(dims: Dims, device: str, dtype: torch.dtype) -> Inputs:
    b, n, c, d, r, q = (dims[key] for key in ("B", "N", "C", "D", "R", "Q"))
    of = lengths(b, n, dims["lengths"] == "skewed")

    def to(tensor: Tensor, trained: bool = False) -> Tensor:
        return tensor.to(device, dtype).requires_grad_(trained)

    def lora() -> tuple[Tensor, Tensor, float]:
        return to(torch.randn(r, c) / c**0.5, True), to(torch.randn(d, r) / r, True), 1.0

    return {
        "target": to(torch.randn(b, d) if q == 1 else torch.randn(b, q, d), True),
        "ids": torch.randint(dims["bank"], (int(of.sum()),)).to(device), "offsets": offsets(of).to(device),
        "bank": to(torch.randn(dims["bank"], c)), "w_q": to(torch.randn(d, d) / d**0.5),
        "w_k": to(torch.randn(d, c) / c**0.5), "w_v": to(torch.randn(d, c) / c**0.5), "w_o": to(torch.randn(d, d) / d**0.5),
        "lora_k": lora(), "lora_v": lora(), "num_heads": dims["H"],
    }  # fmt: skip


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """The inputs as the operation takes them."""
    padded, ids = inputs.get("padded", False), inputs["ids"]
    history = ids.view(len(inputs["target"]), -1) if padded else em3.Jagged(ids, inputs["offsets"])
    return {"history": history} | {key: value for key, value in inputs.items() if key not in ("ids", "offsets", "padded")}


def laid_out(dims: Dims, inputs: Inputs) -> list[Inputs]:
    """Histories of equal length may be padded as well, ``[B, N]``."""
    return [inputs] if dims["lengths"] == "skewed" else [inputs, inputs | {"padded": True}]


def ours(inputs: Inputs, backend: str) -> Tensor:
    return em3.ops.lora_target_attention(**_arguments(inputs), backend=backend)


def by(inputs: Inputs, strategy: str) -> Tensor:
    return em3.ops.lora_target_attention(**_arguments(inputs), strategy=strategy)


def truth(inputs: Inputs) -> Tensor:
    return reference.lora_target_attention(**_arguments(inputs))


def _attention(inputs: Inputs, key: Project, value: Project) -> Callable[[], Tensor]:
    """Gather, project, attend; histories are padded beforehand, as a ranker's input pipeline does it."""
    places, real = padding(inputs["offsets"])
    ids = inputs["ids"][places]  # [B, N]
    mask = None if bool(real.all()) else real[:, None, None, :]
    target, w_q, w_o, bank, h = (inputs[name] for name in ("target", "w_q", "w_o", "bank", "num_heads"))

    def forward() -> Tensor:
        x = bank[ids]  # [B, N, C]
        targets = target if target.dim() == 3 else target[:, None]  # [B, Q, D]
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in (F.linear(targets, w_q), key(x), value(x)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return F.linear(out, w_o).view_as(target)

    return forward


def _project(inputs: Inputs, name: str) -> Project:
    weight, (a, b, scaling) = inputs[f"w_{name}"], inputs[f"lora_{name}"]
    return lambda x: F.linear(x, weight) + scaling * F.linear(F.linear(x, a), b)


def plain(inputs: Inputs) -> Call:
    return Call(_attention(inputs, _project(inputs, "k"), _project(inputs, "v")), leaves(inputs))


def packed(attention: attention_peers.Attention, inputs: Inputs) -> Call:
    """Histories are gathered and projected one after the other, without padding, and read there."""
    target, ids, w_q, w_o, bank, h = (inputs[name] for name in ("target", "ids", "w_q", "w_o", "bank", "num_heads"))
    key, value = _project(inputs, "k"), _project(inputs, "v")
    attend = attention(inputs["offsets"], target.shape[1] if target.dim() == 3 else 1, h)

    def forward() -> Tensor:
        x = bank[ids]  # [T, C]
        targets = target if target.dim() == 3 else target[:, None]  # [B, Q, D]
        q, k, v = (t.unflatten(-1, (h, -1)) for t in (F.linear(targets, w_q), key(x), value(x)))
        return F.linear(attend(q, k, v).flatten(2), w_o).view_as(target)

    return Call(forward, leaves(inputs))


def peft(inputs: Inputs) -> Call:
    of: dict[str, Tensor] = {"target": inputs["target"]}
    layers = []
    for name in "kv":
        a, b, scaling = inputs[f"lora_{name}"]
        _, layer = peft_model(inputs[f"w_{name}"], None, a, b, scaling)
        of[f"lora_{name}[0]"], of[f"lora_{name}[1]"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layers.append(layer)
    return Call(_attention(inputs, *layers), of)


def plain_work(dims: Dims) -> Work:
    """Rows are gathered and projected: ``4 T C D + 4 T R (C + D)`` FLOPs for ``T = B N``; backward only the adapters' own
    gradients, ``4 T R (C + 2 D)`` (the weights are frozen and the bank takes none); ``4 T Q D`` for the attention and
    twice that backward. Gathered rows, keys and values are written once and read once, their gradients likewise."""
    b, n, c, d, r, q = (dims[key] for key in ("B", "N", "C", "D", "R", "Q"))
    t = b * n
    thin, attention, ends = 4 * t * r * (c + d), 4 * t * q * d, 4 * b * q * d * d
    return Work(4 * t * c * d + thin + attention + ends, 4 * t * r * (c + 2 * d) + 2 * attention + ends,
                3 * t * c + 4 * t * d + 2 * c * d, t * c + 6 * t * d)  # fmt: skip


def our_work(dims: Dims) -> Work:
    """The projections are folded into the targets: ``4 T H Q C`` FLOPs forward, ``6 T H Q C`` backward, and
    ``4 B Q D (C + D)`` for the projections of targets and results; the rows are read once in each direction."""
    b, n, c, d, q, h = (dims[key] for key in ("B", "N", "C", "D", "Q", "H"))
    t = b * n
    ends = 4 * b * q * d * (c + d)
    return Work(4 * t * h * q * c + ends, 6 * t * h * q * c + 2 * ends,
                t * c + 2 * b * h * q * c + 2 * c * d, t * c + 4 * b * h * q * c + 2 * c * d)  # fmt: skip


OPERATION = Operation(
    "lora_target_attention", make, truth, plain, ours, plain_work, our_work,
    (*attention_peers.forms(packed, plain_work), Form("peft", peft, plain_work, package="peft")),
    by, laid_out,
)  # fmt: skip
