"""The tuning file: what it changes, what it cannot change, and what happens when it is broken."""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import pwd
import threading
import timeit
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import em3
from em3 import tuning
from em3.ops import _dispatch, _projected
from em3.tuning import table

CPU = torch.device("cpu")
f = torch.randn


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EM3_CACHE", str(tmp_path))
    monkeypatch.setenv("EM3_TUNING", "1")
    tuning.forget()
    table._complained.clear()
    yield
    tuning.try_out(None)
    tuning.forget()


def qformer(b=4, **kwargs):
    return em3.ops.qformer_attention(f(3, 16), f(b, 9, 8), f(16, 16), [f(16, 8)], [f(16, 8)], f(16, 16), num_heads=2, **kwargs)


def target(**kwargs):
    history = torch.randint(0, 30, (4, 6))
    lora = (f(2, 8), f(16, 2), 1.0)
    return em3.ops.lora_target_attention(f(4, 16), history, f(30, 8), f(16, 16), f(16, 8), f(16, 8), f(16, 16), lora_k=lora, num_heads=2, **kwargs)


def linear(**kwargs):
    return em3.ops.lora_linear(f(12, 8), f(16, 8), None, f(2, 8), f(16, 2), **kwargs)


def adapters(**kwargs):
    return em3.ops.lora_linear(f(12, 8), f(16, 8), None, f(3, 2, 8), f(3, 16, 2), adapter=torch.randint(0, 3, (12,)), **kwargs)


def contrast(**kwargs):
    return em3.ops.contrastive_loss(f(24, 8), f(24, 8), logit_scale=5.0, **kwargs)


# Every decision, with a call that asks for it.
ASKED = {
    "qformer_attention.backend": (qformer, {"strategy": "absorb"}),
    "qformer_attention.strategy": (qformer, {}),
    "qformer_attention.chunk": (qformer, {"backend": "torch", "strategy": "absorb"}),
    "lora_target_attention.backend": (target, {"strategy": "absorb"}),
    "lora_target_attention.strategy": (target, {}),
    "lora_target_attention.rows": (target, {"strategy": "project"}),
    "lora_target_attention.chunk": (target, {"backend": "torch", "strategy": "absorb"}),
    "lora_linear.form": (linear, {}),
    "lora_linear.backend": (adapters, {}),
    "lora_linear.shrink": (adapters, {"backend": "torch"}),
    "contrastive_loss.backend": (contrast, {}),
    "contrastive_loss.tile": (contrast, {"backend": "torch"}),
}


def asked(decision, call, **kwargs):
    """The keys that a call asks for, with the cost model's answers."""
    trial = tuning.Trial({})
    tuning.try_out(trial)
    call(**kwargs)
    tuning.try_out(None)
    return trial.asked[decision]


def plant(decision):
    """Writes the file as `em3 tune` would, with another answer than the cost model's; returns that answer."""
    call, kwargs = ASKED[decision]
    keys = asked(decision, call, **kwargs)
    choice = [answer for answer in table.decisions()[decision] if answer not in keys.values()][-1]  # a backend that runs
    table.update(CPU, {key: table.Entry(key, choice, "planted", 2.0) for key in keys})
    tuning.forget()
    return choice


@contextmanager
def answers(monkeypatch):
    """What every decision comes to."""
    given = []
    real = tuning.decide

    def spy(decision, *rest):
        given.append((decision, real(decision, *rest)))
        return given[-1][1]

    askers = ("ops._dispatch", "ops.qformer_attention", "ops.lora_target_attention", "backends.torch._chunks",
              "backends.torch.lora_linear", "backends.torch.contrastive_loss")  # fmt: skip
    with monkeypatch.context() as patch:
        for name in askers:
            patch.setattr(importlib.import_module(f"em3.{name}"), "decide", spy)
        yield given


def needs_cpp():
    if _dispatch.module("qformer_attention", "cpp").unavailable():
        pytest.skip("em3._C is not built")


def test_every_decision_is_listed_and_asked_for():
    if _dispatch.module("qformer_attention", "cpp").unavailable() is None:
        assert table.decisions().keys() == ASKED.keys()
    for decision, (call, kwargs) in ASKED.items():
        assert set(asked(decision, call, **kwargs).values()) <= set(table.decisions()[decision]), decision


@pytest.mark.parametrize("decision", ASKED)
def test_a_planted_table_changes_the_choice(decision, monkeypatch):
    if decision.endswith("backend"):
        needs_cpp()
    call, kwargs = ASKED[decision]
    choice = plant(decision)
    with answers(monkeypatch) as given:
        call(**kwargs)
    assert (decision, choice) in given
    monkeypatch.setenv("EM3_TUNING", "0")
    tuning.forget()
    with answers(monkeypatch) as given:
        call(**kwargs)
    assert (decision, choice) not in given


