"""What commands that compute do first."""

from __future__ import annotations


def set_threads(threads: int | None) -> None:
    """Of torch, unless None; ends the command for a number below 1."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise SystemExit(f"em3: --threads: was {threads}, must be at least 1")
    torch.set_num_threads(threads)


def prepare_to_train(threads: int | None) -> None:
    """Set torch's threads and keep memory from step to step."""
    from ..train.allocator import keep_freed_memory

    keep_freed_memory()
    set_threads(threads)
