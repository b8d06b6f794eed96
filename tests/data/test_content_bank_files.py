"""The file of a content bank: on a full disk, larger than memory, under a limit, and wherever the process goes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import em3
from em3.data.content_bank import ContentBank
from em3.data.tensor_file import header_checksum


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "content.bank"


def test_a_full_disk_is_found_before_anything_is_computed(path: Path) -> None:
    def content(rows: Tensor) -> Tensor:
        raise AssertionError("computed for a file that cannot be")

    ContentBank(torch.arange(4.0)[:, None]).save(path)
    with pytest.raises(OSError, match=r"No space left|too large"):
        ContentBank.create(path, 2**52, 64, content)
    assert torch.equal(ContentBank.open(path).rows, torch.arange(4.0)[:, None])
    assert sorted(p.name for p in path.parent.iterdir()) == [".content.bank.lock", "content.bank"]


def grown(path: Path, rows: int, width: int) -> None:
    """A bank of so many bf16 rows, all of it a hole in the file but the header; row 0 is of ones."""
    ContentBank(torch.ones(1, width, dtype=torch.bfloat16)).save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    metadata = header.pop("__metadata__")
    del metadata["header_checksum"]
    header["rows"] |= {"shape": [rows, width], "data_offsets": [0, rows * width * 2]}
    metadata["header_checksum"] = header_checksum(metadata, header)
    text = json.dumps({"__metadata__": metadata} | header).encode().ljust(length + 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        file.truncate(8 + len(text) + rows * width * 2)


def own_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: a process's memory cannot be asked for")
def test_a_bank_larger_than_memory(path: Path) -> None:
    """64 GiB: opened at once, read and written row by row."""
    rows, width = 2**27, 256
    grown(path, rows, width)
    start = time.perf_counter()
    bank = ContentBank.open(path)
    assert time.perf_counter() - start < 1
    named = torch.randint(1, rows, (4, 1000))
    named[:, ::10] = 0
    args = [torch.randn(4, 8), named, bank.rows, torch.eye(8), torch.randn(8, width), torch.randn(8, width), torch.eye(8)]
    how = dict(num_heads=2, strategy="absorb")
    em3.ops.lora_target_attention(*args, **how)  # what is set up in a first call should not count
    before = own_memory()
    out = em3.ops.lora_target_attention(*args, **how)
    assert own_memory() - before < 4 * 1000 * width * 2, "rows were gathered"
    small = torch.cat([torch.ones(1, width), torch.zeros(1, width)])
    want = em3.ops.lora_target_attention(args[0], (named > 0).long(), small, *args[3:], **how)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    before = own_memory()
    bank.write(named[0].unique(), torch.full((len(named[0].unique()), width), 0.5))
    assert own_memory() - before < 3 * 4096 * 1000, "more pages than the rows touched"
    assert bank.rows[named[0, 1]].unique().tolist() == [0.5]


LIMITED = """
import resource, sys
from em3 import ContentBank
resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
try:
    ContentBank.open(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_limit_on_what_may_be_mapped(path: Path) -> None:
    grown(path, 2**24, 256)
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert f"{path}: 8,589,934,912 bytes cannot be mapped" in done.stdout
    assert "ulimit -d" in done.stdout


def test_a_bank_stays_its_file_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ContentBank(torch.ones(3, 2)).save("bank")
    Path("link").symlink_to("bank")
    bank, linked = ContentBank.open("bank"), ContentBank.open("link")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bank.write(torch.tensor([1]), torch.zeros(1, 2))
    bank.save()
    bank.save(tmp_path / "elsewhere" / ".." / "bank")
    assert linked.reload()
    assert linked.rows[1].tolist() == [0, 0]
    linked.save()
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["bank", "elsewhere", "link"]
