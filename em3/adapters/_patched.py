"""What patched modules have in common."""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

log = logging.getLogger("em3")


class Patched:
    """Comes before the class that a module had: its ``forward`` calls em3, or that of the class behind it."""

    em3_op: ClassVar[str]
    em3_class: ClassVar[type]
    forward: Any


_made: dict[tuple[type, type], type] = {}


def subclass(first: type, base: type) -> type:
    """The class of a patched ``base``. A class, not a ``forward`` on the module: copies of a module (``deepcopy``, the
    replicas of DataParallel) then call it with themselves."""
    if (first, base) not in _made:
        members = {"__module__": first.__module__, "em3_class": base}
        _made.setdefault((first, base), type(f"Patched{base.__name__}", (first, base), members))
    return _made[first, base]


@functools.cache
def say_once(what: str, why: str) -> None:
    log.info("%s is not served by em3: %s", what, why)
