"""Checkpoints of a training: everything that the next step depends on, in safetensors, and beside it what JSON holds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import atomic

FORMAT, VERSION = "em3.checkpoint", 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and why."""


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Write ``path`` (safetensors) whole or not at all.

    Args:
        model: its parameters and buffers are kept.
        optimizer: its tensors are kept too, and torch's random state; None for a checkpoint that is only read.
        state: what JSON can hold; travels in the file's metadata together with a checksum of all of it.
    """
    from safetensors.torch import save as serialise

    tensors = {f"model.{name}": t.detach().contiguous() for name, t in model.state_dict().items()}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": t for name, t in _optimizer_tensors(optimizer).items()}
        tensors["random"] = torch.get_rng_state()
    about = {"format": FORMAT, "version": VERSION, "state": state}
    about["sha256"] = _digest(tensors, about)
    with atomic(path) as file:
        # One entry of metadata: safetensors writes several in an order that differs from process to process.
        file.write(serialise(tensors, {"em3": json.dumps(about)}))


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill ``model`` (and ``optimizer``, and torch's random state) from a file of :func:`save`; returns its ``state``.

    Raises:
        CheckpointError: not a checkpoint, truncated or damaged, of a newer format, or of another configuration.
        OSError: if there is no such file.
    """
    tensors, state = read(path)
    ours = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    expected = model.state_dict()
    for name in sorted(expected.keys() | ours.keys()):
        was, must = ours.get(name), expected.get(name)
        if was is None or must is None or was.shape != must.shape:
            shapes = ["absent" if t is None else str(list(t.shape)) for t in (was, must)]
            raise CheckpointError(
                f"{path}: is of another configuration: {name} is {shapes[0]} in the file and {shapes[1]} in this model"
            )
    model.load_state_dict(ours)
    if optimizer is not None:
        if "random" not in tensors:
            raise CheckpointError(f"{path}: holds no optimizer to go on with; only last.safetensors does")
        _restore_optimizer(optimizer, tensors)
        torch.set_rng_state(tensors["random"])
    return state


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, and its ``state``; raises as :func:`load`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("em3", "{}"))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError) as error:  # ValueError: metadata that are no JSON
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from None
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a checkpoint of em3")
    if about.get("version", 0) > VERSION:
        raise CheckpointError(f"{path}: has format version {about['version']}, this em3 reads up to {VERSION}")
    if about.pop("sha256", None) != _digest(tensors, about):
        raise CheckpointError(f"{path}: is damaged, its checksum does not fit")
    return tensors, about["state"]


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Of the tensors and of what is said about them: a step that is off by a bit would train on from there."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The tensors go in; learning rates follow from the step and are not kept."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            number, _, entry = name.removeprefix("optimizer.").partition(".")
            state.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
