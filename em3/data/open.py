"""A folder of data, whatever its layout."""

from __future__ import annotations

import os
from pathlib import Path

from . import general, movielens, movietweetings
from .table import DataError, RankingData


def open_data(folder: str | os.PathLike[str], posters: str | os.PathLike[str] | None = None,
              requests_per_user: int | None = None) -> RankingData:  # fmt: skip
    """Recognise the layout of a folder by its files and read it.

    Args:
        folder: MovieTweetings with posters, MovieLens in any layout, or the general one (:mod:`em3.data.general`).
        posters: for MovieLens, which comes without: see :func:`em3.data.movielens.read`.
        requests_per_user: for MovieLens, whose requests are made: at most so many of each user, 1 or more; None = all.

    Raises:
        DataError: if the folder is of no known layout, or its data cannot be used; ``posters`` or ``requests_per_user``
            for another layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: must be a folder of data, is {'a file' if folder.exists() else 'not there'}")
    tweetings = all((folder / name).is_file() for name in movietweetings.FILES)
    if not tweetings and any((folder / name).is_file() for name in movielens.LAYOUTS):
        return movielens.read(folder, None if posters is None else Path(posters), per_user=requests_per_user)
    if posters is not None:
        raise DataError(f"posters: was {posters}, must be None: only MovieLens takes them from another folder")
    if requests_per_user is not None:
        raise DataError(f"requests_per_user: was {requests_per_user}, must be None: only for MovieLens are requests made")
    if tweetings:
        return movietweetings.read(folder)
    if general.tables(folder, "interactions") or general.tables(folder, "items"):
        return general.read(folder)
    holds = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{folder}: is of no known layout. Looked for {', '.join(movietweetings.FILES)} (MovieTweetings); one of "
        f"{', '.join(movielens.LAYOUTS)} (MovieLens); interactions.parquet or .csv with items.parquet or .csv (any data). "
        f"It holds {holds}"
    )
