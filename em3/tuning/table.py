"""The tuning file: what ``em3 tune`` measured on this machine, one file a device in the user's cache folder.

``tuning/<device>.json`` under ``EM3_CACHE``, else ``$XDG_CACHE_HOME/em3``, else ``~/.cache/em3``. A file belongs to one
processor with its instruction set, or one kind of GPU, under one minor release of torch; an entry to a dtype, a number of
threads, a bucket of shapes (``em3.tuning.decide``) and a version of its operation. It is JSON with a checksum, replaced
as a whole, under a lock: tuners that run at once keep each other's entries, and readers find a whole file.

A file that is broken, of another machine or of another format is ignored with one warning, like entries of another
version of an operation. Tuning writes a sound file in its place.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from . import Key, Table

log = logging.getLogger("em3")
FORMAT = 1
_complained: dict[Path, str] = {}


class TableError(ValueError):
    """Why a tuning file is not used."""


class Entry(NamedTuple):
    """A measured winner."""

    key: Key
    choice: str
    shape: str  # that was measured
    ratio: float  # the cost model's time over the winner's


@functools.cache
def decisions() -> dict[str, tuple[str, ...]]:
    """What can be tuned, with the answers that there are."""
    from ..ops._dispatch import BACKENDS

    strategies, chunks = ("absorb", "project"), tuple(str(1 << k) for k in (18, 20, 22))
    return {f"{op}.backend": names for op, names in BACKENDS.items() if len(names) > 1} | {
        "qformer_attention.strategy": strategies,
        "qformer_attention.chunk": chunks,
        "lora_target_attention.strategy": strategies,
        "lora_target_attention.rows": ("bank", "history"),
        "lora_target_attention.chunk": chunks,
        "lora_linear.form": ("merged", "separate"),
        "lora_linear.shrink": ("bags", "tiles"),
        "contrastive_loss.tile": tuple(f"{n}x{n}" for n in (512, 1024, 2048)),
    }


def load(device: torch.device) -> Table:
    """The choices for a device; none with ``EM3_TUNING=0``, on a device that cannot be tuned, or from an unusable file."""
    if reason_off() or device.type not in ("cpu", "cuda"):
        return {}
    try:
        file = path(device)
    except TableError:  # nobody can have tuned here
        return {}
    try:
        entries, old = read(file, device)
    except TableError as error:
        _complain(file, f"{error}; it is ignored")
        return {}
    if old:
        _complain(file, f"{old} of its {old + len(entries)} entries are of another version of em3's kernels and are ignored")
    return {entry.key: entry.choice for entry in entries}


def reason_off() -> str | None:
    """Why no tuning file is used whatever it holds."""
    return "EM3_TUNING=0" if os.environ.get("EM3_TUNING") == "0" else None


def _complain(file: Path, what: str) -> None:
    if _complained.setdefault(file, what) is what:  # the first thread's own string: one warning a file
        log.warning("%s: %s. `em3 tune` measures anew, `em3 tune --clear` removes it", file, what)


def path(device: torch.device) -> Path:
    """The file of a device, whether or not there is one.

    Raises:
        TableError: a process without a home, and no variable that says where else.
    """
    try:
        cache = os.environ.get("EM3_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "em3"
    except RuntimeError:
        raise TableError("has no place: neither EM3_CACHE nor HOME is set, and this user has no home") from None
    name = identity(device)
    words = re.sub(r"\W+", "-", name)[:60].strip("-").lower()
    return Path(cache) / "tuning" / f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def identity(device: torch.device) -> str:
    """What measurements on the device depend on beside the call: whoever has another one does not take them over."""
    release = ".".join(torch.__version__.split(".")[:2])
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {release}"
    return f"{processor()}, {instruction_set()}, torch {release}"


def instruction_set() -> str:
    """Of the compiled kernels: the widest that this processor has, or the one that ``EM3_CPU_ISA`` forces."""
    from ..backends import cpp
    from ..env import extension

    module, _ = extension()
    if module is None or not hasattr(module, "cpu_features"):  # an older em3._C beside newer Python code
        return "no compiled kernels"
    forced: str = cpp.isa
    return forced or module.cpu_features()["default"]


@functools.cache
def processor() -> str:
    """The processor's name and how many of its threads are here."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or platform.machine()


def read(file: Path, device: torch.device) -> tuple[list[Entry], int]:
    """The entries of a file, and how many more are of another version of their operation; nothing if there is no file.

    Raises:
        TableError: the file cannot be read, is not whole, or is of another format or machine.
    """
    try:
        found = json.loads(file.read_bytes())
        content, checksum = found["content"], found["checksum"]
    except FileNotFoundError:
        return [], 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TableError(f"cannot be read ({type(error).__name__}: {error})") from None
    if found.get("format") != FORMAT:
        raise TableError(f"is of format {found.get('format')!r}, not {FORMAT}")
    if _checksum(content) != checksum:
        raise TableError("was changed or damaged: its checksum is not that of its content")
    try:
        machine = content["device"]
        rows = [(_entry(row), _current(row)) for row in content["entries"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TableError(f"holds what makes no sense ({type(error).__name__}: {error})") from None
    if machine != identity(device):
        raise TableError(f"is of another machine ({machine}; this is {identity(device)})")
    return [entry for entry, current in rows if current], sum(not current for _, current in rows)


def update(device: torch.device, changes: dict[Key, Entry | None]) -> Path:
    """Put entries into the device's file, and take out those that are None; the others stay. Returns its path."""
    file = path(device)
    with files.locked(file.parent, wait=True):
        try:
            entries = {entry.key: entry for entry in read(file, device)[0]}
        except TableError:
            entries = {}
        entries = {key: entry for key, entry in (entries | changes).items() if entry is not None}
        content = {"device": identity(device), "entries": [_row(entry) for entry in entries.values()]}
        with files.atomic(file) as out:
            out.write(json.dumps({"format": FORMAT, "checksum": _checksum(content), "content": content}, indent=1).encode())
    return file


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _current(row: dict[str, Any]) -> bool:
    """Whether an entry was measured with the operation as it is now, and names an answer that there is."""
    from ..ops._dispatch import VERSIONS

    known = row["choice"] in decisions().get(row["decision"], ())
    return known and row["version"] == VERSIONS[row["decision"].split(".")[0]]


def _entry(row: dict[str, Any]) -> Entry:
    dtype, threads, buckets = getattr(torch, row["dtype"]), row["threads"], row["buckets"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: was {row['dtype']}, must be one of torch's")
    for name, numbers in (("threads", [threads]), ("buckets", buckets)):
        if any(type(n) is not int or n < 0 for n in numbers):  # JSON has Infinity, fractions and true as well
            raise ValueError(f"{name}: was {row[name]}, must be whole numbers of at least 0")
    key = (row["decision"], dtype, threads, str(row["kind"]), tuple(buckets))
    return Entry(key, str(row["choice"]), str(row["shape"]), float(row["ratio"]))


def _row(entry: Entry) -> dict[str, Any]:
    from ..ops._dispatch import VERSIONS

    decision, dtype, threads, kind, buckets = entry.key
    return {
        "decision": decision, "choice": entry.choice, "version": VERSIONS[decision.split(".")[0]],
        "dtype": str(dtype).removeprefix("torch."), "threads": threads, "kind": kind, "buckets": buckets,
        "shape": entry.shape, "ratio": round(entry.ratio, 3), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
