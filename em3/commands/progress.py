"""What the commands show while they work, and how they complain."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

EVERY = 15.0  # seconds between plain lines


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a plain line for each thing begun, and now and then."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.make_bar, self.name = tqdm, ""
        self.bar: Any = None
        self.terminal = sys.stderr.isatty()
        self.began = self.spoke = 0.0
        self.first = 0

    def __call__(self, name: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if name != self.name:
            self.close()
            self.name, self.began, self.spoke = name, time.monotonic(), 0.0
            self.first = done  # what a resumed training did in an earlier process says nothing about its rate
            if self.terminal:
                self.bar = self.make_bar(total=total, initial=done, desc=name, dynamic_ncols=True, leave=False)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            self.bar.set_postfix({key: f"{value:.4f}" for key, value in numbers.items()}, refresh=False)
        elif not self.terminal and (done >= total or time.monotonic() - self.spoke > EVERY):
            self.spoke = time.monotonic()
            seconds = self.spoke - self.began
            left = f", {seconds / (done - self.first) * (total - done):.0f} s left" if self.first < done < total else ""
            shown = "".join(f", {key} {value:.4f}" for key, value in numbers.items())
            print(f"{name}: {done}/{total}, {seconds:.0f} s{left}{shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def complaints() -> Iterator[None]:
    """Turns the errors that a user can mend into one line and exit status 1; shows what em3 warns of meanwhile."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        yield
    except ImportError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):  # em3 says itself what needs the package
            raise SystemExit(f"em3: {error}") from error
        if not isinstance(error, ModuleNotFoundError):
            raise
        raise SystemExit(f"em3: the package {error.name} is missing: pip install 'em3[train]' (or em3[hf])") from error
    except (ValueError, OSError, RuntimeError) as error:
        # Every message of em3's own errors says what was wrong and what it must be; a traceback adds nothing to these.
        if type(error).__module__.startswith("em3.") or isinstance(error, OSError):
            raise SystemExit(f"em3: {_said(error)}") from error
        raise


def _said(error: Exception) -> str:
    """What the system complains of, without its number: the file first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)
