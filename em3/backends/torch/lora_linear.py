"""A linear layer with low-rank adapters in plain PyTorch.

The contract of ``forward`` and ``backward`` is that of ``em3.ops.lora_linear``; ``T`` rows, and from here on ``B`` is
held scaled and transposed, ``[R, D]``, so that both factors look alike. Three products make up the low-rank part and
its gradients: ``shrink`` (``[T, C]`` by ``[R, C]`` -> ``[T, R]``), ``expand_`` (``[T, R]`` by ``[R, D]``, added to
``[T, D]``) and ``collect`` (``[T, R]^T [T, C]`` -> ``[R, C]``), each for one shared adapter or for one a row. They
compute in float32 for the half types.

Under dropout a copy of x that is dropped takes x's place before the adapters, in ``shrink`` and ``collect``.

No Python loop over adapters, and nothing waits for the device. On the CPU the same inputs give the same bits. On a GPU
``collect`` adds its tiles with ``index_add_``, which is deterministic under ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._dropout import Dropout
from ...tuning import decide, silent

# Elements of a temporary, 4 MiB in float32: memory beyond the results does not grow with the rows. 1, 2, 4 and 8 MiB
# took 5.9, 4.3, 4.2 and 4.3 ms in `Mixed.collect` (T=8192, C=512, G=64, R=8), 4.0, 3.7, 3.5 and 3.3 ms in `shrink`.
CHUNK = 1 << 20
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Rows from which one adapter is added to the weight. Time of the separate products over that of the merged one,
# forward and backward with x's gradient, float32, 2 threads, at T = 256, 512, 1024, 4096:
#   C=D=512, R=8: 0.76 0.75 1.01 1.05   C=256, D=64, R=8: 0.90 1.00 1.06 1.15   C=D=64, R=8: 0.96 1.02 1.09 1.20
#   C=D=512, R=64: 0.95 1.04 1.11 1.19  C=D=1024, R=64: 0.89 0.96 1.01 1.09     C=D=2048, R=8: 0.87 0.94 1.01 1.02
# The forward alone, and with a trained weight (whose gradient then yields the adapter's), cross at the same place.
MERGE_ROWS = 1024


def unavailable() -> str | None:
    return None


def supports(*args: object) -> str | None:
    return None


def wins(*args: object) -> bool:
    return True


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
            scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None,
            drop: Dropout | None = None) -> Tensor:  # fmt: skip
    if merges(x, weight, lora_a, drop, MERGE_ROWS):
        return F.linear(x, merged(weight, lora_a, lora_b, scaling), bias)
    a, b = _factors(lora_a, lora_b, scaling, scalings)
    rows = _rows(a, adapter, offsets, x)
    y = F.linear(x, weight, bias)  # [T, D]
    rows.expand_(y, rows.shrink(_dropped(x, drop), a), b)
    return y


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
             scalings: Tensor | None, adapter: Tensor | None, offsets: Tensor | None, drop: Dropout | None, need: list[bool],
             ) -> Gradients:  # fmt: skip
    """Gradients to x, weight, bias, lora_a and lora_b where needed."""
    need_x, need_weight, _, need_a, need_b = need
    a, b = _factors(lora_a, lora_b, scaling, scalings)
    merging = merges(dy, weight, lora_a, drop, MERGE_ROWS)
    rows = _rows(a, adapter, offsets, dy)
    da: Tensor | None = None
    db: Tensor | None = None
    dx, dweight, dbias = of_layer(dy, x, merged(weight, lora_a, lora_b, scaling) if merging and need_x else weight, need)
    # With the weight's gradient at hand the adapter's follow from it, without another pass over the rows.
    thin = not (merging and need_weight)
    if (dx is not None and not merging) or (need_a and thin):
        dlow = rows.shrink(dy, b)  # [T, R]
    if dx is not None and not merging and drop is None:
        rows.expand_(dx, dlow, a)
    elif dx is not None and not merging:
        low_rank = dlow.new_zeros(dx.shape)
        rows.expand_(low_rank, dlow, a)
        dx += _dropped(low_rank, drop)
    if dweight is not None and merging:
        da = b @ dweight if need_a else None
        db = a @ dweight.t() if need_b else None
    elif x is not None and (need_a or need_b):
        x = _dropped(x, drop)
        da = rows.collect(dlow, x) if need_a else None
        db = rows.collect(rows.shrink(x, a), dy) if need_b else None  # [R, D] or [G, R, D]
    if da is not None:
        da = da.to(lora_a.dtype)
    if db is not None:
        db = db.mul_(_of_adapters(scaling, scalings, db.dtype)).transpose(-1, -2).to(lora_b.dtype).contiguous()
    return dx, dweight, dbias, da, db


def of_layer(dy: Tensor, x: Tensor | None, weight: Tensor,
             need: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of a linear layer without adapters to x ``[T, C]``, weight ``[D, C]`` and bias ``[D]`` where needed."""
    need_x, need_weight, need_bias, *_ = need
    return (
        dy @ weight if need_x else None, dy.t() @ x if need_weight and x is not None else None, dy.sum(0) if need_bias else None,
    )  # fmt: skip


