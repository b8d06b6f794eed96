"""Which layout a folder has, and what is asked of a layout that it does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from em3.data.open import open_data
from em3.data.table import DataError

from .test_readers import ITEMS, SEEN, general, movielens_latest, tweetings, write


def test_unknown_folders(tmp_path: Path) -> None:
    (tmp_path / "clicks.tsv").write_text("")
    with pytest.raises(DataError, match=r"Looked for ratings\.csv, movies\.csv, impressions\.parquet .*u\.data.*interactions.*It holds clicks\.tsv"):
        open_data(tmp_path)
    with pytest.raises(DataError, match="must be a folder of data, is not there"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must be a folder of data, is a file"):
        open_data(tmp_path / "clicks.tsv")


def test_half_a_layout(tmp_path: Path) -> None:
    write(tmp_path / "items.csv", ITEMS)
    with pytest.raises(DataError, match=r"must hold one of interactions\.parquet and interactions\.csv, has neither"):
        open_data(tmp_path)
    general(tmp_path, kind="csv")
    general(tmp_path, kind="parquet")
    with pytest.raises(DataError, match=r"interactions\.parquet and interactions\.csv, has both"):
        open_data(tmp_path)


def test_posters_are_for_movielens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"posters: was .*only MovieLens"):
        open_data(tweetings(tmp_path), tmp_path / "posters")


def test_requests_of_a_user_are_for_movielens(tmp_path: Path) -> None:
    for name in "mtg":
        (tmp_path / name).mkdir()
    movielens_latest(tmp_path / "m")
    rows = open_data(tmp_path / "m", requests_per_user=2).rows
    asked = np.bincount(rows.user[rows.label == 1])
    assert len(asked) == len({user for user, _, _ in SEEN})
    assert (asked == 2).all()
    for folder in (tweetings(tmp_path / "t"), general(tmp_path / "g")):
        with pytest.raises(DataError, match="requests_per_user: was 2, must be None: only for MovieLens"):
            open_data(folder, requests_per_user=2)
