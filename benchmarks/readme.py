"""``python -m em3.benchmarks.readme``: writes the numbers in README.md from the committed results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from em3.files import atomic

from .presentation import MIB, Head, Row, of_suite
from .results_file import FILE, read

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", Path(__file__).with_name("results") / "cpu" / FILE
BEGIN = "<!-- from benchmarks/results/cpu by `python -m em3.benchmarks.readme` -->\n"
END = "<!-- end -->\n"
# The rows of the table, as in the table of shapes.
SHOWN = (("qformer_attention", "ranker"), ("qformer_attention", "clip"), ("lora_linear", "ranker"), ("lora_linear", "adapters"),
         ("lora_target_attention", "wide"), ("lora_target_attention", "candidates"), ("contrastive_loss", "usual"))  # fmt: skip


def numbers(head: Head, rows: Sequence[Row]) -> str:
    """The README's table: em3 against the plain formulation and the fastest other form, in time and memory."""
    lines = [
        f"Forward and backward in float32 on {head['device']} (used: {head['threads']}), {head['instruction_set']}:",
        "", "| | em3 | plain PyTorch | the best other | peak memory, em3 / plain |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for op, shape in SHOWN:
        forms = {row["form"]: row for row in of_suite(rows, "operations") if (row["op"], row["shape"]) == (op, shape)}
        ours = forms["em3"]
        others = {name: row for name, row in forms.items() if not name.startswith("em3") and name != "plain" and "seconds" in row}
        best = min(others, key=lambda name: others[name]["seconds"]["both"][1], default=None)
        against = f"{best}: {_times(others[best], ours)}" if best else ""
        lines.append(f"| `{op}`, {ours['label']} | {1e3 * ours['seconds']['both'][1]:.1f} ms | {_times(forms['plain'], ours)} "
                     f"| {against} | {_memory(ours)} / {_memory(forms['plain'])} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _times(row: Row, ours: Row) -> str:
    return f"{row['seconds']['both'][1] / ours['seconds']['both'][1]:.2f}x" if "seconds" in row else row["status"]


def _memory(row: Row) -> str:
    return f"{row['peak_bytes'] / MIB:,.0f} MiB" if row.get("peak_bytes") is not None else row["status"]


def updated(text: str, head: Head, rows: Sequence[Row]) -> str:
    """The README's text with the numbers of these results between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: must hold the lines {BEGIN.strip()!r} and {END.strip()!r} once each")
    return re.sub(f"({re.escape(BEGIN)}).*?({re.escape(END)})", lambda m: m[1] + numbers(head, rows) + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    text = updated(README.read_text(), *read(RESULTS))
    with atomic(README) as file:
        file.write(text.encode())