def _factors(lora_a: Tensor, lora_b: Tensor, scaling: float, scalings: Tensor | None) -> tuple[Tensor, Tensor]:
    """``A [R, C]`` and scaled ``B^T [R, D]``, or ``[G, R, C]`` and ``[G, R, D]``, in the dtype of the computation."""
    dtype = torch.float64 if lora_a.dtype == torch.float64 else torch.float32
    b = lora_b.to(dtype).transpose(-1, -2) * _of_adapters(scaling, scalings, dtype)
    return lora_a.to(dtype).contiguous(), b.contiguous()


def _of_adapters(scaling: float, scalings: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    return scaling if scalings is None else scalings.to(dtype)[:, None, None]


def merges(x: Tensor, weight: Tensor, lora_a: Tensor, drop: Dropout | None, least: float) -> bool:
    """Whether one product with ``W + B A`` serves: one adapter that sees x as it is, and at least ``least`` rows.

    Never in the half types, where the sum would round small updates away.
    """
    if lora_a.dim() != 2 or x.dtype not in (torch.float32, torch.float64) or drop is not None:
        return False
    model = "merged" if x.shape[0] >= least else "separate"
    if silent(x.device):
        return model == "merged"
    return decide("lora_linear.form", x, "", (x.shape[0], *weight.shape, lora_a.shape[0]), model) == "merged"


def enough(weight: Tensor) -> float:
    """Rows from which the sum ``W + B A`` costs fewer multiply-adds than the low-rank products with the rows."""
    d, c = weight.shape
    return c * d / (c + d)


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(weight, lora_b, lora_a, alpha=scaling)


def _dropped(x: Tensor, drop: Dropout | None) -> Tensor:
    """What the adapter sees of x: under dropout a copy, in float32 for the half types. Of its gradient likewise."""
    if drop is None:
        return x
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, dtype=dtype)
    for span in _spans(*x.shape):
        rows = torch.arange(span.start, min(span.stop, x.shape[0]), device=x.device)
        torch.mul(x[span], drop.factors(0, rows[None], x.shape[1], dtype)[0].t(), out=out[span])
    return out


