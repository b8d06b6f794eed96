"""What a result depends on beside the code: recorded with every run."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

import em3
from em3.tuning.table import instruction_set, processor

from .measure import ceilings, name_of


def head(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """Machine, versions, threads, instruction set, and the machine's own limits, which are measured here."""
    env = em3.env_report()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "em3": em3.__version__,
        "sources": sources(),
        "dtypes": [name_of(dtype) for dtype in dtypes],
        "ceilings": ceilings(device, dtypes),
        "environment": without_folders(str(env)),
    }


def sources() -> str:
    """A digest of em3's code and compiled kernels: its version stays the same from commit to commit."""
    found = hashlib.sha256()
    for package in ("em3", "em3.kernels", "em3.benchmarks"):  # in a checkout these lie side by side
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*")):
            if file.suffix in (".py", ".so"):
                found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def without_folders(text: str) -> str:
    """A text with the folders of this machine named by what they are, for results are shown to others."""
    packages = Path(torch.__file__).resolve().parent.parent  # of another environment, if this one borrows them
    known = {Path(em3.__file__).resolve().parent.parent: ".", Path(sys.prefix).resolve(): "(environment)", Path.home(): "~",
             packages: "(packages)"}  # fmt: skip
    for folder in sorted(known, key=lambda folder: -len(folder.parts)):  # the environment may lie in the checkout
        if folder != Path(folder.anchor):
            text = text.replace(f"{folder}/", f"{known[folder]}/")
    return text
