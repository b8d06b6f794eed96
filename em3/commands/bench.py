"""`em3 bench`: what em3 gains on this machine, against what a user would have instead or against another revision."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .prepare import set_threads
from .progress import Progress, complaints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "em3 bench [SUITE ...] --out DIR [options]\n       em3 bench compare REV [OPERATION ...] --out DIR [options]"
    suites = ("strategies, overhead, end_to_end, or the name of an operation, such as contrastive_loss; all by default. Or the"
              " word compare and a revision of this git checkout, to build it and measure both in turns")  # fmt: skip
    parser.add_argument("what", nargs="*", metavar="SUITE", help=suites)
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="YAML file of shapes to measure instead of em3's own")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; by default the CPU and then a GPU if there is one, in folders"
                        " of their own within DIR")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a few shapes, no torch.compile: minutes instead of hours")
    parser.add_argument("--resume", action="store_true", help="go on with the results in the folder")
    files = "folder for results.jsonl, results.md and report.html, or for compare.jsonl and compare.md"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=files)


def run(args: argparse.Namespace) -> int:
    with complaints():
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
        places = devices(args.device)
        set_threads(args.threads)
        table = args.shapes or shapes.TABLE
        if against and args.resume:
            raise SystemExit("em3: --resume: bench compare measures anew each time; leave it out")
        failed: list[str] = []
        with Progress() as progress:
            for device in places:
                folder = args.out if len(places) == 1 else args.out / device
                try:
                    if against:
                        print(_compare(args, suites, table, device, folder, progress).read_text())
                        continue
                    report = runs.run(suites, table, device, args.quick, folder, args.resume, progress)
                except runs.RunError as error:  # the other device is measured all the same
                    failed.append(f"em3: {error}")
                    continue
                except KeyboardInterrupt:
                    on = "" if against else "; --resume goes on with it"
                    print(f"em3: interrupted; what was measured is in {folder}{on}", file=sys.stderr)
                    return 130
                print(report.with_name("results.md").read_text())
                print(f"report: {report}")
        if failed:
            raise SystemExit("\n".join(failed))
    return 0


def devices(asked: str | None) -> list[str]:
    """The devices that are meant: the one that was asked for, else all kinds that are here."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *["cuda"][: len(gpus)]]
    if asked is not None and asked not in (*here, *gpus):
        raise SystemExit(f"em3: --device: was {asked}, must be one of {', '.join((*here, *gpus))}")
    return here if asked is None else [asked]


def _compare(args: argparse.Namespace, suites: Sequence[str], table: Path, device: str, folder: Path,
             progress: Progress) -> Path:  # fmt: skip
    from em3.benchmarks import compare, run, shapes
    from em3.benchmarks.measure import name_of

    chosen = [shape for shape in shapes.load(table) if shape.op in suites and not shape.sweep and (shape.quick or not args.quick)]
    shapes.there_must_be(chosen, table, suites, args.quick)
    dtype = name_of(run.dtypes_of(device)[0])
    path: Path = compare.compare(args.what[1], chosen, device, dtype, folder, progress)
    return path
