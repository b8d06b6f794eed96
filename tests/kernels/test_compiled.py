"""The Triton kernels compiled for GPUs that need not be here; ``make kernels`` compiles every tile of the tables."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels import compiled

SHAPE = 512  # columns of bf16 tokens, the heaviest use of registers in the table
CASES = [
    compiled.Case(name, torch.bfloat16, tile, target)
    for name in compiled.FUNCTIONS
    for tile in compiled.tiles(name, torch.bfloat16)
    for target in compiled.TARGETS
    if tile.width == tile.chunk == SHAPE
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-sm_{case.target}")
def test_nothing_is_spilled(case, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    taken = compiled.taken(case)
    assert taken.stack == 0
    assert taken.shared <= compiled.SHARED


@pytest.mark.parametrize("kernel", compiled.FUNCTIONS)
def test_the_tables_serve_every_width(kernel):
    for kind, rows in compiled.kernels._table()[kernel].items():
        widths = [up_to for up_to, *_ in rows]
        assert widths[-1] is None, f"{kernel}, {kind}: no tile for wide tokens"
        assert widths[:-1] == sorted(widths[:-1])
        for up_to, *numbers in rows:
            tile = compiled.kernels.Config(*numbers)
            if tile.chunk == tile.width:
                assert up_to is not None
                assert up_to <= tile.width, f"{kernel}, {kind}: a tile that is read once must hold all columns"
            assert tile.width % tile.chunk == 0
            assert min(tile.rows, tile.tokens, tile.chunk) >= 16, "the smallest product of tensor cores"
