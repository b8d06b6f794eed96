"""The Triton kernels under Triton's interpreter, which must be asked for before Triton is imported: another process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import em3
from em3.backends import triton
from em3.backends.triton import qformer_attention as backend
from tests import oracle
from tests.ops.test_qformer_attention import make, op

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# The first three are replaced by properties*.py; the others take minutes, are torch's concern rather than the kernels', or
# do with infinity what a test beside them does with NaN.
LEFT_OUT = (
    "matches_the_reference or matches_reference or lora_linear and (same_bits or peft) or half_types or real_ or compile"
    " or opcheck and True or inf and not inference"
)


OPS = ("qformer_attention", "lora_linear", "lora_target_attention", "contrastive_loss", "contrastive_sigmoid")


@needs_triton
@pytest.mark.parametrize("words", [
    [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "kernels").glob("properties*.py"))],
    [*(f"tests/ops/test_{op}.py" for op in OPS), "-k", f"triton and not ({LEFT_OUT})"],
], ids=["properties", "operations"])  # fmt: skip
def test_under_the_interpreter(words):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "tests.kernels.interpreter", *words]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_without_a_gpu_it_says_why_it_cannot_serve():
    args = oracle.convert(make(2, 3, 2, 8, [16], [[4, 5]]), torch.float32)
    with pytest.raises(em3.BackendError, match=r"'triton' cannot serve this call of qformer_attention: (no GPU|triton is not)"):
        op("absorb", "triton")(**args)
    assert triton.unavailable()
    op("absorb", "auto")(**args)


def test_items_too_far_apart_for_32_bits_are_refused():
    far, near = (torch.empty(2, n, 8, device="meta") for n in (2**28, 2**28 - 1))
    rows = torch.empty(1, 1, 1, 8, device="meta")
    why = [backend.supports([rows], None, [rows], [x], [None], [None], 2) for x in (far, near)]
    assert why[0] == "it reads padded tokens whose items lie less than 2147483648 elements apart; make them jagged"
    assert "are on meta" in why[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_tensors_on_the_cpu_are_refused():
    args = oracle.convert(make(2, 3, 2, 8, [16], [[4, 5]]), torch.float32)
    with pytest.raises(em3.BackendError, match="it computes on CUDA GPUs and the tensors are on cpu"):
        op("absorb", "triton")(**args)
