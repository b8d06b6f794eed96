"""``qformer_attention`` against projecting keys and values, then PyTorch's attentions or that of a BLIP-2 Q-Former."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import em3
from em3 import reference

from . import attention_peers
from .forms import Call, Dims, Form, Inputs, Operation, Work, leaves, lengths, offsets, padding


def make(dims: Dims, device: str, dtype: torch.dtype) -> Inputs:
    d, skewed = dims["D"], dims["lengths"] == "skewed"

    def weight(c: int) -> Tensor:
        return (torch.randn(d, c) / c**0.5).to(device, dtype).requires_grad_()

    def bias() -> Tensor:
        return (torch.randn(d) / 10).to(device, dtype).requires_grad_()

    counts = [lengths(dims["B"], n, skewed) for n in dims["N"]]
    values = [torch.randn(int(of.sum()), c) for of, c in zip(counts, dims["C"], strict=True)]
    if not skewed:
        values = [x.view(dims["B"], n, c) for x, n, c in zip(values, dims["N"], dims["C"], strict=True)]
    return {
        "values": [x.to(device, dtype).requires_grad_(dims["tokens"] == "trained") for x in values],
        "offsets": [offsets(of).to(device) if skewed else None for of in counts],
        "query": torch.randn(dims["Q"], d).to(device, dtype).requires_grad_(), "w_q": weight(d),
        "w_k": [weight(c) for c in dims["C"]], "w_v": [weight(c) for c in dims["C"]], "w_o": weight(d), "b_q": bias(),
        "b_k": [bias() for _ in dims["C"]], "b_v": [bias() for _ in dims["C"]], "b_o": bias(), "num_heads": dims["H"],
    }  # fmt: skip


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """The inputs as the operation takes them."""
    streams = [x if o is None else em3.Jagged(x, o) for x, o in zip(inputs["values"], inputs["offsets"], strict=True)]
    return {"streams": streams} | {key: value for key, value in inputs.items() if key not in ("values", "offsets")}


def plain(inputs: Inputs) -> Call:
    """How jagged tokens are padded is known beforehand; tokens that take no gradient are padded beforehand too."""
    given, h = inputs, inputs["num_heads"]
    places = [padding(o) for o in given["offsets"] if o is not None]  # of all streams or of none
    mask = torch.cat([real for _, real in places], 1)[:, None, None, :] if places else None

    def padded() -> list[Tensor]:
        return [x[place] for x, (place, _) in zip(given["values"], places, strict=True)] if places else given["values"]

    beforehand = None if any(x.requires_grad for x in given["values"]) else padded()

    def forward() -> Tensor:
        tokens = beforehand or padded()  # [B, N, C_m]
        query = F.linear(given["query"], given["w_q"], given["b_q"]).unflatten(-1, (h, -1)).transpose(0, 1)  # [H, Q, E]
        keys, values = (
            torch.cat([F.linear(x, w, b) for x, w, b in zip(tokens, given[f"w_{name}"], given[f"b_{name}"], strict=True)], 1)
            .unflatten(-1, (h, -1)).transpose(1, 2)  # [B, H, N, E]
            for name in "kv"
        )  # fmt: skip
        out = F.scaled_dot_product_attention(query.expand(len(keys), -1, -1, -1), keys, values, attn_mask=mask)
        return F.linear(out.transpose(1, 2).flatten(2), given["w_o"], given["b_o"])  # [B, Q, D]

    return Call(forward, leaves(inputs))


def ours(inputs: Inputs, backend: str) -> Tensor:
    return em3.ops.qformer_attention(**_arguments(inputs), backend=backend)


def by(inputs: Inputs, strategy: str) -> Tensor:
    return em3.ops.qformer_attention(**_arguments(inputs), strategy=strategy)


def truth(inputs: Inputs) -> Tensor:
    return reference.qformer_attention(**_arguments(inputs))


def packed(attention: attention_peers.Attention, inputs: Inputs) -> Call:
    """Keys and values are projected where the tokens lie, and read there. Those of several streams are put side by side
    item by item; where each goes is known beforehand."""
    given, h = inputs, inputs["num_heads"]
    ends = [torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device) if o is None else o
            for x, o in zip(given["values"], given["offsets"], strict=True)]  # fmt: skip
    order = torch.cat([torch.repeat_interleave(o.diff()) for o in ends]).argsort(stable=True) if len(ends) > 1 else None
    bounds = torch.stack(ends).sum(0)  # [B + 1]
    attend = attention(bounds, len(given["query"]), h)

    def project(name: str) -> Tensor:
        parts = [F.linear(x.flatten(0, -2), w, b)
                 for x, w, b in zip(given["values"], given[f"w_{name}"], given[f"b_{name}"], strict=True)]  # fmt: skip
        every = parts[0] if order is None else torch.cat(parts)[order]
        return every.unflatten(-1, (h, -1))  # [T, H, E]

    def forward() -> Tensor:
        query = F.linear(given["query"], given["w_q"], given["b_q"]).unflatten(-1, (h, -1))  # [Q, H, E]
        out = attend(query.expand(len(bounds) - 1, -1, -1, -1), project("k"), project("v"))
        return F.linear(out.flatten(2), given["w_o"], given["b_o"])  # [B, Q, D]

    return Call(forward, leaves(inputs))


def transformers(inputs: Inputs) -> Call:
    """The cross-attention of transformers' BLIP-2 Q-Former, with the output projection that its next module holds."""
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

    x, d = inputs["values"][0], len(inputs["w_q"])
    config = Blip2QFormerConfig(hidden_size=d, num_attention_heads=inputs["num_heads"], encoder_hidden_size=x.shape[-1],
                                attention_probs_dropout_prob=0.0)  # fmt: skip
    attention = Blip2QFormerMultiHeadAttention(config, is_cross_attention=True)
    of_module: dict[str, Tensor] = {}
    for layer, letter in ((attention.query, "q"), (attention.key, "k"), (attention.value, "v")):
        index = "" if letter == "q" else "[0]"  # one stream
        for kind, name in (("weight", f"w_{letter}"), ("bias", f"b_{letter}")):
            value = inputs[name][0] if index else inputs[name]
            of_module[name + index] = nn.Parameter(value.detach())
            setattr(layer, kind, of_module[name + index])

    def forward() -> Tensor:
        query = inputs["query"].expand(len(x), -1, -1)
        return F.linear(attention(query, encoder_hidden_states=x)[0], inputs["w_o"], inputs["b_o"])

    return Call(forward, leaves(inputs) | of_module)


