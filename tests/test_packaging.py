"""What an install holds, and what setup.py does with each set of tools it can meet.

The builds run setup.py on a copy of the sources with stand-ins for the compilers: they write an empty output, so that
the decisions are tested in seconds. That the real compilers' output works is what the rest of the suite shows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest

import em3
from em3.env import extension

ROOT = Path(__file__).resolve().parents[1]

COMPILER = """#!{python}
import sys
words = sys.argv[1:]
if "--version" in words:
    print("stand-in 1.0")
elif "-MF" in words:
    source, output = (words[words.index(option) + 1] for option in ("-c", "-o"))
    open(words[words.index("-MF") + 1], "w").write("%s: %s csrc/cpu/isa.h" % (output, source))
print("ran", *words)
if "-o" in words:
    open(words[words.index("-o") + 1], "w").write("made")
"""
NVCC = """#!{python}
import sys
words = sys.argv[1:]
if "--version" in words:
    print("Cuda compilation tools, release 12.0, V12.0.1\\nBuild something")
elif "--list-gpu-code" in words:
    print("sm_80\\nsm_90")
else:
    {otherwise}
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, without anything built, beside stand-in tools."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py is not beside the tests")
    unwanted = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "_build_record.json", "*.egg-info")
    for name in ("csrc", "em3", "kernels", "tests", "benchmarks", "docs", ".ci"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def tool(tree: Path, name: str, text: str, **words: str) -> str:
    path = tree / "tools" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable, **words))
    path.chmod(0o755)
    return str(path)


