"""What ``import em3`` adds to ``import torch``: the smallest of several fresh processes, in seconds.

This is the cumulative time that ``python -X importtime -c "import torch, em3"`` prints for em3, less the time that the
printing itself takes.
"""

from __future__ import annotations

import subprocess
import sys


def seconds(runs: int = 5) -> float:
    code = "import time, torch; a = time.perf_counter(); import em3; print(time.perf_counter() - a)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
             for _ in range(runs)]  # fmt: skip
    return min(times)
