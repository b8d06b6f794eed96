"""The report of `em3 env`, the command line, and what `import em3` brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import em3
from em3 import cli, env
from em3.ops import _dispatch

OPTIONAL = {"accelerate", "hypothesis", "matplotlib", "omegaconf", "pandas", "peft", "PIL", "pyarrow", "pytest"}
OPTIONAL |= {"safetensors", "scipy", "sklearn", "tqdm", "transformers", "triton", "yaml", "em3.cli", "em3.env"}

# Stands before the code of a subprocess that must not find em3._C.
HIDE_C = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "em3._C":
            raise ImportError("hidden by a test")
sys.meta_path.insert(0, Hide())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_nothing_optional_and_is_quick():
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import em3
print(time.perf_counter() - start, *sorted(set(sys.modules) - before))
"""
    seconds = []
    for _ in range(4):  # other work on the machine can only slow an import down: one quick one is enough
        took, *new = python(code).split()
        assert "em3.ops" in new
        assert not set(new) & OPTIONAL
        seconds.append(float(took))
        if seconds[-1] < 0.25:
            return
    pytest.fail(f"import em3 added {seconds} s to import torch")


def test_text_names_every_backend_of_every_operation():
    text = str(em3.env_report())
    lines = text[text.index("\noperations") :].splitlines()
    op = ""
    seen = {}
    for line in lines[2:]:
        op, backend, reason = line[2:26].strip() or op, line[26:34].strip(), line[34:].strip()
        seen[op, backend] = None if reason == "usable" else reason
    assert seen == {(o, b): reason for o, b, reason in _dispatch.report()}
    for name in (em3.__version__, torch.__version__, "numpy", "CUDA code", "Triton kernels", "GPUs"):
        assert name in text


def test_json_is_the_same_report(capsys):
    assert cli.main(["env", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(em3.env_report()))
    assert printed["versions"]["em3"] == em3.__version__
    assert set(printed["extras"]) == {"hf", "train", "test", "bench"}
    assert printed["extras"]["test"]["pytest"] == pytest.__version__


def test_command_prints_the_text(capsys):
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.strip() == str(em3.env_report()).strip()


def test_report_of_this_build():
    module, reason = env.extension()
    compiled = em3.env_report()["compiled"]
    if module is None:
        assert compiled["cpp"] == {"built": False, "reason": reason}
        assert reason
        return
    assert module.__version__ == em3.__version__
    assert compiled["cpp"]["built"]
    assert compiled["cpp"]["compiler"] == module.compiler
    assert compiled["cuda"]["built"] == module.with_cuda
    assert "reason" in compiled["cuda"] or compiled["cuda"]["archs"]
    assert module.cpu_features()["default"] in str(em3.env_report())


def test_probe_answers_without_a_driver():
    module, _ = env.extension()
    if module is None or not module.with_cuda:
        pytest.skip("this build holds no CUDA code")
    probe = module.cuda_devices()
    assert probe["runtime_version"] >= 11000
    assert (probe["error"] is None) == bool(probe["devices"])
    assert len(probe["devices"]) == torch.cuda.device_count() or torch.version.cuda is None


def test_gpus_are_listed_with_the_reason_from_the_probe(monkeypatch):
    listed = {"error": None, "driver_version": 13000, "devices": [{"error": None}, {"error": "no kernel image"}]}
    module = SimpleNamespace(with_cuda=True, cuda_devices=lambda: listed)
    about = SimpleNamespace(name="A Card", major=9, minor=0, total_memory=80 * 2**30)
    report = em3.env_report()
    monkeypatch.setattr(env, "extension", lambda: (module, None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    report["gpus"] = env._gpus()
    assert "cuda:0              A Card, 9.0, 80.0 GiB; em3's CUDA code: usable" in str(report)
    assert "em3's CUDA code: no kernel image" in str(report)
    assert "driver for CUDA 13.0" in str(report)


def test_without_the_extension_the_report_says_what_it_costs():
    text = python(HIDE_C + "import em3; print(em3.env_report())")
    assert "hidden by a test" in text
    assert "qformer_attention runs on the torch backend, slower" in text
    assert "install a C++17 compiler" in text


def test_without_the_extension_operations_run():
    code = """
import torch, em3
w = torch.eye(8)
out = em3.ops.qformer_attention(torch.randn(2, 8), [torch.randn(3, 5, 8)], w, [w], [w], w, num_heads=2)
assert out.shape == (3, 2, 8)
try:
    em3.ops.qformer_attention(torch.randn(2, 8), [torch.randn(3, 5, 8)], w, [w], [w], w, num_heads=2, backend="cpp")
except em3.BackendError as error:
    print(error)
"""
    assert "backend 'cpp' cannot serve this call" in python(HIDE_C + code)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"python": env._PYTHON_TAG, "cpp": {"reason": "no C++ compiler was found"}}, "no C++ compiler was found"),
        ({"python": "cpython-399", "platform": "os", "cpp": {"built": True}}, "built for cpython-399, os"),
        (None, "never built"),
    ],
)
def test_reason_for_a_missing_extension(monkeypatch, tmp_path, record, expected):
    path = tmp_path / "record.json"
    if record:
        path.write_text(json.dumps(record))
    monkeypatch.setattr(env, "_RECORD", path)
    monkeypatch.setitem(sys.modules, "em3._C", None)  # makes its import fail
    module, reason = env.extension()
    assert module is None
    assert expected in reason
    assert expected in str(em3.env_report())


