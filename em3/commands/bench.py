"""`em3 bench`: what em3 gains on this machine, against what a user would have instead."""

from __future__ import annotations

import argparse
from pathlib import Path

from .progress import Progress, complaints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="OP", help="operations to measure, all by default")
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="YAML file of shapes to measure instead of em3's own")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a few shapes, no torch.compile: minutes instead of hours")
    parser.add_argument("--resume", action="store_true", help="go on with the results in the folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="folder for results.jsonl, results.md and report.html")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    with complaints():
        import torch

        try:
            from em3.benchmarks import shapes
            from em3.benchmarks.run import SUITES
            from em3.benchmarks.run import run as measure
        except ModuleNotFoundError as error:
            raise ImportError(f"the package {error.name} is missing: pip install 'em3[bench]'") from error
        for name in args.what:
            if name not in SUITES:
                raise SystemExit(f"em3: no operation {name!r} (there is {', '.join(SUITES)})")
        gpus = [name for i in range(torch.cuda.device_count()) for name in (f"cuda:{i}", *["cuda"][i:])]
        if args.device not in ("cpu", *gpus):
            raise SystemExit(f"em3: --device: was {args.device}, must be one of {', '.join(('cpu', *gpus))}")
        if args.threads:
            torch.set_num_threads(args.threads)
        with Progress() as progress:
            report = measure(args.what or SUITES, args.shapes or shapes.TABLE, args.device, args.quick, args.out,
                             args.resume, progress)  # fmt: skip
        print((args.out / "results.md").read_text())
        print(f"report: {report}")
    return 0
