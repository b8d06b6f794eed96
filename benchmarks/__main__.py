"""``python -m benchmarks [OP ...] [--out FOLDER]``: run the suites, print the table, write it beside the raw numbers."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import torch

import em3

from . import import_time

OPS = ("qformer_attention", "lora_linear", "lora_target_attention", "contrastive_loss")


def cells(row: dict) -> str:
    ours = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
    return f"| {row['op']} | {row['shape']} | {row['peer']} | {row['peer_ms']:.1f} ms | {ours} | {row['note']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=OPS, help="operations to measure, all by default")
    parser.add_argument("--out", type=Path, help="folder for cpu.md and cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = ["| op | shape | against | its time | em3 is faster by | |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")
    rows = []
    for op in options.ops:
        for row in importlib.import_module(f"benchmarks.{op}").rows():
            rows.append(row)
            lines.append(cells(row))
            print(lines[-1], flush=True)
    added = import_time.seconds()
    closing = f"`import em3` adds {added:.3f} s to `import torch`."
    print(closing)
    if options.out:
        env = em3.env_report()
        head = f"float32, forward and backward, {options.threads} threads, medians of alternating runs.\n"
        text = ["# Measured on a CPU", "", head, *lines, "", closing, "", "```text", str(env), "```", ""]
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cpu.md").write_text("\n".join(text))
        (options.out / "cpu.json").write_text(json.dumps({"rows": rows, "import_seconds": added, "env": env}, indent=1))


if __name__ == "__main__":
    main()
