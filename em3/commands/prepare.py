"""What the commands that train do first."""

from __future__ import annotations


def prepare_to_train(threads: int | None) -> None:
    """Set torch's threads, unless None, and keep memory from step to step.

    Raises:
        ConfigError: a number of threads below 1.
    """
    import torch

    from ..train.allocator import keep_freed_memory
    from ..train.config import ConfigError

    keep_freed_memory()
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"--threads: was {threads}, must be at least 1")
    torch.set_num_threads(threads)