def build(tree: Path, *, ninja: bool = True, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run setup.py; (what it printed, the build record)."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("EM3_", "CXX", "CUDA", "LDFLAGS"))}
    code = "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules.update({}); runpy.run_path('setup.py')"
    if not ninja:
        code = code.replace("{}", "{'ninja': None}")
        keep["PATH"] = str(tree / "tools")
    done = subprocess.run(
        [sys.executable, "-c", code, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=tree, env={**keep, "PYTHONPATH": str(ROOT), "EM3_BUILD_CUDA": "0", **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    record = tree / "out" / "em3" / "_build_record.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def built(tree: Path) -> list[Path]:
    return list((tree / "out" / "em3").glob("_C*"))


def test_metadata():
    assert importlib.metadata.version("em3") == em3.__version__
    requires = importlib.metadata.requires("em3") or []
    assert sorted(r for r in requires if "extra ==" not in r) == ["numpy>=1.26", "torch>=2.10"]
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="em3")
    assert script.value == "em3.cli:main"


def test_every_folder_with_code_is_a_package():
    """setuptools leaves a folder without __init__.py out of the wheel without a word."""
    for top in (ROOT / "em3", ROOT / "kernels", ROOT / "benchmarks"):
        for file in top.rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"


def test_record_agrees_with_what_is_installed():
    module, _ = extension()
    path = Path(em3.__file__).parent / "_build_record.json"
    assert path.exists()
    record = json.loads(path.read_text())
    assert record["python"] == sys.implementation.cache_tag
    assert record["cpp"]["built"] == (module is not None)
    assert record["cuda"]["built"] == bool(module and module.with_cuda)


def test_without_a_compiler_the_build_succeeds_and_records_it(tree):
    done, record = build(tree, CXX="/nonexistent/c++", EM3_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stdout
    assert not built(tree)
    assert record["cpp"] == {"built": False, "reason": "no C++ compiler was found (CXX=/nonexistent/c++)"}
    assert record["cuda"]["built"] is False
    assert "em3._C is left out: no C++ compiler was found" in done.stdout


def test_left_out_on_demand(tree):
    _, record = build(tree, EM3_BUILD_CPP="0")
    assert record["cpp"]["reason"] == "EM3_BUILD_CPP=0 was set"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"EM3_BUILD_CPP": "yes"}, "EM3_BUILD_CPP='yes': must be auto, 0 or 1"),
        ({"EM3_BUILD_CUDA": "2"}, "EM3_BUILD_CUDA='2': must be auto, 0 or 1"),
        ({"EM3_BUILD_CPP": "1", "CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ({"EM3_BUILD_CPP": "0", "EM3_BUILD_CUDA": "1"}, "EM3_BUILD_CUDA=1 needs EM3_BUILD_CPP"),
        ({"EM3_BUILD_CUDA": "1", "EM3_CUDA_ARCHS": "hopper"}, "EM3_CUDA_ARCHS='hopper': must be numbers"),
        ({"EM3_BUILD_CUDA": "1", "EM3_CUDA_ARCHS": "90;100"}, "does not know ['100']"),
        ({"EM3_BUILD_CUDA": "1"}, "EM3_BUILD_CUDA=1, but nvcc was found, but failed"),
    ],
)
def test_clear_errors(tree, variables, message):
    home = Path(tool(tree, "bin/nvcc", NVCC, otherwise="sys.exit(3)")).parents[1]
    done, _ = build(tree, **{"CXX": tool(tree, "c++", COMPILER), "CUDA_HOME": str(home), **variables})
    assert done.returncode != 0
    assert message in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("ninja", [True, False])
def test_failing_compiler_is_an_error_that_names_the_way_out(tree, ninja):
    compiler = tool(tree, "c++", COMPILER + "if '-c' in words: sys.exit('no such language')\n")
    done, record = build(tree, ninja=ninja, CXX=compiler)
    assert done.returncode != 0
    assert "no such language" in done.stdout
    assert "EM3_BUILD_CPP=0" in done.stdout
    assert not record


@pytest.mark.parametrize("ninja", [True, False])
def test_only_what_changed_is_compiled_again(tree, ninja):
    compiler = tool(tree, "c++", COMPILER)

    def runs(**variables: str) -> list[str]:
        done, record = build(tree, ninja=ninja, CXX=compiler, **variables)
        assert done.returncode == 0, done.stdout
        assert record["cpp"]["built"]
        (module,) = built(tree)  # nothing beside it: the whole folder is installed
        assert module.name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("ran") and "-o" in line]
        return sorted(words[words.index("-c") + 1] if "-c" in words else "link" for words in lines)

    everything = runs()
    cpp = [str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*.cpp")]
    assert everything == sorted([*cpp, "link"])
    assert runs() == []
    later = time.time() + 1000
    os.utime(tree / "csrc/bindings.cpp", (later, later))
    assert runs() == ["csrc/bindings.cpp", "link"]
    assert runs(CXXFLAGS="-O1") == everything
    later = later + 1000
    os.utime(tree / "csrc/cpu/isa.h", (later, later))  # the stand-in says that every source includes it
    assert runs(CXXFLAGS="-O1") == everything


def test_cuda_code_goes_in_with_the_architectures_nvcc_knows(tree):
    make = "open(words[words.index('-o') + 1], 'w').write('made')"
    home = Path(tool(tree, "bin/nvcc", NVCC, otherwise=make)).parents[1]
    done, record = build(tree, CXX=tool(tree, "c++", COMPILER), CUDA_HOME=str(home), EM3_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stdout
    assert record["cuda"]["archs"] == ["sm_80", "sm_90", "compute_90"]
    assert record["cuda"]["dropped"] == "this nvcc does not know sm_100"
    assert "-DEM3_WITH_CUDA" in done.stdout
    assert "-cudart static" in done.stdout
    assert "-march=native" not in done.stdout


def test_failing_nvcc_is_loud_and_recorded_but_no_error(tree):
    home = Path(tool(tree, "bin/nvcc", NVCC, otherwise="sys.exit(3)")).parents[1]
    done, record = build(tree, CXX=tool(tree, "c++", COMPILER), CUDA_HOME=str(home), EM3_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stdout
    assert "!!!!" in done.stdout
    assert record["cpp"]["built"]
    assert record["cuda"]["built"] is False
    assert "nvcc was found, but failed" in record["cuda"]["reason"]
    assert "-DEM3_WITH_CUDA" not in done.stdout


def test_source_distribution_is_complete_and_clean(tree):
    (tree / "em3" / "_build_record.json").write_text("{}")
    (tree / "em3" / "_C.so").write_text("")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", "out"], cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for path in [*tree.glob("csrc/**/*.*"), *tree.glob("kernels/*.py"), *tree.glob("tests/**/*.py"), tree / ".ci/run"]:
        assert str(path.relative_to(tree)) in names
    assert not {name for name in names if name.endswith((".so", "_build_record.json", ".pyc"))}


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_knows_the_names_of_the_instruction_sets(tmp_path):
    """Clang before 18 refuses a name that its ``__builtin_cpu_supports`` does not know, as ``f16c``."""
    source = ROOT / "csrc" / "cpu" / "isa.cpp"
    subprocess.run(["clang++", "-std=c++17", "-c", str(source), "-o", str(tmp_path / "isa.o")], check=True)
