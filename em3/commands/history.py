"""`em3 history`: what LoRA over the history buys, as AUC, step time and memory against the history's length."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from .prepare import prepare_to_train
from .progress import Progress, complaints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of a catalogue (`em3 data make` makes one)")
    parser.add_argument("--out", type=Path, required=True, help="folder for history.md, history.json and a run a cell; the same"
                        " command again goes on with what is not done")  # fmt: skip
    parser.add_argument("--lengths", default="10,50,200,1000", help="events a history at most, ascending, with commas between")
    parser.add_argument("--memory", type=float, metavar="GIB", help="what a training step may need; what needs more is skipped"
                        " and said to be. By default four fifths of what is free")  # fmt: skip
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML file; may be given several times")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for `em3 train`; the table sets history_length"
                        " and model.history itself")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    with complaints():
        from ..train import config as configs
        from ..train.history import measure

        prepare_to_train(args.threads)
        if args.memory is not None and not args.memory > 0:
            raise configs.ConfigError(f"--memory: was {args.memory}, must be above 0")
        try:
            lengths = [int(word) for word in args.lengths.split(",")]
        except ValueError:
            raise configs.ConfigError(f"--lengths: was {args.lengths!r}, must be integers with commas between") from None
        for word in args.settings:
            if word.partition("=")[0] in ("history_length", "model.history"):
                raise configs.ConfigError(f"{word}: must be left out: the table's cells differ in it (--lengths)")
        words = ["arms=[em3]", f"data={json.dumps(str(args.data))}", *args.settings]
        config = configs.load(args.config, words)
        limit = None if args.memory is None else args.memory * 1024
        with Progress() as progress:
            path = measure(config, args.out, lengths, limit, progress, shlex.join(["em3", *sys.argv[1:]]))
        print(path.read_text())
        print(f"table: {path}")
    return 0
