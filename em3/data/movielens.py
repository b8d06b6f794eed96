"""MovieLens of GroupLens in its three layouts: 100k (u.data), 1m and 10m (``::`` between columns), latest, 20m, 25m (CSV).

There are no impressions in it: the ranking task is made by :func:`em3.data.requests.make_requests`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .columns import STRING, Table, known_events, number, numbered, read_csv, unique_items, with_decade
from .requests import make_requests
from .table import DataError, Items, RankingData

GENRES_100K = (
    "", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def read(folder: Path, posters: Path | None = None, *, per_user: int | None = None) -> RankingData:
    """All ratings as events, whatever the rating, and one request for each of them.

    Args:
        folder: of one of the three layouts, found by their file of ratings.
        posters: a folder of pictures named by movieId, or by the imdbId or tmdbId of links.csv (an imdbId with or without
            ``tt`` and its zeros in front); .jpg, .jpeg, .png or .webp. All must be named in the same way: it is the one
            that fits most files.
        per_user: at most so many requests a user; 25 million ratings make 125 million rows without it.

    Raises:
        DataError: naming file, row and column, or the folder of posters where no file's name fits.
    """
    layout = next((layout for name, layout in LAYOUTS.items() if (folder / name).is_file()), None)
    if layout is None:
        raise DataError(f"{folder}: must hold one of {', '.join(LAYOUTS)}")
    ratings, ids, texts = layout(folder)
    pictures = _pictures(posters, folder / "links.csv", ids)
    time = ratings.integers("timestamp")
    order = np.argsort(time, kind="stable")  # the files are sorted by user
    (user,), num_users = numbered(ratings.strings("userId"))
    films = ratings.strings("movieId").take(order)
    events = known_events(ratings.path, user[order], number(films, ids), time[order], films)
    return RankingData("movielens", Items(ids, texts, pictures), num_users, events,
                       make_requests(events, per_user=per_user))  # fmt: skip


def _layout_100k(folder: Path) -> tuple[Table, list[str], list[str]]:
    ratings = read_csv(folder / "u.data", {}, names=["userId", "movieId", "rating", "timestamp"], delimiter="\t")
    films = _split_lines(folder / "u.item", "|", 5 + len(GENRES_100K))
    texts = [
        _text(film[1], [genre for genre, flag in zip(GENRES_100K, film[5:], strict=True) if flag == "1" and genre])
        for film in films
    ]
    return ratings, [film[0] for film in films], texts


def _layout_1m(folder: Path) -> tuple[Table, list[str], list[str]]:
    # To a reader of CSV, "::" are two separators with an empty column between them.
    names = ["userId", "", "movieId", " ", "rating", "  ", "timestamp"]
    ratings = read_csv(folder / "ratings.dat", {}, names=names, delimiter=":")
    films = _split_lines(folder / "movies.dat", "::", 3)
    return ratings, [film[0] for film in films], [_text(film[1], film[2].split("|")) for film in films]


def _layout_csv(folder: Path) -> tuple[Table, list[str], list[str]]:
    ratings = read_csv(folder / "ratings.csv", {})
    movies = read_csv(folder / "movies.csv", {"title": STRING, "genres": STRING})
    titles, genres = (movies.strings(name, empty=True).to_pylist() for name in ("title", "genres"))
    texts = [_text(title, genre.split("|")) for title, genre in zip(titles, genres, strict=True)]
    return ratings, unique_items(movies, "movieId"), texts


LAYOUTS: dict[str, Callable[[Path], tuple[Table, list[str], list[str]]]] = {
    "u.data": _layout_100k,
    "ratings.dat": _layout_1m,
    "ratings.csv": _layout_csv,
}


def _split_lines(path: Path, separator: str, columns: int) -> list[list[str]]:
    """The lines of a small file; in Latin-1 (100k, 1m) unless it is UTF-8 throughout (10m), which Latin-1 never is by chance."""
    if not path.is_file():
        raise DataError(f"{path}: is missing")
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    lines = [line.rstrip("\r").split(separator) for line in text.split("\n") if line.strip()]
    seen: set[str] = set()
    for row, line in enumerate(lines, 1):
        if len(line) != columns:
            raise DataError(f"{path}: row {row}: had {len(line)} columns, must have {columns}, divided by {separator!r}")
        if line[0] in seen:
            raise DataError(f"{path}: row {row}: was film {line[0]!r}, must be a film that no earlier row names")
        seen.add(line[0])
    return lines


def _text(title: str, genres: list[str]) -> str:
    """``The Matrix (1999) 1990s Action Sci-Fi`` of ``Matrix, The (1999)``: an encoder of text knows films by their names."""
    title = re.sub(r"^([^(]+), (The|An|A)(?= \(|$)", r"\2 \1", title.strip())
    return " ".join([with_decade(title), *(genre for genre in genres if genre and genre != "(no genres listed)")])


def _pictures(posters: Path | None, links: Path, ids: list[str]) -> list[Path | None]:
    if posters is None:
        return [None] * len(ids)
    if not posters.is_dir():
        raise DataError(f"{posters}: must be a folder of posters")
    files = {path.stem: path for path in sorted(posters.iterdir()) if path.suffix.lower() in PICTURES}
    imdb_files = {stem.removeprefix("tt").zfill(7): path for stem, path in files.items()}
    ways: list[list[Path | None]] = [[files.get(id) for id in ids]]
    if links.is_file():
        table = read_csv(links, dict.fromkeys(("movieId", "imdbId", "tmdbId"), STRING))
        row_of = {id: row for row, id in enumerate(unique_items(table, "movieId"))}
        for name, among, width in (("imdbId", imdb_files, 7), ("tmdbId", files, 0)):
            names = ["", *table.strings(name, empty=True).to_pylist()]  # of no film, then of each row
            linked = [names[row_of.get(id, -1) + 1] for id in ids]
            ways.append([among.get(link.removeprefix("tt").zfill(width)) if link else None for link in linked])
    best = max(ways, key=lambda pictures: sum(picture is not None for picture in pictures))
    if not any(best):
        raise DataError(f"{posters}: holds {len(files)} pictures, none of them named by a film's movieId"
                        + (", imdbId or tmdbId" if links.is_file() else f" (and there is no {links})"))  # fmt: skip
    return best
