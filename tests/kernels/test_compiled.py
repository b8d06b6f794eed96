"""The Triton kernels compiled for GPUs that need not be here; ``make kernels`` compiles every tile of the tables."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from em3.backends.triton import lora_linear
from tests.kernels import compiled

WIDEST = 512  # columns of bf16 tokens, the heaviest use of registers in that table
CASES = [
    *(case for case in compiled.qformer((torch.bfloat16,)) if case.tile.width == case.tile.chunk == WIDEST),
    *(case for case in compiled.qformer((torch.bfloat16,), per_item=True, tokens="looked up", bank=torch.float32)
      if case.tile.width == case.tile.chunk == WIDEST and case.target == 80 and case.kernel == "forward"),
    *(case for case in compiled.qformer((torch.bfloat16,), per_item=True, tokens="looked up", bank=torch.float32, biased=True, span=4)
      if case.tile.width == case.tile.chunk == WIDEST and case.target == 90),
    *(case for case in compiled.adapters((torch.bfloat16,), forms="backward", ranks=(128,), dropped=True) if case.target == 80),
    *(case for case in compiled.contrast() if case.tile.width == case.tile.chunk == 128 and case.target == 90),
    *(case for case in compiled.contrast(kind="sigmoid", positive=True) if case.tile.width == case.tile.chunk == 128 and case.target == 80),
]  # fmt: skip
TABLES = [
    *(pytest.param(compiled.qformer_attention, name, rows, id=f"{name}, {kind}")
      for name, kinds in compiled.table("qformer_attention").items() if name in compiled.QFORMER for kind, rows in kinds.items()),
    *(pytest.param(compiled.contrastive_loss, name, rows, id=f"{op}, {name}, sm_{target}") for op in ("contrastive_loss", "contrastive_sigmoid")
      for target in compiled.TARGETS for name, rows in compiled.table(op)[f"sm_{target}"].items()),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-sm_{case.target}-{case.words}")
def test_nothing_is_spilled(case, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    taken = compiled.taken(case)
    assert taken.stack == 0
    assert taken.shared <= case.shared


@pytest.mark.parametrize(("module", "kernel", "rows"), TABLES)
def test_the_tables_serve_every_width(module, kernel, rows):
    widths = [up_to for up_to, *_ in rows]
    assert widths[-1] is None, "no tile for wide rows"
    assert widths[:-1] == sorted(widths[:-1])
    for up_to, *numbers in rows:
        tile = module.Config(*numbers)
        if tile.chunk == tile.width:
            assert up_to is not None
            assert up_to <= tile.width, "a tile that is read once must hold all columns"
        assert tile.width % tile.chunk == 0
        assert min(tile[:2]) >= 16, "the smallest product of tensor cores"
        assert tile.chunk >= 16


@pytest.mark.parametrize(("kernel", "kind"), [(k, kind) for k, kinds in compiled.table("lora_linear").items() if k in compiled.ADAPTERS for kind in kinds])
def test_the_tiles_of_adapters_serve_every_rank(kernel, kind):
    rows = compiled.table("lora_linear")[kernel][kind]
    ranks = [up_to for up_to, *_ in rows]
    assert ranks == sorted(ranks)
    assert ranks[-1] == lora_linear._RANK
    assert all(min(numbers[:2]) >= 16 for _, *numbers in rows), "the smallest product of tensor cores"
