"""Named tensors in one file that is read through a memory map: safetensors, with a format's name, version and checksums.

The header's length is fixed before its content is known, so that a file is written in one pass, in any order.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ALIGNMENT = 64  # where the data begin; every dtype in the file divides it
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors format
# Python names it from 3.13 on. Without it Linux refuses to map more privately than the machine has memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

Shapes = Mapping[str, tuple[torch.dtype, list[int]]]  # of the tensors, in the order of their data


class Kind(NamedTuple):
    """What a file is, and how its faults are called."""

    format: str  # as the metadata say
    version: int  # the newest that this em3 reads, and the one that it writes
    name: str  # for people, as "token store"
    error: type[ValueError]
    maker: str  # what writes one

    @property
    def remedy(self) -> str:
        return f"write the {self.name.split()[-1]} again"


class TensorFile:
    """An open file of a kind; only its header has been read.

    Args:
        path: of the file.
        private: tensors may be written to: what is written stays in the memory of this process, the file as it is.

    Raises:
        ValueError: of the kind's own class, naming the path and what is wrong with it.
        OSError: if there is no such file, or it cannot be read or mapped.
    """

    def __init__(self, path: str | os.PathLike[str], kind: Kind, *, private: bool = False) -> None:
        self.path, self.kind = Path(path), kind
        with _opened(self.path, kind) as file:
            status = os.fstat(file.fileno())
            self.identity = status.st_dev, status.st_ino  # no other file's while this one is mapped
            self.metadata, self.entries, begin = _read_header(self.path, file, status.st_size, kind)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            own = _private(self.path, file, status.st_size) if private else mapped
        with warnings.catch_warnings():
            # torch warns that the memory is not writable; no tensor that shares it is handed out.
            warnings.simplefilter("ignore", UserWarning)
            self._stored = torch.frombuffer(mapped, dtype=torch.uint8)[begin:]
            self._data = torch.frombuffer(own, dtype=torch.uint8)[begin:]

    def tensor(self, name: str) -> Tensor:
        """A view of the map; not to be written to unless the file was opened as ``private``."""
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        return self._data[begin:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def verify(self) -> None:
        """Read everything and compare it with the checksums made by the writer.

        Raises:
            ValueError: of the kind's own class, naming the tensors that are damaged.
        """
        checksums = json.loads(self.metadata["checksums"])
        damaged = []
        for name, entry in self.entries.items():
            begin, end = entry["data_offsets"]
            if _hex(zlib.crc32(self._stored[begin:end].numpy().data)) != checksums[name]:
                damaged.append(name)
        if damaged:
            raise self.kind.error(f"{self.path}: damaged: {', '.join(damaged)}; {self.kind.remedy}")


class TensorFileWriter:
    """Writes a file of a kind into ``file``, whose place stands at the data's beginning, :attr:`begin`, afterwards.

    Args:
        metadata: what a reader finds in :attr:`TensorFile.metadata`, next to the writer's own.
        longest: the shapes that make the longest header.
    """

    def __init__(self, file: BinaryIO, kind: Kind, metadata: Mapping[str, str], longest: Shapes) -> None:
        self._file, self._checksums = file, dict.fromkeys(longest, 0)
        self._metadata = {"format": kind.format, "version": str(kind.version)} | dict(metadata)
        self.begin = -(-(8 + len(self._header(longest))) // _ALIGNMENT) * _ALIGNMENT
        file.seek(self.begin)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next bytes of a tensor, at the file's place; they must come in their order."""
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        self._checksums[name] = zlib.crc32(raw, self._checksums[name])
        self._file.write(raw)

    def finish(self, shapes: Shapes) -> None:
        header = self._header(shapes).ljust(self.begin - 8)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(header)) + header)

    def _header(self, shapes: Shapes) -> bytes:
        entries, begin = {}, 0
        for name, (dtype, shape) in shapes.items():
            end = begin + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
            begin = end
        checksums = {name: _hex(self._checksums[name]) for name in shapes}
        metadata = self._metadata | {"checksums": json.dumps(checksums)}
        metadata["header_checksum"] = header_checksum(metadata, entries)
        return json.dumps({"__metadata__": metadata} | entries).encode()


def _opened(path: Path, kind: Kind) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: is not there, must be a {kind.name}; {kind.maker} writes one") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        was = "is a folder" if path.is_dir() else "lies in what is a file"
        raise type(error)(f"{path}: {was}, must be a {kind.name}; {kind.maker} writes one") from None


def _private(path: Path, file: BinaryIO, size: int) -> mmap.mmap:
    """The file as memory of this process, of which it takes only what is written to."""
    flags, rights = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=rights)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {size:,} bytes cannot be mapped ({error.strerror}): raise the limit on a process's "
                      "data (ulimit -d, or vm.overcommit_memory if that is 2)") from None  # fmt: skip


def check_rows(rows: Tensor, count: int, where: str) -> None:
    """``rows [U]`` are int64 numbers of ``count`` rows of ``where``."""
    if not isinstance(rows, Tensor):
        raise ValueError(f"rows: was {type(rows).__name__}, must be a tensor, torch.int64 [U]")
    if rows.is_meta:
        raise ValueError("rows: was on meta, must be on a device that holds data")
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows: was {rows.dtype} {list(rows.shape)}, must be torch.int64 [U]")
    outside = (rows < 0) | (rows >= count)
    if outside.any():
        raise ValueError(f"rows: was {int(rows[outside][0])}, must be from 0 to {count - 1}: {where}")


def _read_header(path: Path, file: BinaryIO, size: int, kind: Kind) -> tuple[dict[str, str], dict[str, Any], int]:
    """The metadata, the tensors' entries, and the place where the data begin."""
    foreign = f"{path}: is not a {kind.name}"
    if size < 8:
        raise kind.error(f"{foreign}: it is {size} bytes long, the header alone is longer")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST_HEADER:
        raise kind.error(f"{foreign}: it does not begin like a safetensors file")
    if size < 8 + length:
        raise kind.error(f"{path}: is {size} bytes long, must be longer than {8 + length}: it is cut off or foreign")
    try:
        entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__")
        own = metadata["format"] == kind.format
        version = int(metadata["version"]) if own else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise kind.error(f"{foreign}, or its header is damaged") from None
    if not own:
        raise kind.error(f"{foreign}: it is a safetensors file of format {metadata['format']!r}")
    if version > kind.version:
        raise kind.error(f"{path}: is of format version {version}, this em3 reads up to {kind.version}: use a newer em3")
    checksum = metadata.pop("header_checksum", None)
    if checksum != header_checksum(metadata, entries):
        raise kind.error(f"{path}: its header is damaged; {kind.remedy}")
    must = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    if size != must:
        raise kind.error(f"{path}: is {size} bytes long, must be {must}: it is {'cut off' if size < must else 'too long'}")
    return metadata, entries, 8 + length


def as_json(about: Mapping[str, Any]) -> str:
    """What a writer says about the content."""
    try:
        return json.dumps(dict(about))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: was {about!r}, must be names with what JSON can hold ({error})") from None


def header_checksum(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> str:
    return _hex(zlib.crc32(json.dumps([metadata, entries]).encode()))


def _hex(checksum: int) -> str:
    """Always equally long, so that the header's length does not depend on it."""
    return f"{checksum:08x}"
