"""Run by .ci/run in an installed environment, outside the checkout: `python smoke.py cpp|torch`.

The argument is the backend that must serve qformer_attention there. The numbers must be the reference's.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch

import em3
from em3.ops import _dispatch
from em3.reference.qformer_attention import qformer_attention as reference


def check_installed_files() -> None:
    assert Path(em3.__file__).is_relative_to(sys.prefix), f"em3 comes from {em3.__file__}, not from this environment"
    files = importlib.metadata.files("em3") or []
    tops = {file.parts[0] for file in files} - {"em3", f"em3-{em3.__version__}.dist-info", ".."}
    assert files, "the installed files are not listed"
    assert not tops, f"stray top-level entries are installed: {tops}"
    for name in ("kernels", "csrc", "tests", "benchmarks"):
        assert importlib.util.find_spec(name) is None, f"a top-level package {name} is installed"
    importlib.import_module("em3.kernels")
    benchmarks = importlib.import_module("em3.benchmarks")
    assert Path(benchmarks.__file__).with_name("shapes.yaml").exists(), "the table of shapes is not installed"


def check_numbers(expected: str) -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("seed", generator.initial_seed())

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    b, n, q, d, h = 8, 64, 4, 128, 4
    tensors = [draw(q, d), draw(b, n, d), *(draw(d, d, scale=d**-0.5) for _ in range(4))]

    def call(function, arguments, **options):
        query, x, w_q, w_k, w_v, w_o = arguments
        out = function(query, [x], w_q, [w_k], [w_v], w_o, num_heads=h, **options)
        return [out, *torch.autograd.grad(out.square().sum(), arguments)]

    usable = [name for op, name, reason in _dispatch.report() if op == "qformer_attention" and reason is None]
    assert usable[0] == expected, f"the first usable backend is {usable[0]}, not {expected}"
    want = call(reference, [t.detach().double().requires_grad_() for t in tensors])
    for backend in (expected, "auto"):
        got = call(em3.ops.qformer_attention, tensors, backend=backend)
        errors = [float((g - w).detach().norm() / w.detach().norm()) for g, w in zip(got, want, strict=True)]
        assert max(errors) < 1e-5, f"{backend}: relative errors {errors}"
        print(f"qformer_attention on {backend}: largest relative error {max(errors):.1e}")


check_installed_files()
check_numbers(sys.argv[1])
