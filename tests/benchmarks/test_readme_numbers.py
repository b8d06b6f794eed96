"""The README's numbers come from committed results, and cannot drift from them."""

from __future__ import annotations

import pytest

for package in ("yaml", "psutil"):
    pytest.importorskip(package)

from em3.benchmarks import readme
from em3.benchmarks.results_file import read
from em3.benchmarks.shapes import load

HEAD = {"device": "a machine", "threads": 2, "instruction_set": "avx2"}


def row(op, shape, form, seconds, peak):
    found = {"suite": "operations", "op": op, "shape": shape, "label": "B=1", "form": form}
    if seconds is None:
        return found | {"status": "out of memory", "reason": "needs more"}
    return found | {"status": "measured", "peak_bytes": peak * 2**20, "seconds": {"both": [0, seconds, 9]}}


def results():
    rows = []
    for op, shape in readme.SHOWN:
        rows += [row(op, shape, "em3", 0.002, 3), row(op, shape, "em3 torch", 0.001, 3), row(op, shape, "plain", 0.005, 7)]
        rows += [row(op, shape, "compile", 0.004, 7), row(op, shape, "peer", 0.003, 7)]
    rows[2] = row(*readme.SHOWN[0], "plain", None, None)
    return rows


def test_the_table():
    lines = readme.numbers(HEAD, results()).splitlines()
    assert lines[0] == "Forward and backward in float32 on a machine (used: 2), avx2:"
    assert lines[4] == "| `qformer_attention`, B=1 | 2.0 ms | out of memory | peer: 1.50x | 3 MiB / out of memory |"
    assert lines[5] == "| `qformer_attention`, B=1 | 2.0 ms | 2.50x | peer: 1.50x | 3 MiB / 7 MiB |"
    assert len(lines) == 4 + len(readme.SHOWN)


def test_it_stands_between_its_marks():
    text = f"before\n{readme.BEGIN}old\n{readme.END}after\n"
    new = readme.updated(text, HEAD, results())
    assert new == f"before\n{readme.BEGIN}{readme.numbers(HEAD, results())}{readme.END}after\n"
    assert readme.updated(new, HEAD, results()) == new
    with pytest.raises(ValueError, match="must hold the lines"):
        readme.updated("before\nafter\n", HEAD, results())


def test_what_it_shows_is_in_the_table_of_shapes():
    assert set(readme.SHOWN) <= {(shape.op, shape.name) for shape in load()}


def test_the_readme_has_not_drifted():
    assert readme.README.read_text().count(readme.BEGIN) == readme.README.read_text().count(readme.END) == 1
    if not readme.RESULTS.exists():
        pytest.skip(f"{readme.RESULTS.relative_to(readme.ROOT)} has not been measured yet")
    text = readme.README.read_text()
    assert readme.updated(text, *read(readme.RESULTS)) == text, "run `make readme`"
