"""Files that must never be seen half written, and folders that one process writes at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger("em3.files")
LOCK = ".lock"


class LockedError(OSError):
    """A folder or file that another process writes; the message names both."""


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(place for place in (path, *path.parents) if place.exists())
        raise NotADirectoryError(f"{file}: is a file, must be a folder") from None


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file under a temporary name beside ``path``; synced and renamed at the end, removed after an error.

    A reader of ``path`` finds the old content or the new one, whatever kills the writer. The folder is made if needed.

    Raises:
        OSError: also if ``path`` is a folder, or what must be its folder is a file.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target}: is a folder, must be the name of a file")
    _make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def whole_lines(path: str | os.PathLike[str]) -> list[Any]:
    """What a file of JSON lines holds, without the half line that a killed process may leave; nothing if there is none."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """``folder``, made if needed, as this process's own to write. However the process ends, the kernel gives it back.

    Raises:
        LockedError: if another process has it; with ``wait`` it is waited for instead.
    """
    with _held(Path(folder) / LOCK, f"{folder}: process", "is at work in it; let it end, or choose another folder", wait):
        yield


@contextlib.contextmanager
def written_by_us(path: str | os.PathLike[str]) -> Iterator[None]:
    """``path`` as this block's own to write with :func:`atomic`; what a killed writer of it left behind is removed.

    The lock is a file beside it, ``.NAME.lock``.

    Raises:
        LockedError: if another process, or another thread of this one, has it.
    """
    target = Path(path)
    with _held(target.with_name(f".{target.name}{LOCK}"), f"{path}: process", "is writing it; let it end", wait=False):
        temporary = re.compile(re.escape(f".{target.name}.") + r"\d+\.tmp")  # as `atomic` names it, not those of NAME.more
        for left_behind in target.parent.iterdir():
            if temporary.fullmatch(left_behind.name):
                left_behind.unlink()
        yield


@contextlib.contextmanager
def _held(path: Path, who: str, does_what: str, wait: bool) -> Iterator[None]:
    """A locked file, which stays: were it removed, two processes could hold two files of that name."""
    _make_folder(path.parent)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(f"{who} {file.read() or 'another one'} {does_what}") from None
        except OSError as error:  # a file system without locks is no reason not to work
            log.warning("%s: cannot be locked (%s): take care that only one process works in it", path.parent, error)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:  # closing would not do: a child that was forked meanwhile has the file open too
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