def _spans(count: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(width, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _rows(a: Tensor, adapter: Tensor | None, offsets: Tensor | None, x: Tensor) -> Shared | Mixed:
    if a.dim() == 2:
        return Shared()
    g = a.shape[0]
    if adapter is None:
        assert offsets is not None
        # The last adapter that begins at or before the row: empty segments are stepped over, the tail gets G.
        places = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        adapter = torch.searchsorted(offsets, places, right=True) - 1
    adapter = adapter.long()
    return Mixed(torch.where((adapter < 0) | (adapter >= g), g, adapter), g)


class Shared:
    """One adapter for all rows. The half types go through float32 a chunk of rows at a time."""

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        if x.dtype == a.dtype:
            return x @ a.t()
        low = a.new_empty(x.shape[0], a.shape[0])
        for span in _spans(*x.shape):
            low[span] = x[span].to(a.dtype) @ a.t()
        return low

    def expand_(self, y: Tensor, low: Tensor, b: Tensor) -> None:
        if y.dtype == b.dtype:
            y.addmm_(low, b)
            return
        for span in _spans(*y.shape):
            y[span] += low[span] @ b

    def collect(self, low: Tensor, x: Tensor) -> Tensor:
        if x.dtype == low.dtype:
            return _tall(low, x)
        out = low.new_zeros(low.shape[1], x.shape[1])
        for span in _spans(*x.shape):
            out += _tall(low[span], x[span].to(low.dtype))
        return out


def _tall(low: Tensor, x: Tensor) -> Tensor:
    """``low^T x`` where the rows are many and the result is small.

    On the CPU in blocks of rows: one product would be cut along ``R``, which is too small for it, and takes twice as
    long (2 threads, float32, ms: T=8192, C=512, R=8: 2.9 against 1.6; T=16384, C=256, R=8: 3.1 against 1.7).
    """
    t, r = low.shape
    size = max(256, t // 64)
    count = t // size
    if count < 2 or x.device.type != "cpu":
        return low.t() @ x
    cut = count * size
    blocks = torch.bmm(low[:cut].view(count, size, r).transpose(1, 2), x[:cut].reshape(count, size, -1))
    return blocks.sum(0).addmm_(low[cut:].t(), x[cut:])


class Mixed:
    """One adapter a row, ``adapter [T]`` holding ``0 .. G - 1``, and ``G`` for none.

    ``expand_`` is an embedding bag: a row's result is the sum of its adapter's ``R`` rows of B, weighted. ``shrink``
    is the gradient of such a bag to its weights where R is small, and a product a tile where it is not; ``collect``
    is a product a tile. A tile is ``m`` rows of one adapter, cut from the rows sorted by adapter; their number has
    a bound that needs no look at the indices, ``T / m + G``.

    Measured, float32, 2 threads, C = D, ms a call (a bag's ``collect``: 5 to 12 at R=8, 38 to 110 at R=64)::

        T, C, G, R          shrink: bag  tiles   expand_: bag  tiles   collect: tiles
        8192, 512, 64, 8            3.5    4.6            2.7    6.5              4.2
        8192, 512, 64, 64            16     15             12     12               12
        8192, 512, 512, 64           31     49             33                      55
        16384, 128, 4, 64            19      6              5      5                9
        16384, 128, 64, 32           10      7              3      4                4
        16384, 128, 64, 8           2.1    2.7            1.3    3.3              1.9
    """

    def __init__(self, adapter: Tensor, g: int) -> None:
        self.adapter, self.g = adapter, g
        self.absent = (adapter == g)[:, None]  # [T, 1]
        # A look that costs nothing on the CPU and would wait for the device elsewhere.
        self.complete = adapter.device.type == "cpu" and not bool(self.absent.any())
        self.cut: tuple[Tensor, Tensor, Tensor] | None = None

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        g, r, c = a.shape
        t = x.shape[0]
        model = "tiles" if r >= 32 and t >= 32 * g else "bags"  # the table above
        if decide("lora_linear.shrink", x, "", (t, c, g, r), model) == "tiles":
            return self._shrink_tiles(x, a)
        low = a.new_empty(t, r)  # of a row without adapter: some adapter's; expand_ and collect leave it out
        for span in _spans(t, c):
            bags = self._bags(span, r)
            first = torch.arange(0, bags.numel(), r, device=x.device)  # where each row's bag begins
            row = torch.arange(bags.shape[0], device=x.device).repeat_interleave(r, output_size=bags.numel())
            low[span] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                x[span].to(a.dtype).contiguous(), a.view(g * r, c), bags.view(-1), first, row, 0
            ).view(-1, r)
        return low

    def expand_(self, y: Tensor, low: Tensor, b: Tensor) -> None:
        g, r, d = b.shape
        for span in _spans(*y.shape):
            delta = F.embedding_bag(self._bags(span, r), b.view(g * r, d), per_sample_weights=low[span], mode="sum")
            if not self.complete:
                delta.masked_fill_(self.absent[span], 0)
            y[span] += delta

    def collect(self, low: Tensor, x: Tensor) -> Tensor:
        out = low.new_zeros(self.g + 1, low.shape[1], x.shape[1])  # [G + 1, R, C], the last for tiles without rows
        rows, present, owner = self._tiles()
        for span in _spans(rows.shape[0], (rows.shape[1] + low.shape[1]) * x.shape[1]):
            left = _gather(low, rows[span]).masked_fill_(~present[span], 0)  # [n, m, R]
            out.index_add_(0, owner[span], torch.bmm(left.transpose(1, 2), _gather(x, rows[span]).to(low.dtype)))
        return out[:-1]

    def _shrink_tiles(self, x: Tensor, a: Tensor) -> Tensor:
        t, r = x.shape[0], a.shape[1]
        out = a.new_zeros(t + 1, r)  # the last row takes what is not present
        rows, present, owner = self._tiles()
        for span in _spans(rows.shape[0], (rows.shape[1] + r) * x.shape[1]):
            factors = a.index_select(0, owner[span].clamp(max=self.g - 1))  # [n, R, C]
            low = torch.bmm(_gather(x, rows[span]).to(a.dtype), factors.transpose(1, 2))  # [n, m, R]
            out.index_copy_(0, rows[span].masked_fill(~present[span][..., 0], t).view(-1), low.view(-1, r))
        return out[:-1]

    def _bags(self, span: slice, r: int) -> Tensor:
        """Rows of the stacked factors ``[G * R, .]`` that each row reads, ``[n, R]``; some adapter's where it has none."""
        return self.adapter[span].clamp(max=self.g - 1)[:, None] * r + torch.arange(r, device=self.adapter.device)

    def _tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """``rows [n, m]``, ``present [n, m, 1]`` and each tile's adapter ``[n]``, which is G for a tile without rows."""
        if self.cut is None:
            self.cut = self._cut()
        return self.cut

    def _cut(self) -> tuple[Tensor, Tensor, Tensor]:
        t, g, device = self.adapter.shape[0], self.g, self.adapter.device
        m = min(64, max(8, 1 << (t // g).bit_length() - 1 if t >= g else 8))
        ordered, order = torch.sort(self.adapter, stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(g + 1, device=device))  # [G + 1]
        tiles = (bounds[1:] - bounds[:-1] + m - 1) // m  # [G]
        ends = tiles.cumsum(0)
        index = torch.arange(min(t // m + g, t), device=device)  # [n]
        owner = torch.searchsorted(ends, index, right=True)
        near = owner.clamp(max=g - 1)
        first = bounds[near] + (index - (ends - tiles)[near]) * m
        place = first[:, None] + torch.arange(m, device=device)  # [n, m], in the sorted rows
        end = bounds[near + 1, None]
        present = (place < end) & (owner < g)[:, None]
        # What fills a tile up is a row of the same adapter, so that no adapter's NaN gets into another's gradient.
        return order[place.minimum(end - 1).clamp_(min=0)], present[..., None], owner


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``x [T, C]``, ``rows [n, m]`` -> ``[n, m, C]``."""
    return x.index_select(0, rows.view(-1)).view(*rows.shape, x.shape[1])
