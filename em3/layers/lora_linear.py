"""``LoRALinear``: the parameters of a linear layer and of its low-rank adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import _checks
from ..ops.lora_linear import lora_linear
from . import _given


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
        _given.size("in_features", in_features)
        _given.size("out_features", out_features)
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(base, rank, alpha, num_adapters, use_rslora, dropout, train_base, backend)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, *, alpha: float = 8.0, num_adapters: int | None = None,
                    use_rslora: bool = False, dropout: float = 0.0, train_base: bool = False,
                    backend: str | None = None) -> LoRALinear:  # fmt: skip
        """Around an existing layer, whose weight and bias are taken over, not copied, and frozen or trained as asked."""
        why = _given.not_plain(linear)
        if why is not None:
            raise ValueError(f"linear: {why}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(linear, rank, alpha, num_adapters, use_rslora, dropout, train_base, backend)
        return layer

    def _set_up(self, base: nn.Linear, rank: int, alpha: float, num_adapters: int | None, use_rslora: bool,
                dropout: float, train_base: bool, backend: str | None) -> None:  # fmt: skip
        _given.size("rank", rank)
        if num_adapters is not None:
            _given.size("num_adapters", num_adapters)
        _given.number("alpha", alpha)
        _checks.probability(dropout, "dropout")
        _given.choices("auto", backend)
        alpha = alpha if isinstance(alpha, (int, float)) else float(alpha)  # what JSON can hold
        self.rank, self.alpha, self.num_adapters, self.use_rslora = int(rank), alpha, num_adapters, use_rslora
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
        self._check(x, adapter, offsets)
        return lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b,
            scaling=self.scaling, adapter=adapter, offsets=offsets, dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )  # fmt: skip

    def _check(self, x: Tensor, adapter: Tensor | None, offsets: Tensor | None) -> None:
        _given.tensor(x, "x", self.weight.shape[1], "in_features", self.weight)
        given = [name for name, value in (("adapter", adapter), ("offsets", offsets)) if value is not None]
        if self.num_adapters is None and given:
            raise ValueError(f"{given[0]}: was given, must be None, for the layer has one adapter for all rows; one made with "
                             "num_adapters=G has one for each row to choose")  # fmt: skip
        if self.num_adapters is not None and len(given) != 1:
            was = "both were given" if given else "neither was given"
            raise ValueError(
                f"adapter, offsets: {was}, exactly one must be, for the layer has num_adapters={self.num_adapters}: adapter "
                f"{list(x.shape[:-1])}, the number of each row's (-1 for none), or offsets [{self.num_adapters + 1}], where each "
                "one's rows begin; num_adapters=None makes one for all rows"
            )

    def extra_repr(self) -> str:
        d, c = self.weight.shape
        return (
            f"in_features={c}, out_features={d}, rank={self.rank}, alpha={self.alpha}, "
            f"num_adapters={self.num_adapters}, bias={self.bias is not None}, use_rslora={self.use_rslora}, "
            f"dropout={self.dropout}"
        )
