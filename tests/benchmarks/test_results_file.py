"""Results as they go: kept when a run is cut off, gone on with only where they were measured alike."""

from __future__ import annotations

import pytest

from em3.benchmarks.results_file import SAME, Results, ResultsError, read

HEAD = {key: f"this {key}" for key in SAME}


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


def test_another_file_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("name,value\n")
    with pytest.raises(ResultsError, match="does not hold results"):
        Results(tmp_path, HEAD, resume=True)
