"""`em3 bench`: what em3 gains on this machine, against what a user would have instead or against another revision."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .progress import Progress, complaints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "em3 bench [SUITE ...] --out DIR [options]\n       em3 bench compare REV [OPERATION ...] --out DIR [options]"
    parser.add_argument("what", nargs="*", metavar="SUITE", help="operations, overhead, end_to_end; all by default. Or the word"
                        " compare and a revision of this git checkout, to build it and measure both in turns")  # fmt: skip
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="YAML file of shapes to measure instead of em3's own")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a few shapes, no torch.compile: minutes instead of hours")
    parser.add_argument("--resume", action="store_true", help="go on with the results in the folder")
    files = "folder for results.jsonl, results.md and report.html, or for compare.jsonl and compare.md"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=files)


def run(args: argparse.Namespace) -> int:
    with complaints():
        import torch

        try:
            from em3.benchmarks import run as runs
            from em3.benchmarks import shapes
        except ModuleNotFoundError as error:
            raise ImportError(f"the package {error.name} is missing: pip install 'em3[bench]'") from error
        against = args.what[:1] == ["compare"]
        if against and len(args.what) < 2:
            raise SystemExit("em3: bench compare: must be followed by a revision, as in `em3 bench compare HEAD~1`")
        known = tuple(shapes.DIMENSIONS) if against else runs.SUITES
        suites = args.what[2 if against else 0 :] or known
        for name in suites:
            if name not in known:
                raise SystemExit(f"em3: no operation {name!r} (there is {', '.join(known)})")
        gpus = [name for i in range(torch.cuda.device_count()) for name in (f"cuda:{i}", *["cuda"][i:])]
        if args.device not in ("cpu", *gpus):
            raise SystemExit(f"em3: --device: was {args.device}, must be one of {', '.join(('cpu', *gpus))}")
        if args.threads:
            torch.set_num_threads(args.threads)
        table = args.shapes or shapes.TABLE
        with Progress() as progress:
            if against:
                print(_compare(args, suites, table, progress).read_text())
                return 0
            report = runs.run(suites, table, args.device, args.quick, args.out, args.resume, progress)
        print((args.out / "results.md").read_text())
        print(f"report: {report}")
    return 0


def _compare(args: argparse.Namespace, suites: Sequence[str], table: Path, progress: Progress) -> Path:
    from em3.benchmarks import compare, run, shapes
    from em3.benchmarks.measure import name_of

    chosen = [shape for shape in shapes.load(table) if shape.op in suites and not shape.sweep and (shape.quick or not args.quick)]
    dtype = name_of(run.dtypes_of(args.device)[0])
    path: Path = compare.compare(args.what[1], chosen, args.device, dtype, args.out, progress)
    return path