@pytest.fixture
def served(monkeypatch):
    """What computed: backends, and "project" for that strategy."""
    names = []
    choose, attend = _dispatch.choose, _projected.attend

    def spy(op, *rest):
        chosen = choose(op, *rest)
        if op != "lora_linear":  # in which the history is projected
            names.append(chosen.__name__.split(".")[-2])
        return chosen

    monkeypatch.setattr(_dispatch, "choose", spy)
    monkeypatch.setattr(_projected, "attend", lambda *args: (names.append("project"), attend(*args))[1])
    return names


@pytest.mark.parametrize("call", [qformer, target])
def test_what_computes_follows_the_table_unless_it_was_asked_for(call, served):
    needs_cpp()
    op = {qformer: "qformer_attention", target: "lora_target_attention"}[call]
    assert plant(f"{op}.backend") == "torch"
    assert plant(f"{op}.strategy") == "project"
    asked_for = ({}, {"strategy": "absorb"}, {"backend": "cpp"}, {"strategy": "absorb", "backend": "cpp"}, {"backend": "torch"})
    served.clear()
    for kwargs in asked_for:
        call(**kwargs)
    assert served == ["project", "torch", "cpp", "cpp", "torch"]


def test_the_result_stays_the_same():
    args = (f(3, 16), f(4, 9, 8), f(16, 16) / 4, [f(16, 8) / 4], [f(16, 8) / 4], f(16, 16) / 4)
    before = em3.ops.qformer_attention(*args, num_heads=2)
    plant("qformer_attention.strategy")
    torch.testing.assert_close(em3.ops.qformer_attention(*args, num_heads=2), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 0), (2, 1), (181, 7), (182, 8), (256, 8), (362, 8), (363, 9), (2**20, 20)])
def test_the_nearest_bucket(n, expected):
    assert tuning.bucket(n) == tuning._traced_bucket(n) == expected


def test_only_near_shapes_are_changed(served):
    plant("qformer_attention.strategy")
    served.clear()
    for b in (4, 5, 12, 2):
        qformer(b)
    assert served[:2] == ["project", "project"]
    assert "project" not in served[2:]


def test_gradients_and_threads_have_entries_of_their_own(served, one_thread):
    plant("qformer_attention.strategy")
    served.clear()
    with torch.no_grad():
        qformer()
    torch.set_num_threads(2)
    qformer()
    assert "project" not in served
    torch.set_num_threads(1)
    qformer()
    assert served[-1] == "project"


def test_tokens_stored_in_a_half_type_have_entries_of_their_own(served):
    plant("qformer_attention.strategy")
    served.clear()
    args = (f(3, 16), f(4, 9, 8), f(16, 16), [f(16, 8)], [f(16, 8)], f(16, 16))
    em3.ops.qformer_attention(args[0], args[1].bfloat16(), *args[2:], num_heads=2)
    em3.ops.qformer_attention(*args, num_heads=2)
    assert served[0] != "project"
    assert served[1:] == ["project"]


def test_a_backend_that_cannot_serve_is_passed_over(served):
    needs_cpp()
    half = [t.bfloat16() for t in (f(24, 8), f(24, 8))]
    x = f(24, 8).double()
    keys = asked("contrastive_loss.backend", lambda: em3.ops.contrastive_loss(x, x, logit_scale=5.0))
    table.update(CPU, {key: table.Entry(key, "cpp", "planted", 2.0) for key in keys})
    tuning.forget()
    served.clear()
    em3.ops.contrastive_loss(x, x, logit_scale=5.0)  # float64, for which cpp is not made
    em3.ops.contrastive_loss(*half, logit_scale=5.0)
    assert served == ["torch", "cpp"]


def _sound(content):
    return {"format": table.FORMAT, "checksum": table._checksum(content), "content": content}


def _with(**changes):
    """A sound file whose first entry is changed."""

    def broken(file, raw):
        content = json.loads(raw)["content"]
        content["entries"][0] |= changes
        return json.dumps(_sound(content)).encode()

    return broken


