"""Triton kernels compiled for GPUs that need not be here: ``python -m tests.kernels.compiled [OP]`` prints what each takes.

Exit status 1 if any tile of the tuning tables needs a stack (spilled registers lie there), or more shared memory than the
GPUs that it is for have for a program.
"""

from __future__ import annotations

import itertools
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

from em3.kernels import contrastive_loss, contrastive_sigmoid, lora_linear, qformer_attention
from em3.kernels.launch import REGISTERS, table

TARGETS = (80, 90, 100)
# Bytes of shared memory for a program. What is for all GPUs must fit in those of compute capability 8.6, 8.9 and 12.0.
SHARED, LARGE = 99 * 1024, 227 * 1024
QFORMER = {
    "forward": qformer_attention._forward,
    "query_gradient": qformer_attention._query_gradient,
    "token_gradient": qformer_attention._token_gradient,
}
CONTRAST = {
    "infonce": {"statistics": contrastive_loss._statistics, "gradient": contrastive_loss._gradient},
    "sigmoid": {"statistics": contrastive_sigmoid._sums, "gradient": contrastive_sigmoid._gradient},
}
ADAPTERS = {"low_rank": lora_linear._low_rank, "collect": lora_linear._collect, "add_up": lora_linear._add_up}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Case(NamedTuple):
    """One compilation."""

    kernel: str
    function: Any
    target: int
    tile: Any  # the kernels' Config
    types: dict[str, str]  # of the arguments; those in neither are i32
    constants: dict[str, Any]
    even: frozenset[str]  # arguments that are multiples of 16
    shared: int  # bytes that a program may take
    words: str


class Taken(NamedTuple):
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a program


