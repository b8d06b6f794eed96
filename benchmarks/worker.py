"""One side of `em3 bench compare`: a process with the em3 of one tree, which takes a step when it is told to.

It is run as a script, ``python -P worker.py TREE``: em3 comes from TREE, and the benchmarks from beside this file, so that
both sides measure the same way. Lines of JSON come in, one line goes out for each.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def load_em3(tree: Path) -> None:
    """``em3`` from a tree, and this folder as ``em3.benchmarks`` in it."""
    sys.path.insert(0, str(tree))
    import em3

    if not Path(em3.__file__).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"em3 comes from {em3.__file__}, not from {tree}")
    spec = importlib.util.spec_from_file_location("em3.benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["em3.benchmarks"] = module
    spec.loader.exec_module(module)


class Side:
    """What is measured at the moment."""

    def __init__(self) -> None:
        self.call: Any = None
        self.grad: Any = None
        self.device = "cpu"

    def prepare(self, op: str, dims: dict[str, Any], device: str, dtype: str, threads: int) -> dict[str, Any]:
        """Draws the inputs, and says what comes out, so that the sides can be held against each other."""
        import torch

        from em3.benchmarks import measure, operations, registry

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        operation = registry.OPERATIONS[op]
        inputs = operation.make(dims, device, getattr(torch, dtype))
        self.call, self.device = registry.form(operation, "em3").bind(inputs), device
        self.grad = operations.gradient(self.call.forward())
        return {"norms": [float(t.double().norm()) for t in measure.results(self.call, self.grad).values()]}

    def step(self) -> dict[str, Any]:
        """Seconds of a forward and backward on a settled heap."""
        from em3.benchmarks import measure

        measure.trim()
        measure.step(self.call, self.grad, self.device)
        return {"seconds": measure.step(self.call, self.grad, self.device)}


def main() -> None:
    load_em3(Path(sys.argv[1]))
    side = Side()
    for line in sys.stdin:
        task, arguments = json.loads(line)
        try:
            answer = getattr(side, task)(**arguments)
        except Exception as error:  # an older em3 may lack what the shape needs: the other side's process goes on
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
