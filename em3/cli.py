"""The command `em3`. A command is one module with `add_arguments(parser)` and `run(args) -> int`, and one line below;
one that has subcommands names them in `SUBCOMMANDS`.

Only the module of the command that was asked for is imported, so that `em3 env` works where another command's extra
is missing.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from ._version import __version__

COMMANDS = {  # name: (module, one line for `em3 --help`)
    "data": ("em3.commands.data", "make the synthetic catalogue, or look at one of your own"),
    "train": ("em3.commands.train", "train a ranker with IDs alone, with frozen content and with EM3; write a report"),
    "evaluate": ("em3.commands.evaluate", "metrics of a run's trained models"),
    "embed": ("em3.commands.embed", "content embeddings of new items to Parquet or npy"),
    "history": ("em3.commands.history", "what LoRA over the history buys, against its length: AUC, step time, memory"),
    "bench": ("em3.commands.bench", "what em3 gains on this machine, against what you would have instead"),
    "tune": ("em3.commands.tune", "measures what the automatic choice should take on this machine, and keeps it"),
    "env": ("em3.env", "what is installed, compiled and usable here, and why the rest is not"),
}


def _command(name: str) -> str:
    if name in COMMANDS:
        return name
    near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise argparse.ArgumentTypeError(f"no command {name!r}{hint} (there is {', '.join(COMMANDS)})")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="em3",
        usage="em3 [-h] [--version] command ...",
        epilog=f"commands:\n{listing}\n\n`em3 command --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"em3 {__version__}")
    parser.add_argument("command", type=_command, help="one of those below")
    # argparse must not look at what follows the command: those options belong to the command's own parser.
    first = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    name = parser.parse_args(argv[: first + 1]).command
    module = importlib.import_module(COMMANDS[name][0])
    of_command = argparse.ArgumentParser(prog=f"em3 {name}", description=COMMANDS[name][1])
    module.add_arguments(of_command)
    # Words before, between and after options; argparse refuses that beside subcommands, which take single words only.
    parse = of_command.parse_args if hasattr(module, "SUBCOMMANDS") else of_command.parse_intermixed_args
    try:
        status: int = module.run(parse(argv[first + 1 :]))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
