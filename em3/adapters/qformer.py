"""Weights of other packages' Q-Formers and attentions in em3's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..layers import FusionQFormer, QFormerAttention
from ._foreign import plain_parameters, qformer_classes

Read = Callable[[Tensor], Tensor]
Layer = TypeVar("Layer", bound=nn.Module)


def qformer_attention_from(module: nn.Module, *, strategy: str = "auto", backend: str | None = None) -> QFormerAttention:
    """An :class:`em3.QFormerAttention` with the weights of another package's attention, on its device and in its dtype.

    Args:
        module: a ``torch.nn.MultiheadAttention``, called with the tokens as keys and as values; or the cross-attention of
            a layer of a transformers Q-Former, ``model.encoder.layer[i].crossattention``, without the dropout, residual
            and norm that follow its output projection.
        strategy, backend: as in :func:`em3.ops.qformer_attention`.

    Raises:
        ValueError: for another module, or one with options that the layer does not have.
    """
    if type(module) is nn.MultiheadAttention:  # not one of its relatives, which keep their weights elsewhere
        state = _of_multihead(module)
        heads, dropout = module.num_heads, module.dropout
    elif isinstance(getattr(module, "attention", None), qformer_classes("MultiHeadAttention")):
        state = _of_crossattention(module, Tensor.detach)
        heads, dropout = module.attention.num_attention_heads, module.attention.attention_dropout  # type: ignore[union-attr]
    else:
        must = "torch.nn.MultiheadAttention or the cross-attention of a transformers Q-Former's layer"
        raise ValueError(f"module: was {type(module).__module__}.{type(module).__qualname__}, must be {must}")
    width = state["w_k.0"].shape
    layer = QFormerAttention([width[1]], width[0], num_heads=heads, bias="b_q" in state, dropout=float(dropout),
                             strategy=strategy, backend=backend)  # fmt: skip
    return _with(layer.train(module.training), state)


def fusion_qformer_from(model: nn.Module, query_tokens: Tensor | None = None, *, out_dim: int | None = None,
                        strategy: str = "auto", backend: str | None = None) -> FusionQFormer:  # fmt: skip
    """A :class:`em3.FusionQFormer` with the weights of a transformers Q-Former, on its device, in its dtype and mode; all are
    trained.

    ``queries([tokens])`` of the result is the ``last_hidden_state`` of the Q-Former with ``query_embeds`` all of the
    given tokens and ``encoder_hidden_states=tokens``; the projection ``out`` behind it, which no Q-Former has, starts
    afresh. What only an instruction's text passes through (its embeddings and feed-forward blocks, with
    InstructBLIP) has no place in a FusionQFormer and stays behind: what equals it is the Q-Former called without text.

    Args:
        model: a ``Blip2QFormerModel``, ``InstructBlipQFormerModel`` or ``InstructBlipVideoQFormerModel``, or a model that
            holds one as ``qformer`` and its query tokens as ``query_tokens``.
        query_tokens: ``[1, Q, D]`` or ``[Q, D]``; those of ``model`` by default.
        out_dim, strategy, backend: as in :class:`em3.FusionQFormer`.

    Raises:
        ValueError: for another model, without query tokens, for an activation other than ``"gelu"``, and where PEFT or others
            have wrapped a linear layer.
    """
    qformer: Any = getattr(model, "qformer", model)
    if type(qformer) not in qformer_classes("Model"):
        must = "a Q-Former of transformers (BLIP-2, InstructBLIP), or hold one as `qformer`"
        raise ValueError(f"model: was {type(model).__name__}, must be {must}")
    tokens = getattr(model, "query_tokens", None) if query_tokens is None else query_tokens
    of = qformer.config
    if tokens is None:
        raise ValueError(f"query_tokens: was None, must be [Q, {of.hidden_size}]: {type(model).__name__} holds none")
    tokens = tokens.detach()[0] if tokens.dim() == 3 and len(tokens) == 1 else tokens.detach()
    if tokens.dim() != 2 or tokens.shape[1] != of.hidden_size:
        raise ValueError(f"query_tokens: was {list(tokens.shape)}, must be [Q, {of.hidden_size}] or [1, Q, {of.hidden_size}]")
    if of.hidden_act != "gelu":
        raise ValueError(f"model.config.hidden_act: was {of.hidden_act!r}, must be 'gelu'")
    fusion = FusionQFormer(
        [of.encoder_hidden_size], of.hidden_size, num_queries=len(tokens), num_layers=of.num_hidden_layers,
        num_heads=of.num_attention_heads, out_dim=out_dim, ffn_dim=of.intermediate_size,
        cross_every=of.cross_attention_frequency, norm="post", norm_eps=of.layer_norm_eps, query_norm=True, final_norm=False,
        dropout=float(of.hidden_dropout_prob), attention_dropout=float(of.attention_probs_dropout_prob), strategy=strategy,
        backend=backend,
    )  # fmt: skip
    state = state_of(qformer, Tensor.detach) | {"query": tokens}
    return _with(fusion.train(qformer.training), state, fresh=("out.weight", "out.bias"))


def state_of(qformer: Any, read: Read) -> dict[str, Tensor]:
    """A Q-Former's parameters, or with another ``read`` what belongs to each, under the names of a FusionQFormer."""
    first = qformer.layernorm if hasattr(qformer, "layernorm") else qformer.embeddings.layernorm
    state = _norm("norm_query", first, read)
    for i, layer in enumerate(qformer.encoder.layer):
        own, at = layer.attention, f"layers.{i}"
        parts = [_linear("", getattr(own.attention, name), read) for name in ("query", "key", "value")]
        state |= {f"{at}.qkv{kind}": torch.cat([part[kind] for part in parts]) for kind in (".weight", ".bias")}
        state |= _linear(f"{at}.proj", own.output.dense, read) | _norm(f"{at}.norm_self", own.output.LayerNorm, read)
        if layer.has_cross_attention:
            cross = layer.crossattention
            state |= {f"{at}.cross.{name}": value for name, value in _of_crossattention(cross, read).items()}
            state |= _norm(f"{at}.norm_cross", cross.output.LayerNorm, read)
        state |= _linear(f"{at}.ffn_in", layer.intermediate_query.dense, read)
        state |= _linear(f"{at}.ffn_out", layer.output_query.dense, read)
        state |= _norm(f"{at}.norm_ffn", layer.output_query.LayerNorm, read)
    return state