def taken(case: Case) -> Taken:
    """Compiles; what the assembler says of the machine code."""
    names = case.function.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    source = ASTSource(
        case.function, signature, {(names.index(n),): value for n, value in case.constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n, type_ in signature.items() if n in case.even and type_ != "constexpr"},
    )  # fmt: skip
    options = dict(num_warps=case.tile.warps, num_stages=case.tile.stages, maxnreg=REGISTERS)
    done = triton.compile(source, target=GPUTarget("cuda", case.target, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(done.metadata_group[next(name for name in done.metadata_group if name.endswith(".cubin"))])
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", report)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return Taken(registers, stack, done.metadata.shared)


def qformer(dtypes: tuple[torch.dtype, ...] = tuple(TYPES), *, precision: str = "ieee", aligned: bool = True,
            per_item: bool = False, tokens: str = "jagged", bank: torch.dtype | None = None,
            rows: int = 2**31, biased: bool = False, span: int = 0, dropped: bool = False) -> Iterator[Case]:  # fmt: skip
    """Every tile of the table, for every target.

    ``aligned``: the kernels' UNIT is 8, and the tokens begin at a multiple of 16 bytes. ``tokens`` are ``"padded"``,
    ``"masked"``, ``"jagged"`` or ``"looked up"``, in a bank that may have a dtype of its own. ``rows`` is the most that a
    tile of the forward or the queries' gradient is left with. ``biased``: there are biases. ``span``: their gradient is
    asked for, in tiles of at most so many rows a head; only the kernel that makes it. ``dropped``: with dropout, of streams
    with value biases.
    """
    present = {"jagged": {"offsets": "*i64"}, "padded": {}, "masked": {"mask": "*u8"},
               "looked up": {"offsets": "*i64", "lookup": "*i64"}}[tokens]  # fmt: skip
    kernels = {name: function for name, function in QFORMER.items() if not span or name == "query_gradient"}
    for (name, function), dtype in itertools.product(kernels.items(), dtypes):
        token = "*" + TYPES[dtype]
        types = dict.fromkeys(("u", "x", "y", "dy", "dx"), token) | dict.fromkeys(("c", "dshift", "lse", "dc"), "*fp32")
        types |= {"du": token if per_item else "*fp32"} | present
        if tokens == "looked up":
            types |= {"x": "*" + TYPES[bank or dtype], "dx": "*fp32"}
        types |= dict.fromkeys(["bias"] * biased + ["dbias"] * (span > 0), "*fp32")
        types |= {"factor": "fp32"} | ({"seed": "*i64", "kept": "*fp32", "dmass": "*fp32"} if dropped else {})
        kind = qformer_attention.kind(dtype, aligned, tokens == "masked", tokens == "looked up", biased, dropped)
        for (_, *numbers), target in itertools.product(table("qformer_attention")[name][kind], TARGETS):
            tile = qformer_attention.Config(*numbers)
            tile = tile._replace(rows=min(tile.rows, rows)) if name != "token_gradient" else tile
            constants = dict(
                ROWS=tile.rows, TOKENS=tile.tokens, WIDTH=tile.width, CHUNK=tile.chunk, UNIT=8 if aligned else 1,
                PRECISION=precision, PER_ITEM=per_item,
            ) | dict.fromkeys({"offsets", "mask", "lookup", *["c"] * ("lookup" in present)} - set(present))  # fmt: skip
            optional = {"bias", "dbias", "seed", "kept", "dmass"}
            constants |= dict.fromkeys(optional & set(function.arg_names) - set(types))
            if name == "query_gradient":
                constants["SPAN"] = min(span, tile.rows)
            flags = [TYPES[dtype], precision, *["aligned"] * aligned, *["per_item"] * per_item, tokens]
            flags += [*["biased"] * biased, *[f"span {span}"] * (span > 0), *["dropped"] * dropped]
            flags += [] if bank is None else [f"in {TYPES[bank]}"]
            yield Case(name, function, target, tile, types, constants, frozenset(types) - {"factor", *"x" * (not aligned)}, SHARED, " ".join(flags))


def contrast(given: str = "ids offset", asked: str = "rows cols", coarse: bool = False, kind: str = "infonce",
             positive: bool = False) -> Iterator[Case]:  # fmt: skip
    """Every tile of the table, for the target that it is for. ``coarse``: one product, where TF32 is allowed. ``positive``:
    so are the pairs of an item, in the kind "sigmoid"."""
    for target, (name, function) in itertools.product(TARGETS, CONTRAST[kind].items()):
        names = set(function.arg_names)
        loose = {n: "*i32" for n in names if n.endswith("_ids")}
        loose |= {n: "*fp32" for n in names if n.endswith(("_offset", "_lse", "_grad"))}
        types = dict.fromkeys(names & {"x", "x_low", "y", "y_low", "a", "a_low", "b", "b_low"}, "*fp16")
        types |= dict.fromkeys(names & {"x_size", "y_size", "a_size", "b_size", "rows", "cols", "da", "dscale", "dbias", "doffset"}, "*fp32")
        absent = {n for n in names if n.endswith("_low")} if coarse else set()
        absent |= {n for n in names for what in ("ids", "offset") if n.endswith(what) and what not in given}
        absent |= {n for way, words in (("rows", ("rows", "a_lse", "a_grad")), ("cols", ("cols", "b_lse", "b_grad")))
                   for n in words if n in names and way not in asked}  # fmt: skip
        tiles = table(f"contrastive_{'sigmoid' if kind == 'sigmoid' else 'loss'}")[f"sm_{target}"]
        for _, *numbers in tiles[f"{name}_positive" if positive and name == "gradient" else name]:
            tile = contrastive_loss.Config(*numbers)
            constants = dict(ROWS=tile.rows, COLS=tile.cols, WIDTH=tile.width, CHUNK=tile.chunk, OWN=True) | dict.fromkeys(absent)
            constants |= {"POSITIVE": positive} if kind == "sigmoid" else {}
            words = f"{'tf32' if coarse else 'float32'} {kind}{', positives' * positive}, {given or 'plain'}, {asked}"
            yield Case(name, function, target, tile, types | loose | {"scale": "*fp64", "bias": "*fp64"}, constants,
                       frozenset(types) | {"V"}, SHARED if target == 80 else LARGE, words)  # fmt: skip


def splitting() -> Iterator[Case]:
    """The vectors of ``contrastive_loss`` may lie anywhere."""
    types = {"x": "*fp32", "high": "*fp16", "low": "*fp16", "size": "*fp32"}
    tile = contrastive_loss.SPLIT
    for target in TARGETS:
        constants = dict(ROWS=tile.rows, WIDTH=tile.width)
        yield Case("split", contrastive_loss._split, target, tile, types, constants, frozenset({"high", "low", "size", "V"}), SHARED, "")


def adapters(dtypes: tuple[torch.dtype, ...] = tuple(TYPES), *, forms: str = "forward backward collect", ranks: tuple[int, ...] = (8, 16, 32, 64, 128),
             mixed: bool = True, dropped: bool = False, precision: str = "ieee", rows: int = 2**31, odd: bool = False) -> Iterator[Case]:  # fmt: skip
    """The tiles for these ranks, for every target. ``rows``: the most that a tile is left with. ``odd``: widths that 16 does not divide."""
    for form, dtype, r, target in itertools.product(forms.split(), dtypes, ranks, TARGETS):
        name = {"forward": "low_rank", "backward": "low_rank"}.get(form, form)
        function = ADAPTERS[name]
        row, factor = "*" + TYPES[dtype], "*fp32"
        types = dict.fromkeys(("x", "y", "first_factor", "second_factor", "out"), row) | dict.fromkeys(("low", "sums"), factor)
        types |= {"scaling": "fp32", "kept": "fp32"}
        types |= {"order": "*i64", "bounds": "*i32", "scalings": "*fp32"} if mixed else {}
        types |= {"seed": "*i64"} if dropped else {}
        tile = lora_linear.config("collect" if name == "add_up" else name, dtype, r, not odd)
        tile = tile._replace(rows=min(tile.rows, rows)) if name == "low_rank" else tile
        constants = dict(R=r, RANK=lora_linear.rank(r), ROWS=tile.rows, WIDTH=tile.width, GROUPS=64 if mixed else 1, PRECISION=precision,
                         TURNED=form == "backward", BEHIND=form == "backward")  # fmt: skip
        constants |= dict.fromkeys({"order", "bounds", "scalings", "seed"} - set(types)) | ({"low": None} if form == "forward" else {})
        names = set(function.arg_names)
        even = set() if odd else {"x", "y", "first_factor", "second_factor", "out", "low", "sums", "order", "C", "D", "stride"}
        words = [TYPES[dtype], f"rank {r}", form, *["mixed"] * mixed, *["dropped"] * dropped, precision, *["odd"] * odd]
        yield Case(name, function, target, tile, types, {n: v for n, v in constants.items() if n in names}, frozenset(even & names), SHARED,
                   " ".join(words))  # fmt: skip


def cases(op: str) -> Iterator[Case]:
    half, full = (torch.bfloat16,), (torch.float32,)
    if op == "qformer_attention":
        yield from qformer()
        yield from qformer(half, tokens="masked")
        yield from qformer(half, per_item=True, tokens="padded")
        yield from qformer(full, per_item=True, tokens="masked")
        yield from qformer(full, precision="tf32", tokens="masked")
        yield from qformer(half, aligned=False, tokens="masked")
        yield from qformer(full, aligned=False, tokens="masked")
        yield from qformer(full, aligned=False, precision="tf32")
        for dtypes, aligned in itertools.product((half, full), (True, False)):
            yield from qformer(dtypes, aligned=aligned, dropped=True)
        yield from qformer(half, tokens="masked", dropped=True)
        yield from qformer(full, precision="tf32", dropped=True)
    if op == "lora_target_attention":
        yield from qformer(half, per_item=True, tokens="looked up")
        yield from qformer(half, per_item=True, tokens="looked up", bank=torch.float32)
        yield from qformer(full, per_item=True, tokens="looked up")
        yield from qformer(full, per_item=True, tokens="looked up", rows=4)
        yield from qformer(full, per_item=True, tokens="looked up", rows=8)
        yield from qformer(full, per_item=True, tokens="looked up", bank=torch.bfloat16, rows=4)
        yield from qformer(full, per_item=True, tokens="looked up", precision="tf32")
        yield from qformer(half, per_item=True, tokens="looked up", aligned=False)
        yield from qformer(full, per_item=True, tokens="looked up", aligned=False)
        for dtypes, aligned in itertools.product((half, full), (True, False)):
            yield from qformer(dtypes, per_item=True, tokens="looked up", aligned=aligned, biased=True)
            for span in (1, 4, 16):
                yield from qformer(dtypes, per_item=True, tokens="looked up", aligned=aligned, biased=True, span=span)
        for span in (0, 1, 4, 16):
            yield from qformer(half, per_item=True, tokens="looked up", bank=torch.float32, biased=True, span=span)
        yield from qformer(full, per_item=True, tokens="looked up", biased=True, rows=4)
        yield from qformer(full, per_item=True, tokens="looked up", biased=True, span=1, rows=4)
        yield from qformer(full, per_item=True, tokens="looked up", biased=True, precision="tf32")
        yield from qformer(full, per_item=True, tokens="looked up", biased=True, span=1, precision="tf32")
    if op == "contrastive_loss":
        yield from contrast()
        yield from contrast(given="")
        yield from contrast(coarse=True)
        yield from contrast(given="", asked="rows", coarse=True)
        yield from splitting()
    if op == "contrastive_sigmoid":
        yield from contrast(kind="sigmoid")
        yield from contrast(kind="sigmoid", positive=True)
        yield from contrast(kind="sigmoid", given="")
        yield from contrast(kind="sigmoid", given="ids", positive=True)
        yield from contrast(kind="sigmoid", coarse=True)
        yield from contrast(kind="sigmoid", given="", asked="rows", coarse=True)
    if op == "lora_linear":
        yield from adapters()
        yield from adapters((*half, *full), dropped=True)
        yield from adapters(half, mixed=False)
        yield from adapters(full, precision="tf32")
        yield from adapters((*half, *full), odd=True, ranks=(5, 24, 77))
        yield from adapters((*half, *full), ranks=(5, 77))
        yield from adapters((*half, *full), forms="forward backward", rows=16)
        yield from adapters((*half, *full), forms="add_up")


OPS = ("qformer_attention", "lora_linear", "lora_target_attention", "contrastive_loss", "contrastive_sigmoid")


def main(ops: list[str]) -> int:
    every = [case for op in ops or OPS for case in cases(op)]
    failed = 0
    for case in every:
        got = taken(case)
        bad = got.stack > 0 or got.shared > case.shared
        failed += bad
        tile = "x".join(map(str, case.tile))
        print(f"{case.kernel:<16}sm_{case.target:<5}{tile:<24}{got.registers:>4} registers{got.stack:>6} B stack"
              f"{got.shared:>8} B shared  {case.words}{'  BAD' if bad else ''}", flush=True)  # fmt: skip
    print(f"{len(every)} compiled, {failed} bad")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
