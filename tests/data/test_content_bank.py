"""The content bank: what is written is read back and by the attention, readers keep one version, nothing is lost unnoticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import em3
from em3 import reference
from em3.data.content_bank import ContentBank, ContentBankError
from em3.data.tensor_file import header_checksum
from em3.data.token_store import TokenStore, TokenStoreError
from em3.files import LockedError

from .. import oracle

DTYPES = (torch.float32, torch.bfloat16)


def counting(rows: Tensor, width: int = 6, plus: float = 0.0) -> Tensor:
    """Content that tells its row and version."""
    return (rows[:, None] + plus).expand(-1, width).float()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "content.bank"


@given(st.data())
@settings(max_examples=25)
def test_what_is_saved_is_opened(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n, width = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 5))
    dtype, strided = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows = torch.randn(n, width, generator=generator)
    if strided:
        rows = rows.t().contiguous().t()
    path = tmp_path_factory.mktemp("bank") / "b"
    memory = ContentBank(rows.to(dtype))
    memory.save(path, about={"step": 3})
    bank = ContentBank.open(path)
    bank.verify()
    assert (len(bank), bank.width, bank.dtype, bank.path, bank.about) == (n, width, dtype, path, {"step": 3})
    assert torch.equal(bank.rows, rows.to(dtype))
    made = ContentBank.create(path, n, width, lambda of: rows[of], dtype=dtype, chunk=data.draw(st.integers(1, 4)), about={"step": 3})
    assert torch.equal(made.rows, rows.to(dtype))
    assert memory.path is None
    assert bank.reload()
    assert sorted(p.name for p in path.parent.iterdir()) == [".b.lock", "b"]


def test_the_same_rows_make_the_same_file(path: Path) -> None:
    ContentBank(counting(torch.arange(9)).bfloat16()).save(path)
    once = path.read_bytes()
    ContentBank.create(path, 9, 6, counting, chunk=4)
    assert path.read_bytes() == once


def test_is_a_safetensors_file_and_no_token_store(path: Path) -> None:
    from safetensors import safe_open

    ContentBank(counting(torch.arange(3))).save(path)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("rows"), counting(torch.arange(3)))
    with pytest.raises(TokenStoreError, match=r"not a token store: it is a safetensors file of format 'em3\.content_bank'"):
        TokenStore.open(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("strategy", "backend"), [("absorb", "cpp"), ("absorb", "torch"), ("project", "torch")])
def test_the_attention_reads_it(path: Path, dtype: torch.dtype, strategy: str, backend: str) -> None:
    """Against the plain formulation in float64 on the rows as they are stored; gradients to the rest."""
    oracle.skip_unless_served(backend, torch.float32)
    ContentBank(torch.randn(301, 24).to(dtype)).save(path)
    bank, width, heads = ContentBank.open(path), 16, 4
    history = em3.Jagged(torch.randint(301, (60,)), torch.tensor([0, 50, 50, 60]))

    def rand(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * shape[-1] ** -0.5).requires_grad_()

    args = dict(
        target=rand(3, width), w_q=rand(width, width), w_k=rand(width, 24), w_v=rand(width, 24), w_o=rand(width, width),
        lora_k=(rand(2, 24), rand(width, 2), 0.5), lora_v=(rand(2, 24), rand(width, 2), 0.5), num_heads=heads,
    )  # fmt: skip

    def ours(**kwargs):
        return em3.ops.lora_target_attention(history=history, bank=bank.rows, strategy=strategy, backend=backend, **kwargs)

    def plain(**kwargs):
        return reference.lora_target_attention(history=history, bank=bank.rows.double(), **kwargs)

    oracle.check(ours, plain, args, torch.float32)


def test_written_rows_are_private_until_saved(path: Path) -> None:
    ContentBank(counting(torch.arange(2000))).save(path)
    bank, other = ContentBank.open(path), ContentBank.open(path)
    before = other.rows
    rows = torch.tensor([1999, 0, 7])
    bank.write(rows, counting(rows, plus=0.5).double())
    assert torch.equal(bank.rows[rows], counting(rows, plus=0.5))
    assert torch.equal(ContentBank.open(path).rows, counting(torch.arange(2000)))
    bank.verify()  # the file, not what this process has written

    bank.save()
    assert torch.equal(before, counting(torch.arange(2000)))
    assert torch.equal(other.rows, before), "a reader saw rows that it had not asked for"
    assert other.reload()
    assert torch.equal(other.rows, bank.rows)
    assert torch.equal(before, counting(torch.arange(2000))), "a view taken before a reload must stay"
    assert not other.reload()

    bank.write(rows, counting(rows, plus=9))
    assert not bank.reload()  # the same file, without what was not saved
    assert torch.equal(bank.rows, other.rows)


@pytest.mark.parametrize("file", [False, True])
def test_refresh(path: Path, file: bool) -> None:
    bank = ContentBank(torch.zeros(10, 6, dtype=torch.bfloat16))
    if file:
        bank.save(path, about={"version": 1})
        bank = ContentBank.open(path)
    seen: list[list[int]] = []

    def content(rows: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(rows.tolist())
        return counting(rows, plus=1)

    bank.refresh(content, chunk=4, progress=False)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(bank.rows, counting(torch.arange(10), plus=1).bfloat16())
    assert bank.about == ({"version": 1} if file else {})
    bank.refresh(content, about={"version": 2})
    assert bank.about == {"version": 2}
    if file:
        assert ContentBank.open(path).about == {"version": 2}
        bank.verify()


def test_what_refresh_says(path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = ContentBank(torch.zeros(10, 6))
    bank.refresh(counting)
    assert capfd.readouterr() == ("", ""), "a bar where there is no terminal"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bank.refresh(counting, chunk=2)
    assert "10.0/10.0" in capfd.readouterr().err
    bank.refresh(counting, progress=False)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"progress: needs tqdm .* or progress=False"):
        bank.refresh(counting)


def test_a_refresh_that_fails_leaves_the_file(path: Path) -> None:
    ContentBank(counting(torch.arange(10))).save(path)
    bank, whole = ContentBank.open(path), path.read_bytes()

    def failing(rows: Tensor) -> Tensor:
        if rows[0] >= 4:
            raise KeyboardInterrupt
        return counting(rows, plus=1)

    with pytest.raises(KeyboardInterrupt):
        bank.refresh(failing, chunk=4)
    with pytest.raises(KeyboardInterrupt):
        ContentBank.create(path, 10, 6, failing, chunk=4)
    assert path.read_bytes() == whole
    assert torch.equal(bank.rows, counting(torch.arange(10)))
    assert sorted(p.name for p in path.parent.iterdir()) == [".content.bank.lock", "content.bank"]


def test_two_writers(path: Path) -> None:
    """One at a time; and the one that opened an older file is told so instead of undoing the other's work."""
    ContentBank(counting(torch.arange(10))).save(path)
    first, second = ContentBank.open(path), ContentBank.open(path)

    def content(rows: Tensor) -> Tensor:
        with pytest.raises(LockedError, match=f"content.bank: process {os.getpid()} is writing it; let it end"):
            second.save()
        with pytest.raises(LockedError, match="is writing it"):
            second.refresh(counting)
        assert torch.equal(second.rows, counting(torch.arange(10)))
        return counting(rows, plus=1)

    first.refresh(content)
    for write in (second.save, lambda: second.refresh(counting)):
        with pytest.raises(ContentBankError, match=r"content\.bank: was replaced since it was opened, .* reload\(\) first"):
            write()
    second.save(path.with_name("another"))
    assert torch.equal(ContentBank.open(path.with_name("another")).rows, counting(torch.arange(10)))
    assert second.reload()
    second.write(torch.tensor([3]), torch.full((1, 6), 0.25))
    second.save()
    assert ContentBank.open(path).rows[3:5, 0].tolist() == [0.25, 5]
    path.unlink()  # nobody's work is undone by writing it again
    second.save()
    assert ContentBank.open(path).rows[3:5, 0].tolist() == [0.25, 5]