def _of_crossattention(module: Any, read: Read) -> dict[str, Tensor]:
    """Under the names of a QFormerAttention with one stream."""
    at = module.attention
    state: dict[str, Tensor] = {}
    for letter, layer, entry in (("q", at.query, ""), ("k", at.key, ".0"), ("v", at.value, ".0"), ("o", module.output.dense, "")):
        of = _linear("", layer, read)
        state |= {f"w_{letter}{entry}": of[".weight"], f"b_{letter}{entry}": of[".bias"]}
    return state


def _of_multihead(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    if module.kdim != module.vdim:
        raise ValueError(f"module: had kdim {module.kdim} and vdim {module.vdim}, must read keys and values off the same tokens")
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("module: had add_bias_kv or add_zero_attn, must have neither: QFormerAttention reads tokens only")
    if module._qkv_same_embed_dim:
        w_q, w_k, w_v = module.in_proj_weight.detach().chunk(3)
    else:
        w_q, w_k, w_v = (w.detach() for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight))
    out = module.out_proj
    if type(out) is not NonDynamicallyQuantizableLinear or out._forward_hooks or out._forward_pre_hooks:
        raise ValueError(f"module.out_proj: was {type(out).__qualname__}, or had hooks, must be as torch makes it")
    state = {"w_q": w_q, "w_k.0": w_k, "w_v.0": w_v, "w_o": module.out_proj.weight.detach()}
    if module.in_proj_bias is not None:
        b_q, b_k, b_v = module.in_proj_bias.detach().chunk(3)
        state |= {"b_q": b_q, "b_k.0": b_k, "b_v.0": b_v, "b_o": module.out_proj.bias.detach()}
    return state


def _linear(at: str, layer: nn.Module, read: Read) -> dict[str, Tensor]:
    weight, bias = plain_parameters(layer, at or "module")
    assert bias is not None  # a Q-Former's linear layers have one
    return {f"{at}.weight": read(weight), f"{at}.bias": read(bias)}


def _norm(at: str, layer: Any, read: Read) -> dict[str, Tensor]:
    return {f"{at}.weight": read(layer.weight), f"{at}.bias": read(layer.bias)}


def _with(layer: Layer, state: dict[str, Tensor], fresh: tuple[str, ...] = ()) -> Layer:
    """``layer`` with copies of the tensors of ``state``, on their device and in their dtype; ``fresh`` keep their start."""
    like = next(iter(state.values()))
    layer.to(like.device, like.dtype)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert sorted(missing) == sorted(fresh), missing
    assert not unexpected, unexpected
    return layer
