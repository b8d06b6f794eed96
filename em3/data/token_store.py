"""Tokens of every item of a catalogue on disk, one sequence of any length per item and stream, read through a memory map.

The file is a safetensors file: every tool that knows the format shows its tensors. ``streams.NAME.values [T, C]`` and
``streams.NAME.offsets [n + 1]`` hold a stream, ``item_ids.*`` the items' names in UTF-8, the metadata hold the format's
version, what the writer said about the tokens, and checksums.

Why this container: measured on one core, pages in memory, 1,100 random items x 34 tokens x 128 in float16, an Arrow IPC
file reads as fast (2.9 ms both, most of it the conversion to float32) and opens slower (0.25 ms against 0.17), slices
through the safetensors package take 65 ms, and an own header over raw bytes would be mapped just like this one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import atomic
from ..jagged import Jagged, check_offsets_form
from .tensor_file import Kind, Shapes, TensorFile, TensorFileWriter, as_json, check_rows

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TokenStoreError(ValueError):
    """A file that is not a token store, not whole, damaged, or of a newer format; the message begins with its path."""


KIND = Kind("em3.token_store", 1, "token store", TokenStoreError, "TokenStore.write")


class TokenStore:
    """An open token store; :meth:`open` makes one, :meth:`write` and :meth:`writer` make the file.

    Reading is safe in several threads at once, and after a fork (where torch itself wants one thread in the child, as
    DataLoader's workers have). A pickled store is its path, opened again.
    """

    def __init__(self, file: TensorFile) -> None:
        self.path, self._file = file.path, file
        self._values = {name: file.tensor(f"streams.{name}.values") for name in self.names}
        self._offsets = {name: file.tensor(f"streams.{name}.offsets") for name in self.names}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenStore:
        """Map the file; only its header is read. Damage to the data is for :meth:`verify` to find.

        Raises:
            TokenStoreError: naming the path and what is wrong with it.
            OSError: if there is no such file, or it cannot be read.
        """
        return cls(TensorFile(path, KIND))

    @property
    def names(self) -> list[str]:
        """The streams, in the order in which they were written."""
        matches = (re.fullmatch(r"streams\.(.*)\.values", key, re.DOTALL) for key in self._file.entries)
        return [match[1] for match in matches if match]

    @property
    def widths(self) -> dict[str, int]:
        """``C`` of each stream."""
        return {name: values.shape[1] for name, values in self._values.items()}

    @property
    def num_items(self) -> int:
        return int(self._file.entries["item_ids.offsets"]["shape"][0]) - 1

    @property
    def dtype(self) -> torch.dtype:
        """What the values are stored in."""
        return DTYPES[self._file.metadata["dtype"]]

    @property
    def about(self) -> dict[str, Any]:
        """What the writer said about the tokens."""
        about: dict[str, Any] = json.loads(self._file.metadata["about"])
        return about

    @property
    def item_ids(self) -> list[str]:
        """The items' names in the order of the rows, decoded anew at each call."""
        names = self._file.tensor("item_ids.values").numpy().tobytes()
        ends = self._file.tensor("item_ids.offsets").tolist()
        return [names[a:b].decode() for a, b in itertools.pairwise(ends)]

    def read(self, rows: Tensor, dtype: torch.dtype | None = torch.float32) -> list[Jagged]:
        """The tokens of some items, one :class:`em3.Jagged` a stream: values ``[T, C]``, offsets ``[U + 1]`` int64.

        Args:
            rows: ``[U]`` int64 on the CPU, numbers of items from 0, in any order and as often as wanted.
            dtype: of the values; None for what they are stored in, which ``em3.ops`` read as it is.

        Raises:
            ValueError: if ``rows`` is of another shape or dtype, or a row is not in the store.
            TokenStoreError: if the offsets of these items are damaged.
        """
        check_rows(rows, self.num_items, str(self.path))
        return [self._read(name, rows, dtype) for name in self.names]

    def _read(self, name: str, rows: Tensor, dtype: torch.dtype | None) -> Jagged:
        values, numbers = self._values[name], rows.numpy()
        offsets = self._offsets[name].numpy()  # numpy's calls take a fifth of torch's time, and a batch feels it
        first, last = offsets[numbers], offsets[numbers + 1]  # [U]
        length = last - first
        if len(rows) and (first.min() < 0 or length.min() < 0 or last.max() > len(values)):
            raise TokenStoreError(f"{self.path}: the offsets of stream {name!r} are damaged; write the store again")
        out = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(length, out=out[1:])
        token = np.arange(out[-1]) + np.repeat(first - out[:-1], length)  # [T]
        read = values.index_select(0, torch.from_numpy(token))
        return Jagged(read.to(dtype or read.dtype), torch.from_numpy(out))

    def verify(self) -> None:
        """Read everything and compare it with the checksums made by the writer.

        Raises:
            TokenStoreError: naming the tensors that are damaged.
        """
        self._file.verify()

    @classmethod
    def write(cls, path: str | os.PathLike[str], streams: Mapping[str, tuple[Tensor, Tensor]], *,
              item_ids: Sequence[str], about: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:  # fmt: skip
        """Write a store in one go; whatever stops the writer, ``path`` is the old file or the whole new one.

        Args:
            streams: per stream its values ``[T, C]`` and offsets ``[n + 1]``, items in the order of ``item_ids``.
            item_ids: ``[n]``, distinct.
            about: what produced the tokens; anything that JSON can hold.
            dtype: float16, bfloat16 or float32 for all streams; by default what the first stream's values have.

        Raises:
            ValueError: naming the argument, what it was and what it must be.
        """
        widths = {}
        for name, pair in streams.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"streams[{name!r}]: was {type(pair).__name__}, must be (values [T, C], offsets [n + 1])")
            values, offsets = pair
            if not isinstance(values, Tensor) or values.dim() != 2:
                was = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"streams[{name!r}]: values were {was}, must be [T, C]")
            check_offsets_form(offsets, f"streams[{name!r}].offsets")
            widths[name] = values.shape[1]
            dtype = dtype or values.dtype
        with cls.writer(path, widths, item_ids=item_ids, about=about, dtype=dtype or torch.float16) as writer:
            for name, (values, offsets) in streams.items():
                writer.append(name, values, offsets)

    @classmethod
    @contextlib.contextmanager
    def writer(cls, path: str | os.PathLike[str], widths: Mapping[str, int], *, item_ids: Sequence[str],
               about: Mapping[str, Any], dtype: torch.dtype) -> Iterator[TokenStoreWriter]:  # fmt: skip
        """A store written piece by piece, for tokens that do not fit into memory.

        ::

            with TokenStore.writer(path, {"image": 768}, item_ids=ids, about={}, dtype=torch.float16) as writer:
                for tokens in encode(pictures):  # em3.Jagged
                    writer.append("image", tokens.values(), tokens.offsets())

        The file appears at the end of the block, if every stream then has as many items as ``item_ids``.
        """
        with atomic(path) as file:
            writer = TokenStoreWriter(file, widths, item_ids, about, dtype)
            yield writer
            writer.finish()

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return TokenStore.open, (self.path,)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, items={self.num_items}, widths={self.widths}, dtype={self.dtype})"


