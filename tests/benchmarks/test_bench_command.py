"""``em3 bench`` as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("yaml", "psutil", "matplotlib", "tqdm"):
    pytest.importorskip(package)

import em3
from em3.backends import cpp
from em3.benchmarks import end_to_end, operations, overhead, page, patched, presentation, run, table
from em3.benchmarks.operations import Effort
from em3.cli import main
from em3.files import written_by_us

SHAPES = """
lora_linear:
  - {name: "a | <b>", T: 64, C: 8, D: 8, R: 2, quick: true}
contrastive_loss:
  - {name: tiny, B: 16, V: 8, quick: true}
sweeps:
  - {op: contrastive_loss, of: tiny, over: B, values: [16, 32]}
"""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SHAPES)
    return path


@pytest.fixture
def swift(monkeypatch):
    """Measured as always, but not for long; the machine's limits are taken as known."""
    monkeypatch.setattr(run, "FULL", Effort(0.01, 3, compiled=False))
    monkeypatch.setattr(run.machine, "ceilings", lambda device, dtypes: {"copy": 1e10, "products": {"float32": 1e11}})


def bench(*words):
    return main(["bench", *map(str, words)])


def test_a_run_of_its_own(mine, tmp_path):
    words = [sys.executable, "-m", "em3.cli", "bench", "contrastive_loss", "--shapes", mine, "--quick", "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    head, *rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert head["threads"] == 1
    assert head["ceilings"]["copy"] > 1e8
    assert head["ceilings"]["products"]["float32"] > 1e8
    assert {"device", "instruction_set", "torch", "em3", "date", "environment"} <= head.keys()
    measured = {row["form"]: row for row in rows if row["status"] == "measured"}
    assert {"em3", "em3 torch", "plain"} <= measured.keys()
    assert "compile" not in {row["form"] for row in rows}
    assert all(row["peak_bytes"] is not None for row in measured.values())
    markdown = (tmp_path / "out" / "results.md").read_text()
    assert markdown.rstrip() == done.stdout.partition("# Measured")[1] + done.stdout.partition("# Measured")[2].rpartition("report:")[0].rstrip()
    assert re.search(r"\| tiny: B=16 V=8 \| em3 \| ", markdown)
    for file in ("results.jsonl", "results.md", "report.html"):
        text = (tmp_path / "out" / file).read_text()
        assert "em3 0." in text
        for folder in (Path(em3.__file__).parents[1], Path(torch.__file__).parents[1], Path.home()):
            assert f"{folder}/" not in text


def test_what_was_measured_is_kept_and_gone_on_with(mine, tmp_path, swift, monkeypatch):
    honest, measured = operations.measured, []

    def cut_off(shape, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(shape.name)
        return honest(shape, *rest)

    monkeypatch.setattr(run.operations, "measured", cut_off)
    words = ["lora_linear", "contrastive_loss", "--shapes", mine, "--out", tmp_path / "out"]
    assert bench(*words) == 130
    for file in ("results.md", "report.html"):
        assert "tiny: B=16" in (tmp_path / "out" / file).read_text()
    monkeypatch.setattr(run.operations, "measured", lambda shape, *rest: (measured.append(shape.name), honest(shape, *rest))[1])
    assert bench(*words, "--resume") == 0
    assert measured == ["a | <b>", "tiny", "tiny B=16", "tiny B=32"]

    markdown = (tmp_path / "out" / "results.md").read_text()
    assert "a \\| <b>: T=64" in markdown
    html = (tmp_path / "out" / "report.html").read_text()
    assert "a | &lt;b&gt;: T=64" in html
    assert not re.search(r"<script|(src|href)=[\"'](?!data:|#)|@import|url\((?!#)", html)
    assert html.count("<svg") == 2  # time and memory of the sweep
    assert "contrastive_loss, tiny, over B in float32" in html


def test_another_effort_and_another_shape_of_the_same_name_are_not_gone_on_with(mine, tmp_path, swift, monkeypatch):
    monkeypatch.setattr(run.operations, "measured", lambda shape, *rest: [{"suite": "none", "label": shape.label}])
    words = ["contrastive_loss", "--shapes", mine, "--out", tmp_path / "out", "--resume"]
    bench(*words)
    with pytest.raises(SystemExit, match="was measured with quick False, and this is True"):
        bench(*words, "--quick")
    mine.write_text(SHAPES.replace("B: 16", "B: 8"))
    with pytest.raises(SystemExit, match="measured at B=16 V=8, and that shape is now B=8 V=8"):
        bench(*words)


def test_two_runs_in_one_folder_do_not_write_over_each_other(mine, tmp_path, swift):
    words = ["contrastive_loss", "--shapes", mine, "--out", tmp_path / "out", "--resume"]
    with written_by_us(tmp_path / "out" / "results.jsonl"), pytest.raises(SystemExit, match="is writing it; let it end"):
        bench(*words)


def test_a_forced_instruction_set_is_what_results_name(swift, monkeypatch):
    monkeypatch.setattr(cpp, "isa", "avx2")
    assert run.machine.head("cpu", ())["instruction_set"] in ("avx2", "no compiled kernels")


def test_the_other_suites(tmp_path, swift, monkeypatch):
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    monkeypatch.setattr(end_to_end, "ITEMS", 60)
    monkeypatch.setattr(end_to_end, "USERS", 30)
    monkeypatch.setattr(end_to_end, "CANDIDATES", 20)
    monkeypatch.setattr(end_to_end, "ROUNDS", 2)
    monkeypatch.setattr(end_to_end, "REQUESTS", 5)
    monkeypatch.setattr(end_to_end, "Setting", lambda history=4, batch=32, modalities=2: SETTING(history, batch, modalities))
    monkeypatch.setattr(end_to_end, "SWEEPS", {"history": (3, 6), "modalities": (1,)})
    monkeypatch.setattr(end_to_end, "_peak", lambda arm, setting, device: {"EM3": 3, "ID-only": 2}[arm] * 2**20)
    small = patched.Setting(queries=2, batch=2, layers=2, width=8, heads=2, tokens=5, token_width=6)
    monkeypatch.setattr(patched, "SETTINGS", (small, small._replace(queries=3)))
    monkeypatch.setattr(patched, "ROUNDS", 1)
    assert bench("overhead", "end_to_end", "--out", tmp_path) == 0
    markdown = (tmp_path / "results.md").read_text()
    for op in overhead.TINY:
        for form in ("em3", "em3 torch", "plain"):
            assert f"| {op}, tiny | {form} | " in markdown
    assert "| import em3, above import torch | em3 | " in markdown
    assert re.search(r"\| history 6 \| EM3 \| .* times \| [\d,]+ \| 3 \| 1.50 times \| Fusion-Q-Former ", markdown)
    assert re.search(r"\| modalities 1 \| ID-only \| .* \| 1.00 times \| ", markdown)
    assert "One user's history of 4 and 20 candidates" in markdown
    pytest.importorskip("transformers")
    assert re.search(r"\| Q=3, dropout 0.1, B=2, N=5, C=6, D=8, H=2 \| patched \| .* \| \d+\.\d\dx \|", markdown)


def test_a_patched_model_that_is_not_measured(monkeypatch):
    of = patched.Setting(queries=2, batch=2, layers=2, width=8, heads=2, tokens=5, token_width=6)
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = patched.training(of, "cpu")
    assert [row["arm"] for row in rows] == ["transformers", "patched"]
    assert all(row["reason"].startswith("not measured: ") for row in rows)
    monkeypatch.undo()
    pytest.importorskip("transformers")
    monkeypatch.setattr(patched, "_error", lambda got, want: 0.5)
    assert [row["reason"] for row in patched.training(of, "cpu")] == ["not timed: the gradients are off by 5e-01"] * 2


SETTING = end_to_end.Setting


def test_all_of_a_batch_goes_to_the_device():
    setting = SETTING(history=5, batch=8, modalities=3)
    batch = end_to_end.moved(end_to_end.draw(setting, 8), "meta")
    tensors = [batch.user_id, batch.item, batch.item_id, batch.label, batch.distinct, batch.inverse]
    for jagged in (batch.history, batch.history_id, *(end_to_end.moved(stream, "meta") for stream in end_to_end.tokens(4, setting))):
        tensors += [jagged.values(), jagged.offsets()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.history_age is None


def test_what_cannot_be_measured_stops_nothing_else(mine, tmp_path, swift, monkeypatch, caplog):
    honest = operations.measured
    monkeypatch.setattr(run.operations, "measured", lambda shape, *rest: honest(shape, *rest) if shape.name == "tiny" else too_large())
    monkeypatch.setattr(operations.memory, "peak", lambda *about: {"peak": 1, "inputs": 1, "results": 1})

    def too_large():
        raise RuntimeError("CUDA out of memory:\nTried")

    with pytest.raises(SystemExit, match=r"1 of 2 parts could not be measured, the others are in .*: lora_linear: a"):
        bench("lora_linear", "contrastive_loss", "--shapes", mine, "--quick", "--out", tmp_path / "out")
    assert "not measured: CUDA out of memory: Tried" in caplog.text
    assert "tiny: B=16" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "python"), TypeError("overflow"), MemoryError("no more")])
