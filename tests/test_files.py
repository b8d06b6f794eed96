"""Whatever happens to a writer: readers find the old content or the new one, and a locked folder is free again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from em3.files import LockedError, atomic, locked, whole_lines, written_by_us


def test_new_content_in_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with atomic(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic(str(path)) as file:  # noqa: PT012
        file.write(b"new")
        file.flush()
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").resolve()
        calls.append("fsync folder" if path.is_dir() else f"fsync {path.stat().st_size} bytes")
        real["fsync"](number)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real["replace"](source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc: an open file's name cannot be asked for")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic(tmp_path / "file") as file:
        file.write(b"12345")
    assert calls == ["fsync 5 bytes", "replace", "fsync folder"]


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, sys, signal\nfrom em3.files import atomic\n"
        "with atomic(sys.argv[1]) as file:\n"
        "    file.write(b'new' * 9999)\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    with atomic(path) as file:  # what the killed one left behind is in nobody's way
        file.write(b"newer")
    assert path.read_bytes() == b"newer"


def test_whole_lines(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "none") == []
    (tmp_path / "file").write_text('{"a": 1}\n"words"\n{"a": 2')
    assert whole_lines(tmp_path / "file") == [{"a": 1}, "words"]


HOLDING = """
import os, signal, sys
from em3.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with subprocess.Popen([sys.executable, "-c", HOLDING, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"^{folder}: process {holder.pid} is at work in it; let it end, or"), locked(folder):
            pass
        holder.communicate(b"\n")
    assert holder.returncode == -signal.SIGKILL
    for _ in range(2):
        with locked(folder):
            assert (folder / ".lock").read_text() == str(os.getpid())


def test_a_child_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_killed_writer_left_and_what_another_still_writes(tmp_path: Path) -> None:
    left, other = tmp_path / ".bank.123.tmp", tmp_path / ".bank.v2.123.tmp"
    left.touch()
    other.touch()
    with written_by_us(tmp_path / "bank"):
        assert not left.exists()
        assert other.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refusing(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refusing)
    with locked(tmp_path):
        assert "cannot be locked ([Errno 95] Operation not supported): take care" in caplog.text