class TokenStoreWriter:
    """Takes the streams one after the other; :meth:`TokenStore.writer` makes one.

    In the file: header, all offsets, all values, the items' names. The header's room is reserved for the longest one.
    """

    def __init__(self, file: BinaryIO, widths: Mapping[str, int], item_ids: Sequence[str], about: Mapping[str, Any],
                 dtype: torch.dtype) -> None:  # fmt: skip
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype: was {dtype}, must be one of {', '.join(map(str, DTYPES.values()))}")
        if not widths or min(widths.values()) < 1:
            raise ValueError(f"widths: was {dict(widths)}, must hold one stream or more, each 1 or more wide")
        if wrong := [item for item in item_ids if not isinstance(item, str)]:
            raise ValueError(f"item_ids: held {type(wrong[0]).__name__}, must hold strings")
        if len(set(item_ids)) != len(item_ids):
            raise ValueError("item_ids: an item was there twice, must be distinct")
        self._file, self._dtype, self._widths, self._items = file, dtype, dict(widths), len(item_ids)
        self._left = list(widths)  # the stream being written and those still to come
        self._lengths: dict[str, list[Tensor]] = {name: [] for name in widths}
        names = [item.encode() for item in item_ids]
        self._names = torch.tensor(bytearray(b"".join(names)), dtype=torch.uint8)
        self._name_ends = _ends([torch.tensor([len(name) for name in names], dtype=torch.int64)])
        metadata = {"dtype": _CODES[dtype], "about": as_json(about)}
        self._writer = TensorFileWriter(file, KIND, metadata, self._shapes(dict.fromkeys(widths, 2**40)))
        file.seek(8 * (self._items + 1) * (len(widths) + 1), os.SEEK_CUR)  # the offsets, counted at the end

    def append(self, name: str, values: Tensor, offsets: Tensor) -> None:
        """The next items of a stream: values ``[T, C]``, offsets ``[k + 1]``; one stream is ended before the next begins.

        Raises:
            ValueError: if the shapes do not fit, a stream comes out of turn, or a value is too large for the store's dtype.
        """
        if name not in self._left:
            raise ValueError(f"stream {name!r}: was out of turn, must be one of {', '.join(self._left)}")
        check_offsets_form(offsets, f"stream {name!r}: offsets")
        if values.dim() != 2 or values.shape[1] != self._widths[name] or not values.is_floating_point():
            was, must = f"{values.dtype} {list(values.shape)}", f"floating-point [T, {self._widths[name]}]"
            raise ValueError(f"stream {name!r}: values were {was}, must be {must}")
        lengths = offsets.long().diff().cpu()
        if offsets[0] != 0 or offsets[-1] != len(values) or (lengths < 0).any():
            raise ValueError(f"stream {name!r}: offsets must begin at 0, never fall and end at T = {len(values)}")
        stored = values.detach().cpu().to(self._dtype)
        if stored.isinf().sum() != values.isinf().sum():
            raise ValueError(f"stream {name!r}: a value was too large for {self._dtype}, must be stored in a wider dtype")
        del self._left[: self._left.index(name)]
        self._writer.write(f"streams.{name}.values", stored)
        self._lengths[name].append(lengths)

    def finish(self) -> None:
        """Write the items' names, the offsets and the header: called at the end of the ``with`` block."""
        for name, lengths in self._lengths.items():
            count = sum(map(len, lengths))
            if count != self._items:
                raise ValueError(f"stream {name!r}: had {count} sequences, must have one for each of {self._items} items")
        self._writer.write("item_ids.values", self._names)
        self._file.seek(self._writer.begin)
        for name, lengths in self._lengths.items():
            self._writer.write(f"streams.{name}.offsets", _ends(lengths))
        self._writer.write("item_ids.offsets", self._name_ends)
        self._writer.finish(self._shapes({name: int(_ends(lengths)[-1]) for name, lengths in self._lengths.items()}))

    def _shapes(self, tokens: dict[str, int]) -> Shapes:
        """Of the file's tensors in their order, where the streams have so many tokens."""
        shapes = {f"streams.{name}.offsets": (torch.int64, [self._items + 1]) for name in tokens}
        shapes["item_ids.offsets"] = (torch.int64, [self._items + 1])
        shapes |= {f"streams.{name}.values": (self._dtype, [count, self._widths[name]]) for name, count in tokens.items()}
        shapes["item_ids.values"] = (torch.uint8, list(self._names.shape))
        return shapes


def _ends(lengths: list[Tensor]) -> Tensor:
    """Offsets ``[n + 1]`` of sequences with these lengths, given in pieces."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0)
