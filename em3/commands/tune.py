"""`em3 tune`: measures on this machine what the automatic choice then takes, and keeps it in the user's cache folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import bench
from .prepare import set_threads
from .progress import Progress, complaints

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="OP", help="operations; all by default")
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="YAML file of your shapes, instead of em3's own table")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; by default the CPU and then a GPU if there is one")
    parser.add_argument("--threads", type=int, help="of torch: what is measured holds for this number of them")
    parser.add_argument("--quick", action="store_true", help="a few shapes, and those for a shorter time")
    parser.add_argument("--clear", action="store_true", help="forget what was measured on this machine, and measure nothing")


def run(args: argparse.Namespace) -> int:
    with complaints():
        from em3.tuning import table

        devices = bench.devices(args.device)
        if args.clear:
            for device in devices:
                file = table.path(_place(device))
                print(f"removed {file}" if file.exists() else f"there is no {file}")
                file.unlink(missing_ok=True)
            return 0
        try:
            from em3.benchmarks import shapes
        except ModuleNotFoundError as error:
            raise ImportError(f"the package {error.name} is missing: pip install 'em3[bench]'") from error
        for name in args.what:
            if name not in shapes.DIMENSIONS:
                raise SystemExit(f"em3: no operation {name!r} (there is {', '.join(shapes.DIMENSIONS)})")
        set_threads(args.threads)
        for device in devices:
            if status := _tune(args, device):  # Ctrl-C is meant for all of them
                return status
    return 0


def _place(device: str) -> torch.device:
    """With its index, as tensors name it."""
    import torch

    return torch.empty(0, device=device).device


def _tune(args: argparse.Namespace, device: str) -> int:
    """Prints what was found even if it is interrupted: it is in the file."""
    from em3.benchmarks import shapes, tune
    from em3.benchmarks.run import dtypes_of
    from em3.tuning import table

    ops, shape_file, dtypes = args.what or tuple(shapes.DIMENSIONS), args.shapes or shapes.TABLE, dtypes_of(device)
    units = tune.units(ops, shape_file, args.quick, dtypes)
    shapes.there_must_be(units, shape_file, ops, args.quick)
    found: list[tune.Found] = []
    status = 0
    with Progress() as progress:
        try:
            for i, of_shape in enumerate(tune.run(ops, shape_file, device, args.quick, dtypes)):
                found += of_shape
                progress("tuning", i + 1, len(units), {})
        except KeyboardInterrupt:
            status = 130
    print(tune.text(found))
    file, off = table.path(_place(device)), table.reason_off()
    print(f"{file}{' (not used now: ' + off + ')' if off else ''}{', interrupted' if status else ''}")
    return status