def test_way_out_names_the_variable_that_was_set():
    report = em3.env_report()
    report["compiled"]["cpp"] = {"built": False, "reason": "EM3_BUILD_CPP=0 was set"}
    assert "install em3 again without EM3_BUILD_CPP=0" in str(report)


def test_an_extension_of_another_version_is_reported(monkeypatch):
    other = SimpleNamespace(__version__="0.0.0", compiler="c", with_cuda=False)
    monkeypatch.setattr(env, "extension", lambda: (other, None))
    assert "em3._C is of em3 0.0.0" in str(env.env_report())


def test_forced_instruction_set_is_named(monkeypatch):
    if env.extension()[0] is None:
        pytest.skip("em3._C is not built")
    monkeypatch.setenv("EM3_CPU_ISA", "baseline")
    assert "uses baseline, forced by EM3_CPU_ISA, of baseline (usable)" in str(em3.env_report())


def test_a_reader_that_stops_early_is_no_traceback():
    code = "import sys; from em3.cli import main; sys.exit(main(['env']))"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout
    writer.stdout.close()
    assert writer.communicate()[1] == ""
    assert writer.returncode == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"em3 {em3.__version__}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evn"], "did you mean 'env'?"),
        (["quux"], f"no command 'quux' (there is {', '.join(cli.COMMANDS)}"),
        ([], "command"),
        (["env", "--jsno"], "--jsno"),
    ],
)
def test_wrong_use(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_every_command_has_its_module(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert f"em3 {name}" in capsys.readouterr().out


def test_the_tuning_file_is_reported(tmp_path, monkeypatch):
    from em3.tuning import table

    monkeypatch.setenv("EM3_CACHE", str(tmp_path))
    monkeypatch.setenv("EM3_TUNING", "1")
    line = lambda: next(row for row in str(em3.env_report()).split("em3 tune")[1].splitlines() if row.split()[:1] == ["cpu"])  # noqa: E731
    assert "not tuned here" in line()
    cpu = torch.device("cpu")
    key = ("contrastive_loss.tile", torch.float32, 1, "plain", (4, 4, 3))
    file = table.update(cpu, {key: table.Entry(key, "512x512", "planted", 2.0)})
    assert f"1 entries of {file} are in use" in line()
    monkeypatch.setenv("EM3_TUNING", "0")
    assert "0 entries" in line()
    assert "EM3_TUNING=0" in line()
    monkeypatch.setenv("EM3_TUNING", "1")
    file.write_text("{")
    assert "ignored: it cannot be read" in line()


def test_a_tuning_file_that_may_not_be_read_is_no_traceback(tmp_path, monkeypatch):
    def forbidden(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setenv("EM3_CACHE", str(tmp_path))
    monkeypatch.setenv("EM3_TUNING", "1")
    monkeypatch.setattr(Path, "stat", forbidden)  # as under another user's home; root, who runs tests, may read everything
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    entry = env._tuning()[0]
    assert not entry["exists"]
    assert "ignored: it cannot be read (PermissionError" in entry["reason"]
