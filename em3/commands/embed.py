"""`em3 embed`: content embeddings of items, new ones too, by a run's trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .progress import Progress, complaints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder of `em3 train`")
    parser.add_argument("--items", type=Path, required=True, help="folder with items.parquet or items.csv, as in a catalogue")
    parser.add_argument("--out", type=Path, required=True, help="a .parquet file (item, embedding) or a .npy file [n, C]")
    parser.add_argument("--arm", default="em3")
    parser.add_argument("--seed", type=int, help="of the training, the run's first by default")


def run(args: argparse.Namespace) -> int:
    with complaints():
        from ..train.embed import embed

        with Progress() as progress:
            count, width = embed(args.folder, args.items, args.out, args.arm, args.seed, progress)
        print(f"{args.out}: {count} embeddings of width {width}")
    return 0
