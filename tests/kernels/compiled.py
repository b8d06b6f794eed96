"""Triton kernels compiled for GPUs that need not be here: ``python -m tests.kernels.compiled`` prints what each takes.

Exit status 1 if any tile of the tuning tables needs a stack (spilled registers lie there), or more shared memory than the
smallest GPU of compute capability 8.0 and more has for a program.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from em3.kernels import qformer_attention as kernels

TARGETS = (80, 90, 100)
SHARED = 99 * 1024  # bytes; compute capability 8.6 and 8.9, 12.0. 8.0 has 163 KiB, 9.0 and 10.0 have 227
FUNCTIONS = {
    "forward": kernels._forward,
    "query_gradient": kernels._query_gradient,
    "token_gradient": kernels._token_gradient,
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Case(NamedTuple):
    """One compilation. ``aligned``: the kernels' UNIT is 8, and the tokens begin at a multiple of 16 bytes."""

    kernel: str
    dtype: torch.dtype
    tile: kernels.Config
    target: int
    precision: str = "ieee"
    aligned: bool = True
    per_item: bool = False
    tokens: str = "jagged"  # or "padded", or "masked"


class Taken(NamedTuple):
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a program


def tiles(kernel: str, dtype: torch.dtype, aligned: bool = True, tokens: str = "jagged") -> list[kernels.Config]:
    kind = kernels.kind(dtype, aligned, tokens == "masked")
    return [kernels.Config(*tile) for _, *tile in kernels._table()[kernel][kind]]


def cases(dtypes: tuple[torch.dtype, ...] = tuple(TYPES), **others: Any) -> Iterator[Case]:
    """Every tile of the tables for every target."""
    for name in FUNCTIONS:
        for dtype in dtypes:
            for tile in tiles(name, dtype, others.get("aligned", True), others.get("tokens", "jagged")):
                for target in TARGETS:
                    yield Case(name, dtype, tile, target, **others)


def taken(case: Case) -> Taken:
    """Compiles; what the assembler says of the machine code."""
    source = ASTSource(FUNCTIONS[case.kernel], *_signature(case))
    options = dict(num_warps=case.tile.warps, num_stages=case.tile.stages, maxnreg=kernels.REGISTERS)
    done = triton.compile(source, target=GPUTarget("cuda", case.target, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(done.metadata_group[next(name for name in done.metadata_group if name.endswith(".cubin"))])
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", report)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return Taken(registers, stack, done.metadata.shared)


def _signature(case: Case) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    tokens = "*" + TYPES[case.dtype]
    types = dict.fromkeys(("u", "x", "y", "dy", "dx"), tokens) | dict.fromkeys(("c", "dshift", "lse", "dc"), "*fp32")
    types["du"] = tokens if case.per_item else "*fp32"
    constants: dict[str, Any] = dict(
        ROWS=case.tile.rows, TOKENS=case.tile.tokens, WIDTH=case.tile.width, CHUNK=case.tile.chunk,
        UNIT=8 if case.aligned else 1, PRECISION=case.precision, PER_ITEM=case.per_item,
    )  # fmt: skip
    present = {"jagged": {"offsets": "*i64"}, "padded": {}, "masked": {"mask": "*u8"}}[case.tokens]
    types |= present
    constants |= dict.fromkeys({"offsets", "mask"} - set(present))
    names = FUNCTIONS[case.kernel].arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    wide = [n for n in names if n in types and (case.aligned or n != "x")]
    return (
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in wide},
    )


def main() -> int:
    failed = 0
    half, full = (torch.bfloat16,), (torch.float32,)
    every = [
        *cases(), *cases(half, tokens="masked"), *cases(half, per_item=True, tokens="padded"),
        *cases(full, per_item=True, tokens="masked"), *cases(full, precision="tf32", tokens="masked"),
        *cases(half, aligned=False, tokens="masked"), *cases(full, aligned=False, tokens="masked"),
        *cases(full, aligned=False, precision="tf32"),
    ]  # fmt: skip
    for case in every:
        got = taken(case)
        bad = got.stack > 0 or got.shared > SHARED
        failed += bad
        flags = [case.precision, *(n for n in ("aligned", "per_item") if getattr(case, n)), case.tokens]
        tile = "x".join(map(str, case.tile))
        print(f"{case.kernel:<16}{TYPES[case.dtype]} sm_{case.target:<5}{tile:<24}{got.registers:>4} registers"
              f"{got.stack:>6} B stack{got.shared:>8} B shared  {' '.join(flags)}{'  BAD' if bad else ''}", flush=True)  # fmt: skip
    print(f"{len(every)} compiled, {failed} bad")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
