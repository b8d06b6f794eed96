"""``LoRALinear``: the parameters of a linear layer and of its low-rank adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear


class LoRALinear(nn.Module):
    """A linear layer with one low-rank adapter, or with ``G`` of which each row of a batch uses one.

    Starts as the linear layer alone: ``lora_b`` is zero. Adapters of unequal rank are padded with zeros to ``rank``.

    Args:
        in_features, out_features: ``C`` and ``D``.
        rank: ``R``, at least 1.
        alpha: the update is scaled by ``alpha / rank``, with ``use_rslora`` by ``alpha / sqrt(rank)``.
        num_adapters: ``G``, or None for one adapter that serves every row.
        bias: whether the linear layer has a bias.
        use_rslora: see ``alpha``.
        dropout: of what the adapter sees of the input, in training; PEFT's ``lora_dropout``.
        train_base: whether the weight and bias of the linear layer are trained.
        backend: as in :func:`em3.ops.lora_linear`.
        device, dtype: of the parameters.

    Source: LoRA (Hu et al., arXiv 2106.09685); ``use_rslora``: Kalajdzievski, arXiv 2312.03732. Names and starting
    values are those of PEFT.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, alpha: float = 8.0,
                 num_adapters: int | None = None, bias: bool = True, use_rslora: bool = False, dropout: float = 0.0,
                 train_base: bool = False, backend: str | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(base, rank, alpha, num_adapters, use_rslora, dropout, train_base, backend)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, *, alpha: float = 8.0, num_adapters: int | None = None,
                    use_rslora: bool = False, dropout: float = 0.0, train_base: bool = False,
                    backend: str | None = None) -> LoRALinear:  # fmt: skip
        """Around an existing layer, whose weight and bias are taken over, not copied, and frozen or trained as asked."""
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: was {type(linear).__name__}, must be torch.nn.Linear")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(linear, rank, alpha, num_adapters, use_rslora, dropout, train_base, backend)
        return layer

    def _set_up(self, base: nn.Linear, rank: int, alpha: float, num_adapters: int | None, use_rslora: bool,
                dropout: float, train_base: bool, backend: str | None) -> None:  # fmt: skip
        if rank < 1:
            raise ValueError(f"rank: was {rank}, must be at least 1")
        if num_adapters is not None and num_adapters < 1:
            raise ValueError(f"num_adapters: was {num_adapters}, must be at least 1, or None")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: was {dropout}, must be a probability from 0 to 1")
        self.rank, self.alpha, self.num_adapters, self.use_rslora = rank, alpha, num_adapters, use_rslora
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout, self.backend = dropout, backend
        self.weight = base.weight.requires_grad_(train_base)
        self.bias = None if base.bias is None else base.bias.requires_grad_(train_base)
        adapters = () if num_adapters is None else (num_adapters,)
        d, c = base.weight.shape
        self.lora_a = nn.Parameter(base.weight.new_empty(*adapters, rank, c))
        self.lora_b = nn.Parameter(base.weight.new_empty(*adapters, d, rank))
        self.reset_lora()

    def reset_lora(self) -> None:
        """The adapters as PEFT starts them; the linear layer stays as it is."""
        with torch.no_grad():
            for a in self.lora_a.view(-1, *self.lora_a.shape[-2:]):
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor, adapter: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """``x [..., C]``, ``adapter`` and ``offsets`` as in the operation -> ``[..., D]``."""
        return lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b,
            scaling=self.scaling, adapter=adapter, offsets=offsets, dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        d, c = self.weight.shape
        return (
            f"in_features={c}, out_features={d}, rank={self.rank}, alpha={self.alpha}, "
            f"num_adapters={self.num_adapters}, bias={self.bias is not None}, use_rslora={self.use_rslora}, "
            f"dropout={self.dropout}"
        )