def test_a_part_may_fail_in_any_way(error, mine, tmp_path, swift, monkeypatch, caplog):
    """Such as in a process of its own, or at a shape beyond 64 bits."""

    def fail():
        raise error

    todo = [run.Unit("one", fail), run.Unit("two", lambda: [{"suite": "none"}])]
    monkeypatch.setattr(run, "units", lambda *of: todo)
    with pytest.raises(SystemExit, match=r"1 of 2 parts could not be measured, the others are in .*: one"):
        bench("--shapes", mine, "--device", "cpu", "--out", tmp_path / "out")
    assert f"one: not measured: {error}" in caplog.text
    assert '"unit": "two"' in (tmp_path / "out" / "results.jsonl").read_text()


def test_memory_of_a_step_counts_what_em3_adds():
    setting = SETTING(history=20, batch=256, modalities=1)
    ours, base = (end_to_end._peak(arm, setting, "cpu") for arm in end_to_end.ARMS)
    assert ours > base > 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["lora"], "no operation 'lora'"),
        (["--shapes", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["--device", "cuda:7"], "--device: was cuda:7"),
        (["--device", "tpu"], "--device: was tpu"),
        (["compare", "HEAD", "--resume"], "--resume: bench compare measures anew each time"),
    ],
)
def test_complaints(words, complaint, tmp_path):
    with pytest.raises(SystemExit) as stop:
        bench(*words, "--out", tmp_path / "out")
    assert complaint in str(stop.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["lora_linear"], "must hold a shape of lora_linear; there is none"),
     (["compare", "HEAD", "lora_linear"], "must hold a shape of lora_linear; there is none"),
     (["contrastive_loss", "--quick"], "must hold a shape of contrastive_loss marked `quick: true`, as --quick asks for; there is none")],
)  # fmt: skip
def test_shapes_of_which_none_is_meant(words, complaint, tmp_path):
    (tmp_path / "mine.yaml").write_text("contrastive_loss: [{name: tiny, B: 16, V: 8}]")
    with pytest.raises(SystemExit) as stop:
        bench(*words, "--shapes", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert complaint in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_a_machine_with_a_gpu_is_measured_on_both(mine, tmp_path, monkeypatch):
    """The GPU is made up: what is asked of it is written down."""
    asked = []

    def pretended(suites, table_of_shapes, device, quick, out, resume, progress):
        asked.append((device, out))
        out.mkdir(parents=True)
        (out / "results.md").write_text(device)
        return out / "report.html"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(run, "run", pretended)
    bench("--shapes", mine, "--out", tmp_path / "both")
    bench("--shapes", mine, "--out", tmp_path / "one", "--device", "cuda:0")
    assert asked == [("cpu", tmp_path / "both" / "cpu"), ("cuda", tmp_path / "both" / "cuda"), ("cuda:0", tmp_path / "one")]


def test_a_device_on_which_parts_fail_does_not_stop_the_other(mine, tmp_path, monkeypatch):
    asked = []

    def failing(suites, table_of_shapes, device, *rest):
        asked.append(device)
        raise run.RunError(f"1 of 2 parts could not be measured on {device}")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(run, "run", failing)
    with pytest.raises(SystemExit, match=r"measured on cpu\nem3: 1 of 2 parts could not be measured on cuda"):
        bench("--shapes", mine, "--out", tmp_path)
    assert asked == ["cpu", "cuda"]


def test_ctrl_c_says_what_is_left_to_do(mine, tmp_path, monkeypatch, capsys):
    """The first unit is measured, the second interrupted."""
    honest = operations.measured

    def interrupted(shape, *rest):
        if shape.op == "contrastive_loss":
            raise KeyboardInterrupt
        return honest(shape, *rest)

    monkeypatch.setattr(operations, "measured", interrupted)
    assert bench("lora_linear", "contrastive_loss", "--quick", "--shapes", mine, "--out", tmp_path / "out") == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"em3: interrupted; what was measured is in {tmp_path / 'out'}; --resume goes on with it"
    assert said[0].startswith("benchmarks: 0/2, 0 s")  # before the minutes that the first one may take
    assert "lora_linear" in (tmp_path / "out" / "results.md").read_text()


def times(p20, p80):
    return {"suite": "operations", "seconds": {"both": [p20, (p20 + p80) / 2, p80]}}


def test_a_busy_machine_is_told_of():
    calm, wild = times(1.0, 1.5), times(1.0, 2.5)
    assert presentation.unrest([calm] * 4 + [wild] + [{"suite": "operations"}]) == ""
    assert presentation.unrest([calm] * 3 + [wild]).startswith("The machine was busy: of 4 times 1 are more than twice as long")
    assert presentation.unrest([]) == ""


def test_a_reason_takes_the_cells_of_the_numbers_that_there_are_not():
    shown = page._table(presentation.Table("t", "``2 B^2 V`` & `x`", ("shape", "form", "a", "b", "c"),
                                           [("s", "em3", "1", "2", "3"), ("", "peer", "not usable: <why>", "", ""), ("", "late", "1", "2", "")]))  # fmt: skip
    assert "<code>2 B^2 V</code> &amp; <code>x</code>" in shown
    assert '<td>peer</td><td colspan="3">not usable: &lt;why&gt;</td>' in shown
    assert "<td>late</td><td>1</td><td>2</td><td></td>" in shown


def test_a_plot_where_a_form_ran_out_of_memory(tmp_path):
    work = {"forward_flops": 1.0, "backward_flops": 1.0, "forward_elements": 1.0, "backward_elements": 1.0}
    rows = [
        {"suite": "operations", "op": "contrastive_loss", "shape": f"tiny B={at}", "label": f"B={at}", "form": form,
         "sweep": {"of": "tiny", "over": "B", "at": at}, "dtype": "float32", "work": work, "error": 1e-7, "peak_bytes": 2**20, "results_bytes": 2**10,
         **({"status": "measured", "seconds": {part: [1.0, 2.0, 3.0] for part in ("forward", "backward", "both")}}
            if (form, at) != ("plain", 32) else {"status": "out of memory", "reason": "needs more"})}
        for at in (16, 32) for form in ("em3", "plain")
    ]  # fmt: skip
    rows += [rows[0] | {"sweep": {}}, rows[0] | {"sweep": {}, "form": "peer", "without": ["logit_scale"]}]
    head = {"date": "then", "device": "<a machine>", "threads": 2, "instruction_set": "avx2", "torch": "2", "em3": "0",
            "environment": "", "ceilings": {"copy": 1e10, "products": {"float32": 1e11}}}  # fmt: skip
    html = page.write(tmp_path, head, rows).read_text()
    assert html.count("<svg") == 2
    assert "&lt;a machine&gt;" in html
    assert "<a machine>" not in html
    markdown = Path(table.write(tmp_path, head, rows)).read_text()
    assert markdown.startswith("# Measured by `em3 bench`")
    assert "| peer, without the gradient of logit_scale | " in markdown
