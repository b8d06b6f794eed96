"""`em3 train`: train the arms of a run and write its report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .prepare import prepare_to_train
from .progress import Progress, complaints

OUT = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of a catalogue (`em3 data make` makes one)")
    parser.add_argument("--posters", type=Path, help="folder of pictures, for MovieLens")
    parser.add_argument("--out", type=Path, help="run folder, runs/NAME-OF-DATA-RANKER by default")
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML file; may be given several times")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder; takes no settings")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in model.ranker=dcnv2 seeds=[0,1]")


def run(args: argparse.Namespace) -> int:
    with complaints():
        from ..train import config as configs
        from ..train.run import CONFIG, Run, config_of

        prepare_to_train(args.threads)
        if args.resume:
            if args.data or args.posters or args.out or args.config or args.settings:
                raise configs.ConfigError("--resume: goes on with the run's own configuration, so it takes no settings")
            config, folder = config_of(args.resume), args.resume
        else:
            # In quotes (JSON's are YAML's): a folder called 2024 or "a #1" must stay what it is.
            words = [f"{key}={json.dumps(str(value))}" for key, value in (("data", args.data), ("posters", args.posters)) if value]
            config = configs.load(args.config, [*words, *args.settings])
            folder = args.out or OUT / f"{Path(config.data).resolve().name}-{config.model.ranker}"
            if (folder / CONFIG).exists():
                raise configs.ConfigError(f"--out: {folder} holds a run; `em3 train --resume {folder}` goes on with it, "
                                          "another --out begins one of its own")  # fmt: skip
        with Progress() as progress:
            made = Run(config, folder, progress)
            report = made.execute(["em3", *sys.argv[1:]])
        print(made.table())
        print(f"report: {report}")
    return 0
