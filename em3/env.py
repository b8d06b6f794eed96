"""`em3 env`: what is installed, compiled and usable here, and for everything else the reason why not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

_RECORD = Path(__file__).parent / "_build_record.json"
_PYTHON_TAG = sys.implementation.cache_tag


class EnvReport(dict[str, Any]):
    """The report as nested dictionaries (`em3 env --json`); `str()` of it is the text of `em3 env`."""

    def __str__(self) -> str:
        return _text(self)


def env_report() -> EnvReport:
    """Everything that decides which backend serves a call in this process, and what a bug report needs."""
    return EnvReport(
        versions=_versions(),
        system=_system(),
        compiled=_compiled(),
        gpus=_gpus(),
        triton_kernels=triton_kernels(),
        unmeasured_kernels=_unmeasured_kernels(),
        extras=_extras(),
        operations=_operations(),
        tuning=_tuning(),
    )


def extension() -> tuple[ModuleType | None, str | None]:
    """em3._C, or the reason why there is none."""
    try:
        return importlib.import_module("em3._C"), None
    except ImportError as error:
        record = _record()
        reason = record.get("cpp", {}).get("reason")
        if reason and record.get("python") == _PYTHON_TAG:
            return None, reason
        if not record:
            return None, f"this em3 was never built; install it with pip ({error})"
        return None, f"it was built for {record['python']}, {record['platform']} and cannot be imported here ({error})"


def _record() -> dict[str, Any]:
    """What setup.py wrote about the build; empty in a source tree that was never built."""
    try:
        record: dict[str, Any] = json.loads(_RECORD.read_text())
    except OSError:
        return {}
    return record


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    import torch

    return {
        "em3": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _version_of("numpy"),
        "triton": _version_of("triton"),
    }


def _system() -> dict[str, Any]:
    import torch

    module, _ = extension()
    # An older em3._C beside newer Python code must not stop the report that says so.
    features = module.cpu_features() if module is not None and hasattr(module, "cpu_features") else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "os": platform.platform(),
        "machine": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_features": features,
        "location": str(Path(__file__).parent),
    }


def _compiled() -> dict[str, Any]:
    module, reason = extension()
    record = _record()
    if module is None:
        return {"cpp": {"built": False, "reason": reason}, "cuda": {"built": False, "reason": "em3._C is missing"}}
    cpp = {"built": True, "compiler": module.compiler, "version": module.__version__}
    if module.__version__ != __version__:
        cpp["warning"] = f"em3._C is of em3 {module.__version__}, the Python code of {__version__}: install em3 again"
    elif _older_than_sources(module):
        cpp["warning"] = "csrc/ has changed since em3._C was built: run `make install`"
    if record.get("python") != _PYTHON_TAG:  # an editable install under another Python wrote over it
        return {"cpp": cpp, "cuda": {"built": module.with_cuda, "reason": f"the record is of {record.get('python')}"}}
    return {"cpp": {**record["cpp"], **cpp}, "cuda": record["cuda"]}


def _older_than_sources(module: ModuleType) -> bool:
    """In an editable install: whether a C++ source was edited after the module was built."""
    built = Path(str(module.__file__)).stat().st_mtime
    sources = Path(__file__).parent.parent / "csrc"
    return any(path.stat().st_mtime > built for path in sources.rglob("*.*"))


def _gpus() -> dict[str, Any]:
    """Devices as torch sees them, each with the reason why em3's compiled CUDA code cannot run on it, or None."""
    import torch

    module, _ = extension()
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"HIP {torch.version.hip}"
    gpus: dict[str, Any] = {"torch": toolkit or "built without GPU support", "devices": [], "probe": None}
    probed = []
    if module is not None and module.with_cuda:
        gpus["probe"] = module.cuda_devices()
        probed = gpus["probe"]["devices"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        if not probed:
            error = "this em3 holds no CUDA code" if gpus["probe"] is None else gpus["probe"]["error"]
        else:
            error = probed[index]["error"]
        gib = round(about.total_memory / 2**30, 1)
        capability = [about.major, about.minor]
        gpus["devices"].append({"name": about.name, "capability": capability, "memory_gib": gib, "em3_cuda": error})
    return gpus


def triton_kernels() -> str | None:
    """None where Triton kernels can run in this process, else the reason."""
    try:
        kernels = importlib.import_module("em3.kernels")
    except ImportError:
        return "em3.kernels is missing: this source tree is not installed"
    reason: str | None = kernels.why_not()
    return reason


def _unmeasured_kernels() -> list[str]:
    """Triton kernels that no GPU has timed yet."""
    try:
        return list(importlib.import_module("em3.kernels").UNMEASURED)
    except ImportError:
        return []


def _extras() -> dict[str, dict[str, str | None]]:
    """Per extra the version of each package, None where it is missing. Read from em3's own metadata: no second list."""
    extras: dict[str, dict[str, str | None]] = {}
    try:
        requirements = importlib.metadata.requires("em3") or []
    except importlib.metadata.PackageNotFoundError:
        return extras
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*\bextra\s*==\s*['\"](\w+)", requirement)
        if found:
            extras.setdefault(found[2], {})[found[1]] = _version_of(found[1])
    return extras


def _operations() -> list[dict[str, str | None]]:
    from em3.ops import _dispatch

    return [{"op": op, "backend": backend, "reason": reason} for op, backend, reason in _dispatch.report()]


def _tuning() -> list[dict[str, Any]]:
    """For each device its tuning file, how many entries of it are in use, and why not more."""
    import torch

    from .tuning import table

    found: list[dict[str, Any]] = []
    for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        device = torch.device(name)
        file, entries, reason = "", 0, table.reason_off()
        try:
            file = str(table.path(device))
            known, old = table.read(Path(file), device)
            entries = 0 if reason else len(known)
            reason = reason or (f"{old} more are of another version of em3's kernels" if old else None)
        except table.TableError as error:
            reason = f"ignored: it {error}"
        found.append({"device": name, "file": file, "exists": os.path.exists(file), "entries": entries, "reason": reason})
    return found


def _costs(report: EnvReport) -> list[str]:
    """What a missing em3._C costs, op by op, and the way out."""
    cpp = report["compiled"]["cpp"]
    if cpp["built"]:
        return []
    lines = []
    operations = report["operations"]
    for op in dict.fromkeys(row["op"] for row in operations):
        rows = [row for row in operations if row["op"] == op]
        usable = [row["backend"] for row in rows if row["reason"] is None]
        if any(row["backend"] == "cpp" for row in rows):
            lines.append(f"{op} runs on the {usable[0]} backend, slower" if usable else f"{op} cannot run")
    if "EM3_BUILD_CPP=0" in cpp["reason"]:
        lines.append("to change that, install em3 again without EM3_BUILD_CPP=0")
    else:
        lines.append("to change that, install a C++17 compiler (and Python's headers), then install em3 again")
    return lines


def _text(report: EnvReport) -> str:
    versions, system, compiled, gpus = (report[k] for k in ("versions", "system", "compiled", "gpus"))
    lines = [f"em3 {versions['em3']} in {system['location']}"]

    def row(name: str, value: str, width: int = 20) -> None:
        lines.append(f"  {name:<{width}}{value}")

    def title(name: str) -> None:
        lines.extend(["", name])

    for name in ("python", "torch", "numpy", "triton"):
        row(name, versions[name] or "not installed")
    row("system", f"{system['os']}, {system['machine']}")
    row("threads", f"{system['threads']} set in torch, {system['cores']} cores usable")

    title("compiled")
    cpp, cuda = compiled["cpp"], compiled["cuda"]
    if cpp["built"]:
        row("em3._C", f"{cpp['compiler']}, {cpp.get('flags', 'flags unknown')}")
        for line in _cpu_lines(system["cpu_features"]):
            row("", line)
    else:
        row("em3._C", f"left out: {cpp['reason']}")
    for line in [*_costs(report), *([cpp["warning"]] if "warning" in cpp else [])]:
        row("", line)
    if cuda["built"]:
        row("CUDA code", f"{cuda.get('compiler', 'nvcc')} for {' '.join(cuda.get('archs', ['unknown architectures']))}")
    else:
        row("CUDA code", f"left out: {cuda['reason']}")
    if "dropped" in cuda:
        row("", cuda["dropped"])
    row("Triton kernels", report["triton_kernels"] or "can run")
    if report["unmeasured_kernels"]:
        row("", f"unmeasured, for no GPU has timed them yet: {', '.join(report['unmeasured_kernels'])}")

    title("GPUs")
    row("torch", gpus["torch"])
    if gpus["probe"]:
        row("em3._C", gpus["probe"]["error"] or f"driver {_cuda_version(gpus['probe']['driver_version'])}")
    for index, gpu in enumerate(gpus["devices"]):
        about = f"{gpu['name']}, {'.'.join(map(str, gpu['capability']))}, {gpu['memory_gib']} GiB"
        row(f"cuda:{index}", f"{about}; em3's CUDA code: {gpu['em3_cuda'] or 'usable'}")
    if not gpus["devices"]:
        row("devices", "none")

    title("optional packages")
    for extra, packages in report["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        present = [f"{name} {version}" for name, version in packages.items() if version is not None]
        if missing:
            present.append(f"missing: {' '.join(missing)} (pip install 'em3[{extra}]')")
        row(extra, ", ".join(present))
    if not report["extras"]:
        row("unknown", "em3 is imported from a source tree that is not installed")

    title("tuning: what `em3 tune` measured goes before the cost models")
    for entry in report["tuning"]:
        state = f"{entry['entries']} entries of {entry['file']} are in use" if entry["exists"] else "not tuned here"
        row(entry["device"], state + (f" ({entry['reason']})" if entry["reason"] else ""))

    title("operations: the first backend that is usable and faster for the call serves it")
    before = None
    for entry in report["operations"]:
        name = "" if entry["op"] == before else entry["op"]
        before = entry["op"]
        row(name, f"{entry['backend']:<8}{entry['reason'] or 'usable'}", width=24)
    return "\n".join(lines)


def _cuda_version(number: int) -> str:
    return f"for CUDA {number // 1000}.{number % 1000 // 10}" if number else "absent"


def _cpu_lines(features: dict[str, Any] | None) -> list[str]:
    if features is None:
        return []
    sets = [f"{name} ({reason or 'usable'})" for name, reason in features["isa"].items()]
    forced = os.environ.get("EM3_CPU_ISA")
    used = f"{forced}, forced by EM3_CPU_ISA" if forced else features["default"]
    if forced and features["isa"].get(forced, "unknown") is not None:
        used = f"nothing, for EM3_CPU_ISA={forced} cannot be used"
    return [f"uses {used}, of {', '.join(sets)}", f"threads: {features['threads']}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    report = env_report()
    print(json.dumps(report, indent=2) if args.json else report)
    return 0
