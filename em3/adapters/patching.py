"""``em3.patch``: em3's operations in the modules of a model that is there already."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import lora_patch, qformer_patch
from ._patched import Patched, log, subclass

KINDS: tuple[Any, ...] = (qformer_patch, lora_patch)


def patch(model: nn.Module) -> dict[str, str]:
    """Let modules of ``model`` call em3's operations, in place.

    Served are the cross-attentions of transformers' Q-Formers (BLIP-2, InstructBLIP and its video form), by
    :func:`em3.ops.qformer_attention`, and PEFT's LoRA layers around an ``nn.Linear``, by :func:`em3.ops.lora_linear`.
    Parameters, buffers and the state dict stay what they are, and outputs and gradients stay the same but for rounding. A call
    that em3 cannot serve takes the module's own way; the logger ``em3`` says why, once. A second call does nothing to
    what is patched already. :func:`unpatch` undoes it. There are no second-order gradients.

    Q-Formers:

    - Attention dropout drops as many weights as PyTorch's, but others with the same seed.
    - ``output_attentions=True`` brings the maps of the cross-attentions whatever the attention implementation. No
      gradient flows through them, and dropout is not in them.
    - All queries must have the same mask of tokens. To see that they do, a call with padding waits for a GPU.
    - Adapters of PEFT on the query's layer are called; on the keys' and values' they are added to the weight, where they
      drop nothing and the weight is float32.

    PEFT:

    - Adapters may be switched, merged, disabled, several of them active, and mixed in a batch by ``adapter_names``, as
      without the patch.
    - Dropout drops as much of an adapter's input as PyTorch's, but other numbers with the same seed.
    - PEFT's own way go: adapters that are not plain LoRA (DoRA and the like) or have a bias, for their formula is another;
      several active at once of which one drops, for each has a mask of its own; adapters of another dtype than their layer
      without autocast, as PEFT makes them float32 in a half model, for em3 would round them.

    Args:
        model: the model, or any module that holds such modules.

    Returns:
        The operation that serves each patched module, by the module's name in ``model``.

    Raises:
        ValueError: if there is nothing in ``model`` that can be patched, saying what was looked for and what was found.
    """
    _check(model)
    done: dict[str, str] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        for kind in KINDS:
            if isinstance(module, kind.Served):
                done[name] = module.em3_op
            elif kind.serves(module, name):
                why = kind.refusal(module)
                if why is None:
                    module.__class__ = subclass(kind.Served, type(module))
                    done[name] = kind.Served.em3_op
                else:
                    left.append(f"{name}: {why}" if name else why)
    if not done:
        must = " or ".join(kind.WHAT for kind in KINDS)
        raise ValueError(f"model: was {type(model).__name__}, must hold {must}; {'; '.join(left) or 'it holds none'}")
    if left:
        log.warning("em3.patch leaves %d modules alone: %s", len(left), "; ".join(left))
    return done


def unpatch(model: nn.Module) -> dict[str, str]:
    """Undo :func:`patch`: every module of ``model`` is of its own class again.

    Returns:
        The operation that served each of them, by name; empty if there was none.
    """
    _check(model)
    done: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Patched):
            done[name] = module.em3_op
            module.__class__ = module.em3_class
    return done


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: was {type(model).__name__}, must be a torch.nn.Module")
