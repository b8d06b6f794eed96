"""Small Q-Formers of transformers with random weights, and how they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

NAMES = ("Blip2", "InstructBlip", "InstructBlipVideo")
WIDTH, TOKENS, HEADS = 32, 24, 4


def qformer(name: str, *, attention: str = "sdpa", dropout: float = 0.0, layers: int = 3, **changed: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}QFormerConfig")(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=48, vocab_size=50,
        encoder_hidden_size=TOKENS, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2,
        **changed,
    )  # fmt: skip
    if name == "Blip2":
        from transformers import Blip2QFormerModel as cls
    elif name == "InstructBlip":
        from transformers import InstructBlipQFormerModel as cls
    else:
        from transformers import InstructBlipVideoQFormerModel as cls
    model = cls._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start as zeros and ones, which would hide what is swapped
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def call(model: Any, query: torch.Tensor, tokens: torch.Tensor, **kwargs: Any) -> Any:
    if hasattr(model, "embeddings"):
        kwargs.setdefault("input_ids", None)
    return model(query_embeds=query, encoder_hidden_states=tokens, **kwargs)


def run(model: Any, query: torch.Tensor, tokens: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The output and the gradients of the queries, the tokens and every parameter that gets one."""
    query, tokens = (t.detach().requires_grad_() for t in (query, tokens))
    model.zero_grad()
    out = call(model, query, tokens, **kwargs).last_hidden_state
    generator = torch.Generator().manual_seed(0)
    out.backward(torch.randn(out.shape, generator=generator))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "query": query.grad, "tokens": tokens.grad} | grads


def exactly(model: Any, query: torch.Tensor, tokens: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What :func:`run` would give without rounding."""
    return run(copy.deepcopy(model).double(), query.double(), tokens.double(), **kwargs)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor],
                truth: Callable[[], dict[str, torch.Tensor]] | None = None) -> None:  # fmt: skip
    """To 1e-5 of each one's norm; a gradient that is zero by mathematics (a key bias) of a third of the largest one.

    A draw on which float32 itself errs by more than half of that (``truth`` knows) gets twice its error.
    """
    assert got.keys() == want.keys()
    errors = _errors(got, want)
    limits = dict.fromkeys(errors, 1e-5)
    if truth is not None and any(e > 1e-5 for e in errors.values()):
        exact = truth()
        errors, own = _errors(got, exact), _errors(want, exact)
        rms = (sum(e * e for e in own.values()) / len(own)) ** 0.5
        limits = {name: max(1e-5, 2 * e, 2 * rms) for name, e in own.items()}
    for name, error in errors.items():
        assert error <= limits[name], f"{name}: relative error {error:.1e} over {limits[name]:.1e}"


def _errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    largest = max(float(w.norm()) for name, w in want.items() if name != "output")
    floors = {name: 0.0 if name == "output" else largest / 3 for name in want}
    return {name: float((got[name] - w).norm()) / max(float(w.norm()), floors[name]) for name, w in want.items()}
