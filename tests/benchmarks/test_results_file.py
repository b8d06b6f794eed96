"""Results as they go: kept when a run is cut off, gone on with only where they were measured alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("yaml")

from em3.benchmarks import machine
from em3.benchmarks.results_file import SAME, Results, ResultsError, read

HEAD = {key: f"this {key}" for key in SAME} | {"ceilings": {}}


def test_they_are_kept_and_gone_on_with(tmp_path):
    first = Results(tmp_path / "out", HEAD | {"date": "then"}, resume=False)
    first.add("one", [{"form": "a"}, {"form": "b"}])
    again = Results(tmp_path / "out", HEAD | {"date": "now"}, resume=True)
    assert again.has("one")
    assert not again.has("two")
    again.add("two", [{"form": "a"}])
    head, rows = read(tmp_path / "out" / "results.jsonl")
    assert head["date"] == "then"
    assert rows == [{"unit": "one", "form": "a"}, {"unit": "one", "form": "b"}, {"unit": "two", "form": "a"}]


def test_a_folder_that_holds_results_is_not_written_over(tmp_path):
    Results(tmp_path, HEAD, resume=False)
    with pytest.raises(ResultsError, match="holds results; go on with them by --resume"):
        Results(tmp_path, HEAD, resume=False)


@pytest.mark.parametrize("key", SAME)
def test_other_conditions_are_refused(tmp_path, key):
    Results(tmp_path, HEAD, resume=False)
    with pytest.raises(ResultsError, match=f"was measured with {key} this {key}, and this is another"):
        Results(tmp_path, HEAD | {key: "another"}, resume=True)


def test_a_unit_of_another_shape_is_refused(tmp_path):
    """Else the numbers of the old shape would stand under the name of the new one."""
    results = Results(tmp_path, HEAD, resume=False)
    results.add("loss: mine, float32", [{"label": "B=4"}])
    results.must_be_of({"loss: mine, float32": "B=4", "loss: other, float32": "B=8"})
    with pytest.raises(ResultsError, match="'loss: mine, float32' measured at B=4, and that shape is now B=8; give it another name"):
        results.must_be_of({"loss: mine, float32": "B=8"})


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: "name,value\n", 1),
        (lambda text: "", 1),
        (lambda text: "[]\n", 1),
        (lambda text: "{}\n", 1),
        (lambda text: text[:-9], 3),
        (lambda text: text + "{}\n", 4),
    ],
)
def test_what_is_not_whole_is_refused_with_its_line(tmp_path, damage, line):
    Results(tmp_path, HEAD, resume=False).add("one", [{"form": "a"}, {"form": "b"}])
    path = tmp_path / "results.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ResultsError, match=rf"does not hold results .*\(line {line}: .* with all rows of its unit"):
        Results(tmp_path, HEAD, resume=True)


def test_code_that_was_changed_is_told_from_that_which_was_measured(tmp_path, monkeypatch):
    """em3's version is the same from commit to commit."""
    before = machine.sources()
    assert before == machine.sources()
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda package: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    (tmp_path / "kernel.py").write_text("a = 1")
    one = machine.sources()
    (tmp_path / "kernel.py").write_text("a = 2")
    assert len({before, one, machine.sources()}) == 3
