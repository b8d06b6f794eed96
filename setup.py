"""Builds em3._C from csrc/; installs kernels/ as em3.kernels and benchmarks/ as em3.benchmarks.

Everything static is in pyproject.toml.

The extension includes no torch header, so this file never imports torch. These variables steer it:

EM3_BUILD_CPP   auto (default): build em3._C where there is a C++ compiler; 0: leave it out; 1: fail without a compiler
EM3_BUILD_CUDA  auto (default): compile csrc/cuda where there is nvcc; 0: leave it out; 1: fail if that cannot be done
EM3_CUDA_ARCHS  GPU architectures, "80;90;100" by default; the highest one is added as PTX for GPUs still to come
CXX, CXXFLAGS, LDFLAGS, CUDA_HOME   as usual

A tool that is missing leaves its part out. A C++ compiler that is there and fails is an error: a silent fallback
would cost every user of that machine several times the run time. What was built, and what was left out and why,
is written to em3/_build_record.json, which `em3 env` prints.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90;100"
SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp"))
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-pthread,-fvisibility=hidden"]


class LeftOut(Exception):
    """A part cannot be built here; its text is the reason that goes into the record."""


@dataclass(frozen=True)
class Job:
    """One command that makes one file; `depfile` is what the compiler writes about the headers it read."""

    output: Path
    inputs: list[str]
    command: list[str]
    depfile: Path | None = None


def switch(name: str) -> str:
    value = os.environ.get(name, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}: must be auto, 0 or 1")
    return value


def output_of(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def say(text: str) -> None:
    print(f"em3: {text}", file=sys.stderr, flush=True)


def find_ninja() -> list[str] | None:
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
        return [path] if path else None
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def find_cxx() -> list[str]:
    """The C++ compiler as command words: CXX, else the first known name on PATH. LeftOut where there is none."""
    wanted = os.environ.get("CXX", "").strip()
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        words = shlex.split(candidate)
        if shutil.which(words[0]):
            break
    else:
        raise LeftOut(f"no C++ compiler was found ({'CXX=' + wanted if wanted else 'c++, g++ and clang++ were tried'})")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise LeftOut("Python.h, the C headers of this Python (often the package python3-dev), was not found")
    return words


def find_nvcc() -> str:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise LeftOut("nvcc was not found (CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda were tried)")
    return found


def choose_archs(nvcc: str) -> tuple[list[str], list[str]]:
    """(architectures to compile for, default ones this nvcc does not know). An unknown one asked for is an error."""
    asked = os.environ.get("EM3_CUDA_ARCHS", "").strip()
    archs = [a for a in re.split(r"[;,\s]+", asked or DEFAULT_ARCHS) if a]
    wrong = [a for a in archs if not re.fullmatch(r"\d{2,3}[af]?", a)]
    if wrong or not archs:
        raise SystemExit(f"EM3_CUDA_ARCHS={asked!r}: must be numbers as in {DEFAULT_ARCHS!r}")
    known = set(re.findall(r"sm_(\w+)", output_of([nvcc, "--list-gpu-code"])))
    unknown = [a for a in archs if a not in known]
    if asked and unknown:
        raise SystemExit(f"EM3_CUDA_ARCHS={asked!r}: {nvcc} does not know {unknown}, only {sorted(known)}")
    archs = sorted((a for a in archs if a in known), key=lambda a: int(re.sub(r"\D", "", a)))
    if not archs:
        raise LeftOut(f"{nvcc} knows none of the architectures {DEFAULT_ARCHS}; set EM3_CUDA_ARCHS")
    return archs, unknown


def words_file(job: Job, stage: Path) -> Path:
    """Where the plain loop keeps the words it ran: not beside the output, for all beside em3._C is installed with it."""
    return stage / f"{job.output.parent.name}-{job.output.name}.cmd"


def is_stale(job: Job, stage: Path) -> bool:
    """Whether the plain loop must run the job again: other words, or an input or header newer than the output."""
    words = words_file(job, stage)
    if not job.output.exists() or not words.exists() or words.read_text() != shlex.join(job.command):
        return True
    inputs = list(job.inputs)
    if job.depfile:
        if not job.depfile.exists():
            return True
        inputs += shlex.split(job.depfile.read_text().replace("\\\n", " ").partition(": ")[2])
    made = job.output.stat().st_mtime
    return any(not os.path.exists(i) or os.path.getmtime(i) > made for i in inputs)


def run_jobs(jobs: list[Job], stage: Path) -> None:
    """Run what is out of date, in parallel where ninja is there, else one after the other."""
    stage.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is None:
        for job in jobs:
            if is_stale(job, stage):
                print(shlex.join(job.command), flush=True)
                subprocess.run(job.command, check=True, cwd=ROOT)
                words_file(job, stage).write_text(shlex.join(job.command))
        return

    def path(p: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    text = f"builddir = {path(stage)}\nrule run\n  command = $words\n  depfile = $dep\n"
    for job in jobs:
        text += f"build {path(job.output)}: run {' '.join(map(path, job.inputs))}\n"
        text += f"  words = {shlex.join(job.command).replace('$', '$$')}\n"
        text += f"  dep = {path(job.depfile)}\n" if job.depfile else ""
    (stage / "build.ninja").write_text(text)
    subprocess.run([*ninja, "-v", "-f", str(stage / "build.ninja")], check=True, cwd=ROOT)


class BuildExt(build_ext):
    """Compiles with commands of its own: setuptools has no nvcc, no parallel build and no tracking of headers."""

    extensions: list[Extension]

    def run(self) -> None:
        cpp, cuda = switch("EM3_BUILD_CPP"), switch("EM3_BUILD_CUDA")
        if cpp == "0" and cuda == "1":
            raise SystemExit("EM3_BUILD_CUDA=1 needs EM3_BUILD_CPP: the CUDA code is part of em3._C")
        # Not self.build_temp: pip gives an editable install a fresh one each time, and everything would be rebuilt.
        self.objects = ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.target = Path(self.get_ext_fullpath("em3._C")).resolve()
        self.record: dict[str, Any] = {"python": sys.implementation.cache_tag, "platform": sysconfig.get_platform()}
        self.record["cpp"] = {"built": False}
        self.record["cuda"] = {"built": False, "reason": "em3._C was not built"}
        try:
            if cpp == "0":
                raise LeftOut("EM3_BUILD_CPP=0 was set")
            if sys.platform == "win32":
                self.build_on_windows(cuda)
            else:
                self.build(find_cxx(), cuda)
        except LeftOut as reason:
            if "1" in (cpp, cuda):
                raise SystemExit(f"em3: EM3_BUILD_CPP={cpp}, EM3_BUILD_CUDA={cuda}, but {reason}") from None
            say(f"em3._C is left out: {reason}. em3 will run on its slower backends; `em3 env` says which.")
            self.record["cpp"]["reason"] = str(reason)
            self.target.unlink(missing_ok=True)  # an older one beside the sources would contradict the record
            self.extensions = []
        self.record_path().parent.mkdir(parents=True, exist_ok=True)
        self.record_path().write_text(json.dumps(self.record, indent=2) + "\n")

    def build(self, cxx: list[str], cuda: str) -> None:
        import pybind11

        cuda_objects, nvcc = self.build_cuda(cxx, cuda)
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        include = ["-Icsrc", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        compiler = output_of([*cxx, "--version"]).splitlines()[0]
        about = [f'-DEM3_VERSION="{self.distribution.get_version()}"', *(["-DEM3_WITH_CUDA"] if nvcc else [])]
        jobs = []
        for source in SOURCES:
            obj = self.objects / (source + ".o")
            dep = obj.with_suffix(".d")
            obj.parent.mkdir(parents=True, exist_ok=True)
            defines = about if source.endswith("bindings.cpp") else []
            words = [*cxx, *flags, *defines, *include, "-MD", "-MF", str(dep), "-c", source, "-o", str(obj)]
            jobs.append(Job(obj, [source], words, dep))
        objects = [str(job.output) for job in jobs] + cuda_objects
        self.target.parent.mkdir(parents=True, exist_ok=True)
        link = self.link_command(cxx, nvcc)
        jobs.append(Job(self.target, objects, [*link, *objects, "-o", str(self.target), "-ldl"]))
        say(f"compiling {len(SOURCES)} C++ files with {compiler}")
        try:
            run_jobs(jobs, self.objects / "cpp")
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"\nem3: {compiler} failed on em3's sources (exit status {error.returncode}, its message is above).\n"
                "em3 needs a C++17 compiler: name another one with CXX, or set EM3_BUILD_CPP=0 to install without\n"
                "the compiled kernels (everything works then, more slowly)."
            ) from None
        self.record["cpp"] = {"built": True, "compiler": compiler, "flags": " ".join(flags)}

    def build_cuda(self, cxx: list[str], wanted: str) -> tuple[list[str], str | None]:
        """(objects, the nvcc that must link them), or ([], None) with the reason in the record."""
        record = self.record["cuda"]
        try:
            if wanted == "0":
                raise LeftOut("EM3_BUILD_CUDA=0 was set")
            if sys.platform != "linux":
                raise LeftOut("em3 builds its CUDA code on Linux only")
            nvcc = find_nvcc()
            archs, dropped = choose_archs(nvcc)
            version = output_of([nvcc, "--version"]).strip().splitlines()[-2].split(", ")[-1]
            jobs = []
            for source in CUDA_SOURCES:
                obj = self.objects / (source + ".o")
                dep = obj.with_suffix(".d")
                obj.parent.mkdir(parents=True, exist_ok=True)
                code = [w for a in archs for w in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
                code += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
                words = [nvcc, *host_compiler(cxx), *NVCC_FLAGS, *code, "-Icsrc", "-MD", "-MF", str(dep)]
                jobs.append(Job(obj, [source], [*words, "-c", source, "-o", str(obj)], dep))
            say(f"compiling {len(jobs)} CUDA files with nvcc {version} for {archs}")
            run_jobs(jobs, self.objects / "cuda")
        except (LeftOut, subprocess.CalledProcessError, OSError) as error:
            reason = str(error) if isinstance(error, LeftOut) else "nvcc was found, but failed"
            if wanted == "1":
                raise SystemExit(f"em3: EM3_BUILD_CUDA=1, but {reason} (any message of nvcc is above)") from None
            if not isinstance(error, LeftOut):
                say(f"{'!' * 60} {error}")
                reason += "; install em3 again with EM3_BUILD_CUDA=1 to see why"
            say(f"the CUDA code is left out: {reason}")
            record["reason"] = reason
            return [], None
        self.record["cuda"] = {"built": True, "compiler": f"nvcc {version}", "archs": [f"sm_{a}" for a in archs]}
        self.record["cuda"]["archs"].append(f"compute_{archs[-1]}")
        if dropped:
            self.record["cuda"]["dropped"] = f"this nvcc does not know {', '.join('sm_' + a for a in dropped)}"
        return [str(job.output) for job in jobs], nvcc

    def link_command(self, cxx: list[str], nvcc: str | None) -> list[str]:
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        if nvcc is None:
            shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
            return [*cxx, *shared, "-pthread", *flags]
        # nvcc links because it knows where its static runtime lies. The runtime's symbols stay inside the module,
        # for torch brings a CUDA runtime of its own, often of another version.
        words = [nvcc, *host_compiler(cxx), "-shared", "-cudart", "static", "-Xcompiler", "-pthread"]
        words += ["-Xlinker", "--exclude-libs", "-Xlinker", "ALL"]
        for flag in flags:
            if flag.startswith("-Wl,"):
                words += [w for part in flag[4:].split(",") for w in ("-Xlinker", part)]
            else:
                words += [flag] if flag.startswith(("-L", "-l")) else ["-Xcompiler", flag]
        return words

    def build_on_windows(self, cuda: str) -> None:
        """setuptools knows where the Microsoft compiler hides; CUDA is not built there."""
        if cuda == "1":
            raise SystemExit("EM3_BUILD_CUDA=1: em3 builds its CUDA code on Linux only")
        import pybind11

        extension = self.extensions[0]
        extension.include_dirs = ["csrc", pybind11.get_include()]
        extension.extra_compile_args = ["/std:c++17", "/O2", "/EHsc"]
        extension.define_macros = [("EM3_VERSION", f'\\"{self.distribution.get_version()}\\"')]
        try:
            super().run()
        except PlatformError as error:
            raise LeftOut(f"no C++ compiler was found ({error})") from None
        self.record["cuda"]["reason"] = "em3 builds its CUDA code on Linux only"
        self.record["cpp"] = {"built": True, "compiler": "MSVC", "flags": " ".join(extension.extra_compile_args)}

    def record_path(self, inplace: bool | None = None) -> Path:
        inplace = self.inplace if inplace is None else inplace
        return (ROOT if inplace else Path(self.build_lib)) / "em3" / "_build_record.json"

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.record_path(inplace=False))]

    def get_output_mapping(self) -> dict[str, str]:
        """What an editable install links from the source tree."""
        mapping: dict[str, str] = super().get_output_mapping()
        if self.inplace:
            mapping[str(self.record_path(inplace=False))] = str(self.record_path())
        return mapping


class BuildPy(build_py):
    def run(self) -> None:
        # build/lib outlives a build, and setuptools would ship files that have been deleted from the sources since.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "em3", ignore_errors=True)
        super().run()


def host_compiler(cxx: list[str]) -> list[str]:
    """Let nvcc use the C++ compiler chosen; one of several words ("ccache g++") is not something it can take."""
    return ["-ccbin", cxx[0]] if len(cxx) == 1 else []


setup(
    packages=[
        *find_packages(include=["em3", "em3.*"]),
        "em3.kernels",
        *(f"em3.kernels.{name}" for name in find_packages("kernels")),
        "em3.benchmarks",
    ],
    package_dir={"em3": "em3", "em3.kernels": "kernels", "em3.benchmarks": "benchmarks"},
    ext_modules=[Extension("em3._C", SOURCES, language="c++")],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    zip_safe=False,
)
