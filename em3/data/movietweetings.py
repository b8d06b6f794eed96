"""MovieTweetings with posters: ratings.csv, movies.csv, posters/ID.jpg and a fixed ranking task, impressions.parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .columns import STRING, known_events, log, number, numbered, read_csv, read_parquet, unique_items, with_decade
from .table import Items, RankingData, Rows

FILES = ("ratings.csv", "movies.csv", "impressions.parquet")


def read(folder: Path) -> RankingData:
    """Films, all ratings as events, and the requests of impressions.parquet as rows.

    A request's number is the row of ratings.csv (from 0) of its positive: the history is the user's rows before it.

    Raises:
        DataError: naming file, row and column.
    """
    ratings = read_csv(folder / FILES[0], {"user": STRING, "item": STRING})
    shown = read_parquet(folder / FILES[2])
    items = _items(folder)

    time, request = ratings.integers("timestamp"), shown.integers("request")
    ratings.wrong("timestamp", np.diff(time, prepend=time[:1]) < 0, "no earlier than in the row before")
    shown.wrong("request", (request < 0) | (request >= ratings.rows), f"a row of {FILES[0]}, 0 to {ratings.rows - 1}")

    (rater, viewer), num_users = numbered(ratings.strings("user"), shown.strings("user"))
    films = ratings.strings("item")
    rated = number(films, items.ids)
    events = known_events(ratings.path, rater, rated, time, films)
    kept_before = np.concatenate([[0], np.cumsum(rated >= 0)])  # [ratings + 1], moves past the events left out

    item = number(shown.strings("item"), items.ids)
    shown.wrong("item", item < 0, f"an item of {FILES[1]}")
    rows = Rows(
        request=request,
        user=viewer,
        item=item,
        label=shown.labels("label"),
        time=shown.integers("timestamp"),
        split=shown.splits("split"),
        cold=shown.labels("cold") == 1,
        before=kept_before[request],
    )
    return RankingData("movietweetings", items, num_users, events, rows)


def _items(folder: Path) -> Items:
    movies = read_csv(folder / FILES[1], dict.fromkeys(("item", "title", "year", "genres"), STRING))
    ids = unique_items(movies, "item")
    words = (movies.strings(name, empty=True).to_pylist() for name in ("title", "year", "genres"))
    texts = [
        " ".join(word for word in (title, with_decade(f"({year})") if year else "", *genres.split("|")) if word)
        for title, year, genres in zip(*words, strict=True)
    ]
    posters = folder / "posters"
    if not posters.is_dir():
        log.warning("%s: is missing, so no item has a picture", posters)
    there = {path.stem: path for path in posters.iterdir() if path.suffix == ".jpg"} if posters.is_dir() else {}
    return Items(ids, texts, [there.get(id) for id in ids])
