"""``ContentBank``: the content embeddings of a catalogue, in memory or mapped from a file, for histories to be read out of.

The file is a safetensors file with one tensor, ``rows [n, C]``; its metadata hold the format's version, what the writer
said about the content, and checksums. It is never changed: whoever changes rows writes a new file and gives it the name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic, written_by_us
from ..ops import _checks
from .tensor_file import Kind, TensorFile, TensorFileWriter, as_json, check_rows

DTYPES = (torch.float32, torch.bfloat16)
ROWS = "rows"
_PIECE = 2**24  # bytes written at a time

Content = Callable[[Tensor], Tensor]


class ContentBankError(ValueError):
    """A file that is not a content bank, not whole, damaged, replaced or of a newer format; the message begins with its path."""


KIND = Kind("em3.content_bank", 1, "content bank", ContentBankError, "ContentBank(rows).save(path) or ContentBank.create")


class ContentBank:
    """Content embeddings ``[n, C]`` in float32 or bfloat16.

    :attr:`rows` is a plain tensor over them, which :func:`em3.ops.lora_target_attention` reads as it is::

        ContentBank(model.bank).save("content.bank")      # publish
        bank = ContentBank.open("content.bank")           # serve: mapped, nothing is read yet
        read = em3.ops.lora_target_attention(target, history, bank.rows, ...)

    Readers and one writer at a time, in any number of processes: a reader sees the bank as it was when it opened it, all
    of one version, until it calls :meth:`reload`; tensors taken from :attr:`rows` before stay what they were. A writer
    that is killed, or stopped by an error, leaves the old file. A second writer of the same file gets a ``LockedError`` at
    once, and one whose file was replaced meanwhile a :class:`ContentBankError`, so that nobody's rows are lost unnoticed.
    Within one process a bank may be read from many threads, and written from one while nobody reads these rows.

    A bank in a file may be larger than memory: rows are read from the disk as they are touched, and the system takes their
    pages back when it needs them. What :meth:`write` changes takes a page of memory (4 KiB) a row until it is saved. A
    pickled bank is its file, opened again.

    Args:
        rows: ``[n, C]`` float32 or bfloat16, shared with the bank, which is in memory (on any device) and not in a file.

    Raises:
        ValueError: for another dtype or shape.
    """

    def __init__(self, rows: Tensor) -> None:
        if not isinstance(rows, Tensor):
            raise ValueError(f"rows: was {type(rows).__name__}, must be a tensor [n, C]; ContentBank.open(path) reads a file")
        if rows.dim() != 2 or rows.shape[1] < 1 or rows.dtype not in DTYPES:
            was, must = f"{rows.dtype} {list(rows.shape)}", " or ".join(map(str, DTYPES))
            raise ValueError(f"rows: was {was}, must be {must} [n, C], 1 or more wide")
        self._rows = rows.detach()
        self._file: TensorFile | None = None
        self._about: dict[str, Any] = {}
        self._written = False  # rows that the file does not have

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ContentBank:
        """Map the file; only its header is read. Damage to the rows is for :meth:`verify` to find.

        Raises:
            ContentBankError: naming the path and what is wrong with it.
            OSError: if there is no such file, or it cannot be read or mapped.
        """
        bank = cls.__new__(cls)
        bank._map(path)
        return bank

    @classmethod
    def create(cls, path: str | os.PathLike[str], num_rows: int, width: int, content: Content, *,
               dtype: torch.dtype = torch.bfloat16, about: Mapping[str, Any] | None = None, chunk: int = 1024,
               progress: bool = True) -> ContentBank:  # fmt: skip
        """Write a file chunk by chunk, as for a bank that does not fit into memory, and open it.

        Args:
            path: of the file; one that is there is replaced at the end.
            num_rows, width: ``n`` and ``C``.
            content, chunk, progress: as in :meth:`refresh`.
            dtype: float32 or bfloat16.
            about: what produced the content; anything that JSON can hold.

        Raises:
            ValueError: as :meth:`refresh`, and for a dtype or width that is not right.
            OSError: also before anything is computed, if the disk has not enough room.
        """
        for name, value, least in (("num_rows", num_rows, 0), ("width", width, 1)):
            if not _checks.is_count(value) or value < least:
                raise ValueError(f"{name}: was {value!r}, must be an integer of at least {least}")
        cls(torch.empty(0, width, dtype=dtype))
        with written_by_us(path):
            chunks = _contents(content, num_rows, width, dtype, chunk, progress)
            _write(path, (num_rows, width), dtype, about or {}, (stored for _, stored in chunks))
        return cls.open(path)

    @property
    def rows(self) -> Tensor:
        """``[n, C]``, a view. Writing to it, rather than by :meth:`write`, is not noticed by :meth:`save` and others."""
        return self._rows

    @property
    def width(self) -> int:
        """``C``."""
        return self._rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def path(self) -> Path | None:
        """Of the file that is mapped; None for a bank in memory."""
        return None if self._file is None else self._file.path

    @property
    def about(self) -> dict[str, Any]:
        """What the writer of the file said about the content."""
        return self._about

    def __len__(self) -> int:
        return self._rows.shape[0]

    def write(self, rows: Tensor, content: Tensor) -> None:
        """Replace some rows in memory; a file that is mapped has them only after :meth:`save`.

        Args:
            rows: ``[U]`` int64, distinct.
            content: ``[U, C]`` of any floating-point dtype, finite.

        Raises:
            ValueError: naming the argument, what it was and what it must be; then nothing was written.
        """
        check_rows(rows, len(self), repr(self))
        if len(rows.unique()) < len(rows):
            raise ValueError("rows: a row was there twice, must be distinct")
        stored = _stored(content, rows, self.width, self.dtype)
        self._rows.index_copy_(0, rows.to(self._rows.device), stored.to(self._rows.device))
        self._written = True

    def refresh(self, content: Content, *, about: Mapping[str, Any] | None = None, chunk: int = 1024,
                progress: bool = True) -> None:  # fmt: skip
        """Recompute all rows: of a bank in memory in place, chunk by chunk; of one in a file by writing a new file.

        Args:
            content: row numbers ``[U]`` int64 -> their content ``[U, C]``, finite; called without autograd.
            about: as in :meth:`create`; what was said before by default.
            chunk: rows at a time.
            progress: show a bar (tqdm's) if standard error is a terminal.

        Raises:
            ValueError: if ``content`` gives another shape, or NaN or infinity. A file is then the old one; a bank in memory
                keeps the chunks that were done.
            ContentBankError: if the file has been replaced since it was opened.
            LockedError: if another writer is at work on it.
        """
        about = self._about if about is None else about
        chunks = _contents(content, len(self), self.width, self.dtype, chunk, progress)
        if self.path is None:
            for rows, stored in chunks:
                self._rows[rows[0] : rows[-1] + 1] = stored.to(self._rows.device)
            self._about = dict(about)
            return
        with written_by_us(self.path):
            self._check_is_the_same()
            _write(self.path, (len(self), self.width), self.dtype, about, (stored for _, stored in chunks))
            self._map(self.path)

    def save(self, path: str | os.PathLike[str] | None = None, *, about: Mapping[str, Any] | None = None) -> None:
        """Write all rows to a file, whole or not at all.

        Args:
            path: of the file; the one that is mapped by default, which is then mapped anew.
            about: as in :meth:`refresh`.

        Raises:
            ValueError: if a bank in memory is given no path.
            ContentBankError: if the file that was mapped has been replaced since.
            LockedError: if another writer is at work on it.
        """
        target = self.path if path is None else Path(path)
        if target is None:
            raise ValueError("path: was None, must be the path of a file for a bank in memory")
        target = target.resolve()
        own = target == self.path
        with written_by_us(target):
            if own:
                self._check_is_the_same()
            step = max(1, _PIECE // (self.width * self.dtype.itemsize))
            pieces = (piece.cpu() for piece in self._rows.split(step))
            _write(target, tuple(self._rows.shape), self.dtype, self._about if about is None else about, pieces)
            if own:
                self._map(target)

    def reload(self) -> bool:
        """Map the file that has the path now; whether it is another one. Rows that were written and not saved are dropped.

        Raises:
            ValueError: for a bank in memory.
            ContentBankError, OSError: as :meth:`open`; the bank is then what it was.
        """
        if self.path is None:
            raise ValueError("reload: the bank is in memory, only one of a file can be loaded again")
        replaced = self._replaced()
        if replaced or self._written:
            self._map(self.path)
        return replaced

    def verify(self) -> None:
        """Read the whole file and compare it with the checksum made by the writer.

        Raises:
            ValueError: for a bank in memory.
            ContentBankError: if the file is damaged.
        """
        if self._file is None:
            raise ValueError("verify: the bank is in memory, only a file has a checksum")
        self._file.verify()

    def _map(self, path: str | os.PathLike[str]) -> None:
        # Of a path that is resolved once: the working directory may change, and a link stays a link.
        file = TensorFile(Path(path).resolve(), KIND, private=True)
        self._file, self._rows, self._written = file, file.tensor(ROWS), False
        self._about = json.loads(file.metadata["about"])

    def _replaced(self) -> bool:
        """Whether the path is another file's now; one that is gone is nobody's."""
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self._file.path)
            return (status.st_dev, status.st_ino) != self._file.identity
        return False

    def _check_is_the_same(self) -> None:
        if self._replaced():
            raise ContentBankError(f"{self.path}: was replaced since it was opened, and writing would undo that; reload() first "
                                   "and write the rows again, or save to another path")  # fmt: skip

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        if self.path is None:
            return ContentBank, (self._rows,)
        if self._written:
            raise ContentBankError(f"{self.path}: rows were written and not saved, and a pickled bank is its file; save() first")
        return ContentBank.open, (self.path,)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        return f"ContentBank({where}, rows={len(self)}, width={self.width}, dtype={self.dtype})"


def _contents(content: Content, num_rows: int, width: int, dtype: torch.dtype, chunk: int,
              progress: bool) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Row numbers ``[U]`` and what is stored for them ``[U, C]``, from the first row to the last."""
    if chunk < 1:
        raise ValueError(f"chunk: was {chunk}, must be at least 1")
    if not callable(content):
        raise ValueError(f"content: was {type(content).__name__}, must be a function of row numbers [U] that returns [U, {width}]")
    bar: Any = contextlib.nullcontext()
    if progress:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            raise ImportError("progress: needs tqdm (pip install tqdm), or progress=False") from error
        bar = tqdm(total=num_rows, desc="content", unit="row", unit_scale=True, disable=None)
    with bar as shown:
        for start in range(0, num_rows, chunk):
            rows = torch.arange(start, min(start + chunk, num_rows))
            with torch.no_grad():
                found = content(rows)
            yield rows, _stored(found, rows, width, dtype)
            if shown is not None:
                shown.update(len(rows))


def _stored(content: Tensor, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``content`` as it is stored, if it is fit to be."""
    fits = isinstance(content, Tensor) and content.is_floating_point() and list(content.shape) == [len(rows), width]
    if not fits:
        was = f"{content.dtype} {list(content.shape)}" if isinstance(content, Tensor) else type(content).__name__
        must = f"a floating-point tensor {[len(rows), width]}"
        raise ValueError(f"content: was {was}, must be {must}")
    stored = content.detach().to(dtype)
    # One NaN would reach every user whose history names the row.
    finite = stored.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"content: of row {int(rows[~finite.cpu()][0])} was not finite in {dtype}, must be")
    return stored


def _write(path: str | os.PathLike[str], shape: tuple[int, ...], dtype: torch.dtype, about: Mapping[str, Any],
           pieces: Iterable[Tensor]) -> None:  # fmt: skip
    shapes = {ROWS: (dtype, list(shape))}
    said = as_json(about)
    with atomic(path) as file:
        writer = TensorFileWriter(file, KIND, {"about": said}, shapes)
        if hasattr(os, "posix_fallocate"):  # better a full disk now than after hours
            os.posix_fallocate(file.fileno(), 0, writer.begin + shape[0] * shape[1] * dtype.itemsize)
        for piece in pieces:
            writer.write(ROWS, piece.cpu())
        writer.finish(shapes)