READING = """
import sys, torch
from em3 import ContentBank
bank = ContentBank.open(sys.argv[1])
print("open", flush=True)
for line in sys.stdin:
    if line == "reload\\n":
        bank.reload()
    versions = {round(v, 3) for v in (bank.rows[:, 0] - torch.arange(len(bank))).tolist()}
    print(*versions, flush=True)
"""


def test_readers_in_other_processes_see_one_version(path: Path) -> None:
    ContentBank(counting(torch.arange(5000))).save(path)
    bank = ContentBank.open(path)
    with subprocess.Popen([sys.executable, "-c", READING, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"

        def asked(word: str) -> str:
            reader.stdin.write(word + "\n")
            reader.stdin.flush()
            return reader.stdout.readline()

        def content(rows: Tensor) -> Tensor:
            assert asked("read" if rows[0] < 2000 else "reload") == "0.0\n", "rows of an unfinished refresh were read"
            return counting(rows, plus=1)

        bank.refresh(content, chunk=1000)
        assert asked("read") == "0.0\n"
        assert asked("reload") == "1.0\n"
        reader.stdin.close()
    assert reader.returncode == 0


def test_readers_in_threads_while_files_are_replaced(path: Path) -> None:
    ContentBank(counting(torch.arange(3000))).save(path)
    done, wrong = threading.Event(), []

    def read() -> None:
        bank, row = ContentBank.open(path), torch.arange(3000)
        while not done.is_set():
            bank.reload()
            versions = (bank.rows[:, 0] - row).unique()
            if len(versions) != 1:
                wrong.append(versions)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    bank = ContentBank.open(path)
    for version in range(1, 8):
        bank.refresh(lambda rows, version=version: counting(rows, plus=version), chunk=700)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


KILLED = """
import os, signal, sys
from em3 import ContentBank
def content(rows):
    if rows[0] > 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows[:, None].expand(-1, 6).float() + 5
ContentBank.open(sys.argv[1]).refresh(content, chunk=10)
"""


def test_a_killed_refresh(path: Path) -> None:
    ContentBank(counting(torch.arange(100))).save(path)
    assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -signal.SIGKILL
    assert len(list(path.parent.glob("*.tmp"))) == 1
    bank = ContentBank.open(path)
    bank.verify()
    assert torch.equal(bank.rows, counting(torch.arange(100)))
    bank.save()  # the kernel has given the lock back; what lay about is cleared away
    assert sorted(p.name for p in path.parent.iterdir()) == [".content.bank.lock", "content.bank"]


@pytest.mark.parametrize(("call", "message"), [
    (lambda b: b.write(torch.tensor([0, 9]), torch.zeros(2, 6)), r"rows: was 9, must be from 0 to 8: ContentBank\(.*content\.bank"),
    (lambda b: b.write(torch.tensor([-1]), torch.zeros(1, 6)), "rows: was -1, must be from 0 to 8"),
    (lambda b: b.write(torch.tensor([1.0]), torch.zeros(1, 6)), r"rows: was torch\.float32 \[1\], must be torch\.int64 \[U\]"),
    (lambda b: b.write(torch.tensor([3, 3]), torch.zeros(2, 6)), "rows: a row was there twice, must be distinct"),
    (lambda b: b.write(torch.tensor([3, 4]), torch.zeros(2, 5)), r"content: was torch\.float32 \[2, 5\], must be a floating-point tensor \[2, 6\]"),
    (lambda b: b.write(torch.tensor([3]), torch.zeros(2, 6)), r"content: was .* must be a floating-point tensor \[1, 6\]"),
    (lambda b: b.write(torch.tensor([3]), torch.zeros(1, 6, dtype=torch.int64)), r"content: was torch\.int64"),
    (lambda b: b.write(torch.tensor([3, 5]), torch.tensor([[0.0], [torch.nan]]).expand(2, 6)), "content: of row 5 was not finite"),
    (lambda b: b.write(torch.tensor([3]), torch.full((1, 6), 1e300, dtype=torch.float64)), r"row 3 was not finite in torch\.float32"),
    (lambda b: b.refresh(lambda rows: torch.zeros(len(rows), 5)), r"content: was torch\.float32 \[9, 5\], must be .* \[9, 6\]"),
    (lambda b: b.refresh(lambda rows: counting(rows) / (rows[:, None] - 8)), "content: of row 8 was not finite"),
    (lambda b: b.refresh(counting, chunk=0), "chunk: was 0, must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_written(path: Path, call, message: str) -> None:
    ContentBank(counting(torch.arange(9))).save(path)
    bank, whole = ContentBank.open(path), path.read_bytes()
    with pytest.raises(ValueError, match=message):
        call(bank)
    assert torch.equal(bank.rows, counting(torch.arange(9)))
    assert path.read_bytes() == whole


def test_what_is_no_bank(path: Path) -> None:
    for rows in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 2).half(), torch.zeros(3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"rows: was torch\..* must be torch\.float32 or torch\.bfloat16 \[n, C\]"):
            ContentBank(rows)
    with pytest.raises(ValueError, match=r"rows: was torch\.float16"):
        ContentBank.create(path, 3, 6, counting, dtype=torch.float16)
    memory = ContentBank(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="path: was None, must be the path of a file for a bank in memory"):
        memory.save()
    for call in (memory.reload, memory.verify):
        with pytest.raises(ValueError, match="the bank is in memory, only"):
            call()
    assert list(path.parent.iterdir()) == []


def test_truncated_damaged_and_newer_files(path: Path, seed: int) -> None:
    ContentBank(counting(torch.arange(50))).save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (0, 5, 8, 8 + length - 1, 8 + length, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ContentBankError, match=f"^{path}: .* long") as error:
            ContentBank.open(path)
        assert "bank" in str(error.value) or "cut off" in str(error.value)
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(8 + length, len(whole), (10,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ContentBankError, match="damaged: rows; write the bank again"):
            ContentBank.open(path).verify()
    header = json.loads(whole[8 : 8 + length])
    metadata = header.pop("__metadata__") | {"version": "2"}
    del metadata["header_checksum"]
    text = json.dumps({"__metadata__": metadata | {"header_checksum": header_checksum(metadata, header)}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(ContentBankError, match="format version 2, this em3 reads up to 1"):
        ContentBank.open(path)
    path.write_bytes(whole)
    bank = ContentBank.open(path)
    path.write_bytes(b"x")  # by someone who keeps to nothing: the old inode, cut to one byte, so only the header may be read
    with pytest.raises(ContentBankError, match="1 bytes long"):
        ContentBank.open(path)
    assert len(bank) == 50


def _child(bank: ContentBank, pipe) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    bank.write(torch.tensor([2]), torch.full((1, 6), -1.0))
    pipe.send(bank.rows[:, 0].tolist())


def test_pickled_and_forked(path: Path) -> None:
    memory = pickle.loads(pickle.dumps(ContentBank(counting(torch.arange(4)))))
    assert torch.equal(memory.rows, counting(torch.arange(4)))
    memory.save(path)
    bank = ContentBank.open(path)
    assert len(pickle.dumps(bank)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(bank)).rows, memory.rows)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(bank, there))
    child.start()
    assert here.poll(60), "the child said nothing"
    assert here.recv() == [0, 1, -1, 3]
    child.join()
    assert torch.equal(bank.rows, memory.rows), "a child wrote into its parent's bank"
    bank.write(torch.tensor([2]), torch.full((1, 6), -1.0))
    with pytest.raises(ContentBankError, match=r"rows were written and not saved, .* save\(\) first"):
        pickle.dumps(bank)


def test_wrong_kinds_of_things(tmp_path):
    """Each is told what it was and what makes the right one; nothing is left in the folder."""
    bank = ContentBank(torch.zeros(3, 4))
    folder = re.escape(str(tmp_path))
    for call, error, message in [
        (lambda: ContentBank.open(tmp_path / "none"), FileNotFoundError, f"^{folder}/none: is not there, must be a content bank; Con"),
        (lambda: ContentBank.open(tmp_path), IsADirectoryError, f"^{folder}: is a folder, must be a content bank"),
        (lambda: bank.save(tmp_path), IsADirectoryError, f"^{folder}: is a folder, must be the name of a file"),
        (lambda: ContentBank([[1.0]]), ValueError, r"^rows: was list, must be a tensor \[n, C\]; ContentBank.open"),
        (lambda: bank.write([1], torch.zeros(1, 4)), ValueError, "^rows: was list, must be a tensor"),
        (lambda: bank.write(torch.tensor([1], device="meta"), torch.zeros(1, 4)), ValueError, "^rows: was on meta"),
        (lambda: bank.write(torch.tensor([1]), [1.0]), ValueError, r"^content: was list, must be a floating-point tensor \[1, 4\]"),
        (lambda: bank.refresh(torch.zeros(3, 4)), ValueError, r"^content: was Tensor, must be a function of row numbers"),
        (lambda: bank.refresh(lambda rows: None), ValueError, "^content: was NoneType, must be a floating-point tensor"),
        (lambda: bank.save(tmp_path / "b", about={"a": object()}), ValueError, "^about: was .* must be names with what JSON can hold"),
        (lambda: ContentBank.create(tmp_path / "b", -1, 4, lambda rows: None), ValueError, "^num_rows: was -1, must be an integer of"),
        (lambda: ContentBank.create(tmp_path / "b", 3, 4.0, lambda rows: None), ValueError, "^width: was 4.0, must be an integer of"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    (tmp_path / "file").write_text("")
    for call in (lambda: bank.save(tmp_path / "file" / "b"), lambda: ContentBank.open(tmp_path / "file" / "b")):
        with pytest.raises(NotADirectoryError, match=f"^{folder}/file"):
            call()
