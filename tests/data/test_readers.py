"""The readers, on tiny copies of each layout, and on the real MovieTweetings where it is there."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from em3.data.open import open_data
from em3.data.table import DataError, RankingData

REAL = Path(os.environ.get("EM3_DATA") or Path(__file__).parents[3] / "shared/data/movietweetings")


def write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write(path: Path, columns: dict[str, Any]) -> None:
    """CSV or Parquet, as the name says."""
    if path.suffix == ".csv":
        write_csv(path, columns)
    else:
        pq.write_table(pa.table(columns), path)


# MovieTweetings

RATINGS = dict(user=[7, 3, 7, 9, 3], item=["tt1", "tt2", "tt2", "tt3", "tt1"], rating=[6, 0, 9, 10, 5],
               timestamp=[100, 100, 200, 300, 400])  # fmt: skip
MOVIES = dict(item=["tt1", "tt2", "tt3"], title=['Oh, "Doctor"!', "NA", "Čas"], year=[1925, 2010, ""],
              genres=["Comedy", "", "Crime|Sci-Fi"])  # fmt: skip
SHOWN = dict(request=[2, 2, 4, 4], user=[7, 7, 3, 3], item=["tt2", "tt3", "tt1", "tt3"], label=[1, 0, 1, 0],
             timestamp=[200, 200, 400, 400], split=["train", "train", "test", "test"], cold=[False, True, False, True])  # fmt: skip


def tweetings(folder: Path, ratings: dict = RATINGS, movies: dict = MOVIES, shown: dict = SHOWN) -> Path:
    write(folder / "ratings.csv", ratings)
    write(folder / "movies.csv", movies)
    pq.write_table(pa.table(shown | {"split": pa.array(shown["split"]).dictionary_encode()}), folder / "impressions.parquet")
    (folder / "posters").mkdir(exist_ok=True)
    (folder / "posters/tt2.jpg").write_bytes(b"")
    return folder


def test_movietweetings(tmp_path: Path) -> None:
    data = open_data(tweetings(tmp_path))
    assert data.items.ids == ["tt1", "tt2", "tt3"]
    assert data.items.texts == ['Oh, "Doctor"! (1925) 1920s Comedy', "NA (2010) 2010s", "Čas Crime Sci-Fi"]
    assert data.items.pictures == [None, tmp_path / "posters/tt2.jpg", None]
    assert (data.name, data.num_users) == ("movietweetings", 3)
    assert data.events.user.tolist() == [0, 1, 0, 2, 1]
    assert data.events.item.tolist() == [0, 1, 1, 2, 0]
    assert data.events.time.tolist() == [100, 100, 200, 300, 400]
    rows = data.rows
    assert rows.request.tolist() == rows.before.tolist() == [2, 2, 4, 4]
    assert rows.user.tolist() == [0, 0, 1, 1]
    assert rows.item.tolist() == [1, 2, 0, 2]
    assert rows.label.tolist() == [1, 0, 1, 0]
    assert rows.split.tolist() == [0, 0, 2, 2]
    assert rows.cold.tolist() == [False, True, False, True]
    check_types(data)


def test_no_posters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tweetings(tmp_path) / "posters/tt2.jpg").unlink()
    (tmp_path / "posters").rmdir()
    assert open_data(tmp_path).items.pictures == [None] * 3
    assert f"{tmp_path / 'posters'}: is missing, so no item has a picture" in caplog.text


def check_types(data: RankingData) -> None:
    rows, events = data.rows, data.events
    assert [x.dtype for x in (events.user, events.item, events.time)] == [np.int64] * 3
    assert [x.dtype for x in (rows.request, rows.user, rows.item, rows.time, rows.before)] == [np.int64] * 5
    assert (rows.label.dtype, rows.split.dtype, rows.cold.dtype) == (np.float32, np.int8, np.bool_)


def test_unknown_film_of_a_history_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ratings = RATINGS | {"item": ["tt1", "tt8", "tt2", "tt9", "tt1"]}
    data = open_data(tweetings(tmp_path, ratings=ratings))
    assert data.events.user.tolist() == [0, 0, 1]
    assert data.rows.before.tolist() == [1, 1, 2, 2]
    assert [record.name for record in caplog.records] == ["em3.data"]
    assert "2 of 5 events are of 2 items" in caplog.text
    assert "tt8, tt9" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shown=SHOWN | {"item": ["tt2", "tt3", "tt4", "tt3"]}), r"impressions\.parquet: row 3, column 'item': was 'tt4'"),
        (dict(shown=SHOWN | {"request": [2, 2, 5, 5]}), r"row 3, column 'request': was 5, must be a row of ratings\.csv, 0 to 4"),
        (dict(shown=SHOWN | {"label": [1, 0, 1, 2]}), "row 4, column 'label': was 2"),
        (dict(shown=SHOWN | {"split": ["train", "dev", "test", "dev"]}), r"row 2, column 'split': was 'dev', .*\(2 such rows\)"),
        (dict(ratings=RATINGS | {"timestamp": [100, 100, 99, 300, 400]}), r"ratings\.csv: row 3, column 'timestamp': was 99"),
        (dict(movies=MOVIES | {"item": ["tt1", "tt2", "tt1"]}), r"movies\.csv: row 3, column 'item': was 'tt1'"),
    ],
)
def test_movietweetings_complains(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(tweetings(tmp_path, **change))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_real_movietweetings() -> None:
    data = open_data(REAL)
    rows, events = data.rows, data.events
    assert (len(data.items.ids), data.num_users, len(events.user)) == (12611, 21081, 141695)
    assert sum(picture is not None for picture in data.items.pictures) == 7693
    liked = rows.label == 1
    assert np.array_equal(events.user[rows.before[liked]], rows.user[liked])
    assert np.array_equal(events.item[rows.before[liked]], rows.item[liked])
    assert np.array_equal(events.time[rows.before], rows.time)
    test = data.of_split("test")
    assert rows.cold[test].mean() == pytest.approx(0.15, abs=0.01)
    covered = np.array([picture is not None for picture in data.items.pictures])[rows.item[test]]
    assert covered[rows.cold[test]].mean() == pytest.approx(0.77, abs=0.01)
    assert covered[~rows.cold[test]].mean() == pytest.approx(0.93, abs=0.01)


# MovieLens: 30 users, 12 films; film f + 1 was seen by user u at second u + 40 f, unless (u + f) % 3 == 0

TITLES = ["Matrix, The (1999)", "Alien: Resurrection (1997)", "Été, L' (1960)", *(f"Film {f} (2000)" for f in range(9))]
SEEN = [(u + 1, f + 1, u + 40 * f) for u in range(30) for f in range(12) if (u + f) % 3]


def movielens_100k(folder: Path) -> None:
    (folder / "u.data").write_text("".join(f"{u}\t{f}\t3\t{t}\n" for u, f, t in SEEN))
    flags = ["|".join("1" if g in (1, 15) else "0" for g in range(19)) if f == 0 else "|".join("0" * 19) for f in range(12)]
    lines = [f"{f + 1}|{TITLES[f]}|01-Jan-1999||http://x/{f}|{flags[f]}\n" for f in range(12)]
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))


def movielens_1m(folder: Path, encoding: str = "latin-1") -> None:
    (folder / "ratings.dat").write_text("".join(f"{u}::{f}::3.5::{t}\n" for u, f, t in SEEN))
    lines = [f"{f + 1}::{TITLES[f]}::{'Action|Sci-Fi' if f == 0 else ''}\n" for f in range(12)]
    (folder / "movies.dat").write_bytes("".join(lines).encode(encoding))


def movielens_10m(folder: Path) -> None:
    movielens_1m(folder, "utf8")


def movielens_latest(folder: Path) -> None:
    users, films, times = zip(*SEEN, strict=True)
    write(folder / "ratings.csv", dict(userId=users, movieId=films, rating=[3.5] * len(SEEN), timestamp=times))
    genres = ["Action|Sci-Fi"] + ["(no genres listed)"] * 11
    write(folder / "movies.csv", dict(movieId=range(1, 13), title=TITLES, genres=genres))
    # the tmdbId of one film is another's movieId
    tmdb = ["", *range(5, 16)]
    write(folder / "links.csv", dict(movieId=range(1, 13), imdbId=[f"{1000 + f:07d}" for f in range(12)], tmdbId=tmdb))


@pytest.mark.parametrize("layout", [movielens_100k, movielens_1m, movielens_10m, movielens_latest])
def test_movielens(tmp_path: Path, layout: Any) -> None:
    layout(tmp_path)
    data = open_data(tmp_path)
    assert (data.name, data.num_users) == ("movielens", 30)
    assert data.items.ids == [str(f + 1) for f in range(12)]
    assert data.items.texts == [
        "The Matrix (1999) 1990s Action Sci-Fi",
        "Alien: Resurrection (1997) 1990s",
        "Été, L' (1960) 1960s",
        *(f"Film {f} (2000) 2000s" for f in range(9)),
    ]
    assert data.items.pictures == [None] * 12
    events = sorted(SEEN, key=lambda event: event[2])
    assert data.events.time.tolist() == [t for _, _, t in events]
    assert data.events.item.tolist() == [f - 1 for _, f, _ in events]
    assert sorted(set(data.events.user.tolist())) == list(range(30))
    assert len({u for (u, _, _), number in zip(events, data.events.user, strict=True) if number == data.events.user[0]}) == 1
    rows = data.rows
    assert np.array_equal(rows.user, data.events.user[rows.before])
    positive = rows.label == 1
    assert np.array_equal(rows.item[positive], data.events.item[rows.before[positive]])
    assert len(rows.label) == 5 * len(SEEN)  # each user has four films left
    check_types(data)


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ({1: "1.jpg", 5: "5.PNG", 6: "6.webp"}, {1, 5, 6}),
        ({1: "tt0001000.jpg", 5: "tt0001004.jpeg", 12: "tt0001011.jpg"}, {1, 5, 12}),
        ({1: "0001000.jpg", 5: "1004.jpg"}, {1, 5}),
        ({f: f"{f + 3}.jpg" for f in range(2, 13)}, set(range(2, 13))),  # tmdbId, eight of them movieIds as well
        ({1: "tt0001000.jpg", 2: "notes.txt"}, {1}),
    ],
)
def test_posters(tmp_path: Path, names: dict[int, str], want: set[int]) -> None:
    movielens_latest(tmp_path)
    posters = tmp_path / "posters"
    posters.mkdir()
    for name in names.values():
        (posters / name).write_bytes(b"")
    pictures = open_data(tmp_path, posters).items.pictures
    assert {f + 1: picture.name for f, picture in enumerate(pictures) if picture} == {f: names[f] for f in want}


def test_posters_that_fit_nothing(tmp_path: Path) -> None:
    movielens_1m(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/tt0001000.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds 1 pictures, none of them named by a film's movieId \(and there is no .*links"):
        open_data(tmp_path, tmp_path / "p")
    with pytest.raises(DataError, match="nowhere: must be a folder of posters"):
        open_data(tmp_path, tmp_path / "nowhere")


def test_movielens_complains(tmp_path: Path) -> None:
    movielens_1m(tmp_path)
    (tmp_path / "movies.dat").write_bytes(b"1::A::B\n2::A\n")
    with pytest.raises(DataError, match=r"movies\.dat: row 2: had 2 columns, must have 3, divided by '::'"):
        open_data(tmp_path)
    (tmp_path / "movies.dat").write_bytes(b"1::A::B\n1::A::B\n")
    with pytest.raises(DataError, match=r"movies\.dat: row 2: was film '1'"):
        open_data(tmp_path)
    (tmp_path / "movies.dat").unlink()
    with pytest.raises(DataError, match=r"movies\.dat: is missing"):
        open_data(tmp_path)


# Any data

INTERACTIONS = dict(user=["b", "a", "b", "c", "a"], item=["1", "2", "2", "x", "1"], label=[1, 0, 1, 1, 1],
                    timestamp=[30, 10, 20, 20, 40])  # fmt: skip
ITEMS = dict(item=["1", "2", "x"], title=["Red shoe", "NA", ""], picture=["p/1.png", "", "p/gone.png"],
             brand=["Acme", "", "Öko"])  # fmt: skip


def general(folder: Path, interactions: dict = INTERACTIONS, items: dict = ITEMS, kind: str = "csv") -> Path:
    write(folder / f"interactions.{kind}", interactions)
    write(folder / f"items.{kind}", items)
    (folder / "p").mkdir(exist_ok=True)
    (folder / "p/1.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_general(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    data = open_data(general(tmp_path, kind=kind))
    assert data.items.ids == ["1", "2", "x"]
    assert data.items.texts == ["Red shoe Acme", "NA", "Öko"]
    assert data.items.pictures == [tmp_path / "p/1.png", None, None]
    assert "1 of 2 pictures named are not there" in caplog.text
    assert "p/gone.png" in caplog.text
    assert len(caplog.records) == 1
    assert (data.name, data.num_users) == (tmp_path.name, 3)
    assert data.events.user.tolist() == [0, 2, 0, 1]
    assert data.events.item.tolist() == [1, 2, 0, 0]
    assert data.events.time.tolist() == [20, 20, 30, 40]
    rows = data.rows
    assert rows.request.tolist() == rows.user.tolist() == [0, 1, 0, 2, 1]
    assert rows.item.tolist() == [0, 1, 1, 2, 0]
    assert rows.label.tolist() == [1, 0, 1, 1, 1]
    assert rows.before.tolist() == [2, 0, 0, 0, 3]
    assert rows.split.tolist() == [0, 0, 0, 0, 2]
    assert rows.cold.tolist() == [False] * 5
    assert rows.probability is None
    check_types(data)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_general_with_everything(tmp_path: Path, kind: str) -> None:
    more = dict(request=["r", "q", "r", "s", "q"], split=["valid", "test", "train", "train", "test"],
                probability=[0.5, 0, 1, 0.25, 1e-3])  # fmt: skip
    rows = open_data(general(tmp_path, INTERACTIONS | more, kind=kind)).rows
    assert rows.request.tolist() == [0, 1, 0, 2, 1]
    assert rows.split.tolist() == [1, 2, 0, 0, 2]
    assert rows.cold.tolist() == [True, False, False, False, True]
    assert rows.probability is not None
    assert rows.probability.dtype == np.float32
    assert rows.probability.tolist() == pytest.approx([0.5, 0, 1, 0.25, 1e-3])


def test_general_with_numbers_and_lists(tmp_path: Path) -> None:
    interactions = INTERACTIONS | {"item": pa.array([1, 2, 2, 33, 1], pa.int32()), "user": pa.array([5, 4, 5, 6, 4], pa.uint64()),
                                   "label": [True, False, True, True, True]}  # fmt: skip
    items = dict(item=[1, 2, 33], price=[1.5, 2.0, 3.0], tags=[["a", "b"], [], None], name=pa.array(["n", None, "m"]).dictionary_encode())
    data = open_data(general(tmp_path, interactions, items, "parquet"))
    assert data.items.ids == ["1", "2", "33"]
    assert data.items.texts == ["a b n", "", "m"]
    assert data.rows.item.tolist() == [0, 1, 1, 2, 0]


@pytest.mark.parametrize(
    ("kind", "times", "want"),
    [
        ("csv", ["1970-01-01T00:00:30", "1970-01-01", "1970-01-01 00:01:00.75", "1970-01-02", "1969-12-31T23:59:59"], [30, 0, 60, 86400, -1]),
        ("csv", ["1970-01-01T00:00:30Z", "1970-01-01T02:00:00+02:00", "1970-01-01T00:01:00", "1970-01-02", "1971-01-01"], [30, 0, 60, 86400, 31536000]),
        ("csv", ["1970-01-02", "1970-01-03", "1970-01-04", "1970-01-05", "1970-01-06"], [86400 * d for d in range(1, 6)]),
        ("parquet", ["1970-01-02", "1970-01-01T00:00:30+00:00", "1970-01-01", "1970-01-01", "1970-01-01"], [86400, 30, 0, 0, 0]),
        ("parquet", pa.array([1500, 30000, 0, 1, 2], pa.timestamp("ms")), [1, 30, 0, 0, 0]),
        ("parquet", pa.array([1500, 30000, 0, 1, 2], pa.timestamp("ms", "Europe/Prague")), [1, 30, 0, 0, 0]),
        ("parquet", pa.array([1, 2, 3, 4, 5], pa.date32()), [86400 * d for d in range(1, 6)]),
        ("parquet", pa.array([1, 2, 3, 4, 5], pa.uint32()), [1, 2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_timestamps(tmp_path: Path, kind: str, times: Any, want: list[int]) -> None:
    data = open_data(general(tmp_path, INTERACTIONS | {"timestamp": times, "split": ["train"] * 5}, kind=kind))
    assert data.rows.time.tolist() == want


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("interactions", "items", "message"),
    [
        ({"label": [1, 0, 2, 1, 3]}, {}, r"interactions\.\w+: row 3, column 'label': was 2, must be a number from 0 to 1 \(2 such rows\)"),
        ({"label": [1, 0, 1, -0.5, 1]}, {}, "row 4, column 'label': was -0.5, must be a number from 0 to 1"),
        ({"label": [1, 0, 1, 0.5, 1]}, {}, "row 4, column 'label': was 0.5, must be 0 or 1"),
        ({"label": [1, 0, 1, float("nan"), 1]}, {}, "row 4, column 'label': was nan"),
        ({"label": ["1", "0", "yes", "1", "1"]}, {}, "row 3, column 'label': was 'yes', must be a number from 0 to 1"),
        ({"user": ["b", "a", "", "c", "a"]}, {}, "row 3, column 'user': was '', must be a name or a number, not empty"),
        ({"item": ["1", "2", "3", "x", "1"]}, {}, "row 3, column 'item': was '3', must be an item of the table of items"),
        ({"timestamp": ["1970-01-01", "1970-01-32", "1970-01-01", "1970-01-01", "1970-01-01"]}, {}, "row 2, column 'timestamp': was '1970-01-32', must be an integer"),
        ({"timestamp": [1.5, 2.5, 3.0, 4.0, 5.0]}, {}, "column 'timestamp': was of type double, must be integers or ISO 8601"),
        ({"split": ["train", "eval", "test", "test", "test"]}, {}, "row 2, column 'split': was 'eval', must be one of train, valid, test"),
        ({"split": ["test"] * 5}, {}, "column 'split': must be 'train' in some rows"),
        ({"request": ["r", "r", "q", "s", "t"]}, {}, "row 2, column 'request': was 'r', must be a request of one user"),
        ({"probability": [0, 0, 1.1, 1, 1]}, {}, "row 3, column 'probability': was 1.1"),
        ({"timestamp": [7] * 5}, {}, "too few distinct times"),
        ({}, {"item": ["1", "2", "1"]}, r"items\.\w+: row 3, column 'item': was '1', must be an item that no earlier row names"),
    ],
)  # fmt: skip
def test_general_complains(tmp_path: Path, kind: str, interactions: dict, items: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(general(tmp_path, INTERACTIONS | interactions, ITEMS | items, kind))


def test_columns_that_are_no_times_or_are_there_twice(tmp_path: Path) -> None:
    for kind in (pa.duration("s"), pa.time32("s")):
        with pytest.raises(DataError, match=r"column 'timestamp': was of type .*, must be integers or ISO 8601 times"):
            open_data(general(tmp_path, INTERACTIONS | {"timestamp": pa.array(range(5), kind)}, kind="parquet"))
    open_data(general(tmp_path, INTERACTIONS | {"timestamp": pa.array(range(5), pa.date32())}, kind="parquet"))
    (tmp_path / "items.parquet").unlink()
    (tmp_path / "items.csv").write_text("item,title,title\n1,a,b\n2,a,b\nx,a,b\n")
    with pytest.raises(DataError, match=r"items\.csv: column 'title' is there 2 times, must be there once"):
        open_data(tmp_path)


def test_null_in_parquet(tmp_path: Path) -> None:
    for column, message in (("user", "row 2, column 'user'"), ("label", "row 2, column 'label': was None"), ("timestamp", "row 2, column 'timestamp': was None")):
        values = [*INTERACTIONS[column]]
        values[1] = None
        with pytest.raises(DataError, match=message):
            open_data(general(tmp_path, INTERACTIONS | {column: values}, kind="parquet"))


@pytest.mark.parametrize(("renamed", "hint"), [("Label", "; did you mean 'Label' to be it?"), ("klicked", "$")])
def test_missing_column(tmp_path: Path, renamed: str, hint: str) -> None:
    columns = {renamed if name == "label" else name: values for name, values in INTERACTIONS.items()}
    with pytest.raises(DataError, match=f"column 'label' is missing, there are user, item, {renamed}, timestamp{hint}".replace("?", r"\?")):
        open_data(general(tmp_path, columns))


def test_empty_and_ragged_files(tmp_path: Path) -> None:
    folder = general(tmp_path)
    (folder / "interactions.csv").write_text("user,item,label,timestamp\n")
    with pytest.raises(DataError, match="has no rows"):
        open_data(folder)
    (folder / "interactions.csv").write_text("user,item,label,timestamp\na,1,1,5\na,1,1\n")
    with pytest.raises(DataError, match=r"interactions\.csv: row 2: had 3 columns, must have 4: 'a,1,1'"):
        open_data(folder)
    (folder / "interactions.csv").write_bytes(b"user,item,label,timestamp\n\xff\xfe,1,1,5\n")
    with pytest.raises(DataError, match=r"interactions\.csv: is not a table in CSV: .*UTF8"):
        open_data(folder)
    (folder / "interactions.csv").unlink()
    (folder / "interactions.parquet").write_bytes(b"not that")
    with pytest.raises(DataError, match=r"interactions\.parquet: is not a Parquet file"):
        open_data(folder)


def test_columns_that_are_no_words_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "em3.data")
    open_data(general(tmp_path, items=ITEMS | {"price": [1, 2, 3]}))
    assert "not words, so not used: price" in caplog.text
