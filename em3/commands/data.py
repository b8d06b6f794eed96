"""`em3 data`: make the synthetic catalogue, or look at a catalogue of any layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from .progress import complaints

SUBCOMMANDS = "make | show"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar=SUBCOMMANDS)
    make = actions.add_parser("make", help="the synthetic catalogue: rendered pictures, written titles, known click odds")
    make.add_argument("folder", type=Path)
    make.add_argument("--items", type=int, default=2000)
    make.add_argument("--users", type=int, default=2500)
    make.add_argument("--seed", type=int, default=0)
    show = actions.add_parser("show", help="read a catalogue, check it, and say what is in it")
    show.add_argument("folder", type=Path)
    show.add_argument("--posters", type=Path, help="folder of pictures, for MovieLens")
    show.add_argument("--requests-per-user", type=int, help="at most so many, for MovieLens")


def run(args: argparse.Namespace) -> int:
    with complaints():
        try:
            if args.action == "make":
                _make(args)
            else:
                _show(args)
        except ValueError as error:  # a number out of range, a folder that holds something, data that cannot be used
            raise SystemExit(f"em3: {error}") from error
    return 0


def _make(args: argparse.Namespace) -> None:
    from ..data.catalogue import make

    make(args.folder, num_items=args.items, num_users=args.users, seed=args.seed, progress=True)
    print(args.folder)


def _show(args: argparse.Namespace) -> None:
    from ..data.open import open_data
    from ..data.table import SPLITS

    data = open_data(args.folder, args.posters, args.requests_per_user)
    items, rows = data.items, data.rows
    print(f"{data.name}: {len(items.ids):,} items, {data.num_users:,} users, {len(data.events.user):,} events")
    print(f"  {sum(p is not None for p in items.pictures):,} items with a picture, {sum(map(bool, items.texts)):,} with a text")
    for split in SPLITS:
        of_split = data.of_split(split)
        label, cold = rows.label[of_split], rows.cold[of_split]
        shares = f", {label.mean():.1%} of them clicked, {cold.mean():.1%} of cold items" if len(of_split) else ""
        print(f"  {split}: {len(of_split):,} rows{shares}")
