"""`em3 evaluate`: metrics of a run's trained models on one of its splits."""

from __future__ import annotations

import argparse
from pathlib import Path

from .progress import Progress, complaints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder of `em3 train`")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    parser.add_argument("--arm", action="append", help="arm of the run, all by default; may be given several times")


def run(args: argparse.Namespace) -> int:
    with complaints():
        from ..train.config import ConfigError
        from ..train.run import Run, config_of

        config = config_of(args.folder)
        for arm in args.arm or ():
            if arm not in config.arms:
                raise ConfigError(f"--arm: was {arm!r}, must be one of the run's: {', '.join(config.arms)}")
        with Progress() as progress:
            made = Run(config, args.folder, progress)
            for arm in args.arm or config.arms:
                for seed in config.seeds:
                    found = made.trained(arm, seed).evaluate(args.split)
                    shown = ", ".join(f"{k} {v:.4f}" for k, v in found.items() if v is not None)
                    print(f"{arm} seed {seed} {args.split}: {shown}", flush=True)
    return 0