BROKEN = {
    "truncated": lambda file, raw: raw[: len(raw) // 2],
    "empty": lambda file, raw: b"",
    "binary": lambda file, raw: bytes(range(256)),
    "a list": lambda file, raw: b"[]",
    "nested beyond sense": lambda file, raw: b"[" * 100_000,
    "changed": lambda file, raw: raw.replace(b'"project"', b'"absorb"'),
    "another format": lambda file, raw: json.dumps(json.loads(raw) | {"format": 99}).encode(),
    "another machine": lambda file, raw: json.dumps(_sound(json.loads(raw)["content"] | {"device": "Z80, torch 0.1"})).encode(),
    "content of another kind": lambda file, raw: json.dumps(_sound("tuned")).encode(),
    "entries of another kind": lambda file, raw: json.dumps(_sound(json.loads(raw)["content"] | {"entries": [7]})).encode(),
    "infinite threads": _with(threads=float("inf")),
    "half a thread": _with(threads=1.5),
    "a bucket that is no number": _with(buckets=["2", 3]),
    "a bucket beyond all": _with(buckets=[float("inf")]),
    "a dtype that is none": _with(dtype="nn"),
    "a ratio beyond all": _with(ratio=10**400),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_or_foreign_file_is_ignored_with_one_warning(how, served, caplog):
    plant("qformer_attention.strategy")
    file = table.path(CPU)
    file.write_bytes(BROKEN[how](file, file.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="em3"):
        for _ in range(3):
            qformer()
            tuning.forget()
        threads = [threading.Thread(target=qformer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "project" not in served
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert str(file) in message
    assert "em3 tune --clear" in message
    plant("qformer_attention.strategy")  # tuning mends it
    served.clear()
    qformer()
    assert served == ["project"]


def test_entries_of_another_version_are_ignored_with_one_warning(served, caplog, monkeypatch):
    plant("qformer_attention.strategy")
    plant("contrastive_loss.tile")
    monkeypatch.setitem(_dispatch.VERSIONS, "qformer_attention", 99)
    with caplog.at_level(logging.WARNING, logger="em3"):
        qformer()
        qformer()
    assert "project" not in served
    assert [record.getMessage().split(": ", 1)[1].split(". ")[0] for record in caplog.records] == [
        "1 of its 2 entries are of another version of em3's kernels and are ignored"
    ]
    assert len(table.load(CPU)) == 1


def test_no_file_is_no_reason_to_warn(caplog):
    with caplog.at_level(logging.WARNING, logger="em3"):
        qformer()
    assert not caplog.records
    assert not table.path(CPU).exists()


def test_where_the_file_lies(monkeypatch, tmp_path):
    assert table.path(CPU).parent == tmp_path / "tuning"
    monkeypatch.delenv("EM3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert table.path(CPU).parent == tmp_path / "xdg" / "em3" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert table.path(CPU).parent == tmp_path / "home" / ".cache" / "em3" / "tuning"


def _writer(number):
    for i in range(5):
        key = ("contrastive_loss.tile", torch.float32, 1, "plain", (number, i))
        table.update(CPU, {key: table.Entry(key, "512x512", "planted", 2.0)})


def test_two_tuners_at_once_keep_each_others_entries():
    workers = [multiprocessing.get_context("fork").Process(target=_writer, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    seen = 0
    while any(worker.is_alive() for worker in workers):
        found, _ = table.read(table.path(CPU), CPU)  # a reader never finds half a file
        assert len(found) >= seen
        seen = len(found)
    assert len(table.read(table.path(CPU), CPU)[0]) == 15


def test_a_forked_worker_has_the_table():
    plant("qformer_attention.strategy")
    qformer()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=lambda: queue.put(len(tuning._tables[CPU])))
    worker.start()
    worker.join(20)
    assert queue.get() == 1


def test_torch_compile_fullgraph_takes_the_tuned_form():
    """With dynamic shapes, which is the harder case: a bucket's bounds must become guards."""
    plant("qformer_attention.strategy")
    graphs = []

    def backend(graph, _):
        graphs.append("project" if F.scaled_dot_product_attention.__name__ in graph.code else "absorb")
        return graph.forward

    weights = [f(16, 16) / 4, f(16, 8) / 4, f(16, 8) / 4, f(16, 16) / 4]
    call = lambda q, x, a, b, c, d: em3.ops.qformer_attention(q, x, a, [b], [c], d, num_heads=2)  # noqa: E731
    tuning.forget()  # the file is read while the graph is traced
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for b in (4, 5, 12):
        query, x = f(3, 16), f(b, 9, 8)
        torch.testing.assert_close(compiled(query, x, *weights), call(query, x, *weights), rtol=1e-4, atol=1e-5)
    assert list(dict.fromkeys(graphs)) == ["project", "absorb"]
    assert graphs[-1] == "absorb"
    torch._dynamo.reset()


def test_a_lookup_takes_no_time_worth_mentioning():
    plant("qformer_attention.strategy")
    x = f(2)
    ask = lambda: tuning.decide("qformer_attention.strategy", x, "frozen padded", (32, 8, 8, 512, 8192, 512), "absorb")  # noqa: E731
    ask()
    assert tuning._tables[CPU]
    # 1.5 to 2.1 us; the least of many, for this machine may be busy.
    assert min(timeit.repeat(ask, number=500, repeat=40)) / 500 < 4e-6


def test_a_process_without_a_home_computes(monkeypatch, served):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("EM3_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    qformer()
    assert "project" not in served
    with pytest.raises(table.TableError, match="neither EM3_CACHE nor HOME is set"):
        table.path(CPU)
    assert "has no place" in em3.env_report()["tuning"][0]["reason"]
