"""Which backend serves a call, how to ask for one, and what is said when it cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import em3
from em3.ops import _dispatch


def call(**kwargs):
    f = torch.randn
    return em3.ops.qformer_attention(f(2, 4), f(2, 3, 8), f(4, 4), [f(4, 8)], [f(4, 8)], f(4, 4), num_heads=2, **{"strategy": "absorb"} | kwargs)


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that served, in order."""
    names = []
    real = _dispatch.choose

    def spy(*args):
        chosen = real(*args)
        names.append(chosen.__name__.split(".")[-2])
        return chosen

    monkeypatch.setattr(_dispatch, "choose", spy)
    return names


def test_every_backend_module_keeps_the_contract():
    for op, names in _dispatch.BACKENDS.items():
        assert names[-1] == "torch", "the backend that serves everything comes last"
        for name in names:
            module = _dispatch.module(op, name)
            assert all(callable(getattr(module, part)) for part in ("unavailable", "supports", "wins", "forward", "backward"))


def test_the_argument_wins_over_the_context_over_the_process(served):
    try:
        em3.set_backend("torch")
        call()
        with em3.use_backend("auto"):
            call()
            call(backend="torch")
        call()
    finally:
        em3.set_backend("auto")
    best = next(n for n in _dispatch.BACKENDS["qformer_attention"] if _dispatch.module("qformer_attention", n).unavailable() is None)
    assert served == ["torch", best, "torch", "torch"]


def test_use_backend_is_undone_by_an_error():
    with pytest.raises(KeyError), em3.use_backend("torch"):
        raise KeyError
    assert _dispatch.requested(None) == "auto"


@pytest.mark.parametrize("ask", [em3.set_backend, lambda name: em3.use_backend(name).__enter__(), lambda name: call(backend=name)])
def test_an_unknown_name(ask):
    with pytest.raises(ValueError, match=r"was 'tritn', must be one of auto, cpp, triton, torch; did you mean 'triton'"):
        ask("tritn")


def test_the_environment_variable():
    code = "import em3.ops._dispatch as d; print(d.requested(None))"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | {"EM3_BACKEND": "torch"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch"
    bad = subprocess.run(run, env=os.environ | {"EM3_BACKEND": "gpu"}, capture_output=True, text=True, check=False)
    assert bad.returncode
    assert "EM3_BACKEND: was 'gpu', must be one of" in bad.stderr


def test_a_backend_that_an_operation_lacks(monkeypatch):
    f = torch.randn
    monkeypatch.setitem(_dispatch.BACKENDS, "lora_linear", ("cpp", "torch"))
    with pytest.raises(em3.BackendError, match=r"lora_linear has no backend 'triton'; it has cpp, torch"):
        em3.ops.lora_linear(f(3, 4), f(5, 4), None, f(2, 4), f(5, 2), backend="triton")


def test_a_backend_that_cannot_serve_the_call():
    if _dispatch.module("qformer_attention", "cpp").unavailable():
        pytest.skip("em3._C is not built")
    f = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    args = (f(2, 4), f(2, 3, 8), f(4, 4), [f(4, 8)], [f(4, 8)], f(4, 4))
    with pytest.raises(em3.BackendError, match=r"backend 'cpp' cannot serve this call of qformer_attention: it computes in float32"):
        em3.ops.qformer_attention(*args, num_heads=2, strategy="absorb", backend="cpp")
    with pytest.raises(em3.BackendError, match=r"backend 'cpp' of qformer_attention serves strategy='absorb' only"):
        call(backend="cpp", strategy="project")
    em3.ops.qformer_attention(*args, num_heads=2, strategy="absorb")  # automatic choice serves it


def test_without_the_extension_the_reason_is_given(monkeypatch):
    cpp = _dispatch.module("qformer_attention", "cpp")
    monkeypatch.setattr(cpp, "unavailable", lambda: "no C++ compiler was found")
    with pytest.raises(em3.BackendError, match="no C\\+\\+ compiler was found"):
        call(backend="cpp")
    call()


def test_the_choice_is_said_once(caplog, monkeypatch):
    _dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="em3"):
        call()
        call()
    assert len([r for r in caplog.records if r.getMessage().startswith("qformer_attention runs on")]) == 1


def test_debug_checks_looks_where_it_otherwise_would_not():
    from em3.ops import _checks

    elsewhere = SimpleNamespace(numel=lambda: 3, device=torch.device("cuda"))
    assert not _checks.looks(elsewhere)
    with em3.debug_checks():
        assert _checks.looks(elsewhere)
    assert not _checks.looks(elsewhere)


@pytest.mark.parametrize("enter", [lambda: em3.use_backend("torch"), em3.debug_checks], ids=["use_backend", "debug_checks"])
def test_overlapping_threads_leave_nothing_behind(enter):
    """One enters before the other and leaves before it."""
    from em3.ops import _checks

    state = lambda: (_dispatch.requested(None), _checks._debug.on)  # noqa: E731
    before, inside, left, seen = state(), threading.Event(), threading.Event(), []

    def other():
        with enter():
            inside.set()
            left.wait()
            seen.append(state())
        seen.append(state())

    thread = threading.Thread(target=other)
    with enter():
        thread.start()
        inside.wait()
    assert state() == before, "another thread's choice holds here"
    left.set()
    thread.join()
    assert seen[0] != before, "another thread's leaving was felt"
    assert seen[1] == state() == before


def test_set_backend_holds_in_every_thread():
    seen = []
    em3.set_backend("torch")
    try:
        thread = threading.Thread(target=lambda: seen.append(_dispatch.requested(None)))
        thread.start()
        thread.join()
    finally:
        em3.set_backend("auto")
    assert seen == ["torch"]