def _refuses(dims: Dims, device: str) -> str | None:
    if len(dims["N"]) > 1:
        return "its attention reads one stream of tokens"
    return "it reads padded tokens" if dims["lengths"] == "skewed" else None


def plain_work(dims: Dims) -> Work:
    """Keys and values are formed: ``4 T C D`` FLOPs a stream forward, as many for the weights' gradients, as many again
    for the tokens'; the attention costs ``4 T Q D`` and twice that backward. Tokens, keys and values are read or written
    once where they are made and once where they are used, their gradients likewise."""
    flops = backward = elements = backward_elements = 0.0
    trained = dims["tokens"] == "trained"
    b, d, q = dims["B"], dims["D"], dims["Q"]
    for n, c in zip(dims["N"], dims["C"], strict=True):
        t = b * n
        flops += 4 * t * c * d + 4 * t * q * d
        backward += 4 * t * c * d * (1 + trained) + 8 * t * q * d
        elements += t * c + 4 * t * d + 2 * c * d
        backward_elements += t * c * (1 + trained) + 6 * t * d + 4 * c * d
    ends = 2 * b * q * d * d + 2 * q * d * d  # the projections of the output and of the query
    return Work(flops + ends, backward + 2 * ends, elements + b * q * d, backward_elements + 2 * b * q * d)


def our_work(dims: Dims) -> Work:
    """Keys and values are folded into the queries: ``4 T H Q C`` FLOPs a stream forward and ``6 T H Q C`` backward, four
    more for the tokens' gradients; the tokens are read once in each direction."""
    flops = backward = elements = backward_elements = 0.0
    trained = dims["tokens"] == "trained"
    b, d, q, h = dims["B"], dims["D"], dims["Q"], dims["H"]
    for n, c in zip(dims["N"], dims["C"], strict=True):
        t = b * n
        flops += 4 * t * h * q * c + 2 * b * q * c * d + 2 * q * c * d
        backward += (6 + 4 * trained) * t * h * q * c + 4 * b * q * c * d + 4 * q * c * d
        elements += t * c + 2 * b * h * q * c + 2 * c * d
        backward_elements += t * c * (1 + trained) + 4 * b * h * q * c + 4 * c * d
    ends = 2 * b * q * d * d + 2 * q * d * d
    return Work(flops + ends, backward + 2 * ends, elements + b * q * d, backward_elements + 2 * b * q * d)


OPERATION = Operation(
    "qformer_attention", make, truth, plain, ours, plain_work, our_work,
    (*attention_peers.forms(packed, plain_work),
     Form("transformers", transformers, plain_work, package="transformers", refuses=_refuses)),
    by,
)  # fmt: skip
