"""``python -m tests.sanitized [address] [thread]``: the tests of the compiled CPU kernels under GCC's sanitizers.

The sources are copied to a temporary folder and compiled there with AddressSanitizer and UndefinedBehaviorSanitizer, then
with ThreadSanitizer. Python and torch are as they are: what they do is not watched, and ThreadSanitizer runs with threads
of em3's own (``set_thread_runtime("std")``), because it cannot see how an OpenMP runtime makes its threads wait.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_cpu_kernels.py", "tests/test_cpu_kernels_direct.py", "tests/ops/test_means.py")
FOLDERS = ("em3", "csrc", "kernels", "benchmarks", "tests")
# Of each: what is compiled in, the library that must be loaded first, its options, the tests.
SANITIZERS = {
    "address": (
        "address,undefined", "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}, "not fork",
    ),
    "thread": ("thread", "libtsan.so", {"TSAN_OPTIONS": "suppressions={suppressions} exitcode=66"}, "std"),
}  # fmt: skip
# What torch, its OpenMP runtime and the loader do by themselves: not compiled with the sanitizer, which sees half of it. Not
# `race:`, which would leave out whatever is called from them, and that is em3.
LIBRARIES = ("libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so")
FOREIGN = (*(f"called_from_lib:{name}" for name in LIBRARIES), "race:_dl_deallocate_tls", "mutex:libtorch_python")


def copied(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def found(compiler: str, library: str) -> str:
    path = subprocess.run([compiler, f"-print-file-name={library}"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{library}: was not found by {compiler}; install the sanitizers of this compiler, or set CXX")
    return path


def run(name: str, folder: Path) -> int:
    flags, library, options, tests = SANITIZERS[name]
    compiler = os.environ.get("CXX", "g++")
    # The C++ library too: where nothing else of the program needs it, the sanitizer does not find what it wraps.
    preload = [found(compiler, library), found(compiler, "libstdc++.so.6")]
    environment = os.environ | {
        "EM3_BUILD_CPP": "1", "EM3_BUILD_CUDA": "0", "CXX": compiler, "OMP_NUM_THREADS": "1", "LDFLAGS": f"-fsanitize={flags}",
        "CXXFLAGS": f"-O1 -g -fno-omit-frame-pointer -fsanitize={flags} -fno-sanitize-recover=undefined",
    }  # fmt: skip
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=environment, check=True)
    suppressions = folder / "suppressions"
    suppressions.write_text("\n".join(FOREIGN))
    options = {key: value.format(suppressions=suppressions) for key, value in options.items()}
    words = [sys.executable, "-m", "pytest", *TESTS, "-q", "-x", "--capture=sys", "-p", "no:cacheprovider"]
    # The sanitizers' memory map does not survive what newer kernels make of the layout of a process.
    words = ["setarch", platform.machine(), "-R", *words, "-k", tests]
    return subprocess.run(words, cwd=folder, env=environment | options | {"LD_PRELOAD": " ".join(preload)}).returncode


def main(names: list[str]) -> int:
    for name in names or list(SANITIZERS):
        if name not in SANITIZERS:
            raise SystemExit(f"{name}: must be one of {', '.join(SANITIZERS)}")
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            copied(Path(folder))
            code = run(name, Path(folder))
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
