"""The token store: what is written comes back bit for bit, and no damage goes unnoticed."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import struct
import threading
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from em3.data.tensor_file import header_checksum
from em3.data.token_store import TokenStore, TokenStoreError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def stream(lengths: list[int], width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(offsets[-1]), width, generator=generator), offsets


def expected(tokens: tuple[Tensor, Tensor], row: int, dtype: torch.dtype) -> Tensor:
    values, offsets = tokens
    return values[offsets[row] : offsets[row + 1]].to(dtype).float()


def check_read(store: TokenStore, streams: dict[str, tuple[Tensor, Tensor]], rows: Tensor, dtype: torch.dtype) -> None:
    read = store.read(rows)
    assert len(read) == len(streams)
    for tokens, jagged in zip(streams.values(), read, strict=True):
        want = [expected(tokens, row, dtype) for row in rows.tolist()]
        assert jagged.values().dtype == torch.float32
        assert jagged.offsets().dtype == torch.int64
        assert jagged.offsets().tolist() == torch.tensor([0, *map(len, want)]).cumsum(0).tolist()
        assert torch.equal(jagged.values(), torch.cat([tokens[0][:0], *want]))


@pytest.fixture
def stored(tmp_path: Path, seed: int) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (2, 40), generator=generator).tolist()
    streams = {"text": stream(lengths[0], 6, generator), "image": stream(lengths[1], 3, generator)}
    path = tmp_path / "tokens.safetensors"
    TokenStore.write(path, streams, item_ids=[f"tt{i}" for i in range(40)], about={"encoder": "e", "n": [1, 2.5]},
                     dtype=torch.float16)  # fmt: skip
    return path, streams


@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 6))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    names = data.draw(st.lists(st.sampled_from(["image", "text", "a.values", "ümläut"]), min_size=1, unique=True))
    streams = {
        name: stream(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), data.draw(st.integers(1, 5)), generator)
        for name in names
    }
    ids = data.draw(st.lists(st.text(max_size=4).filter(lambda s: s.isprintable()), min_size=n, max_size=n, unique=True))
    path = tmp_path_factory.mktemp("store") / "tokens"
    TokenStore.write(path, streams, item_ids=ids, about={"seed": 1}, dtype=dtype)

    store = TokenStore.open(path)
    store.verify()
    assert (store.names, store.item_ids, store.num_items) == (names, ids, n)
    assert store.widths == {name: values.shape[1] for name, (values, _) in streams.items()}
    assert (store.about, store.dtype) == ({"seed": 1}, dtype)
    rows = data.draw(st.lists(st.integers(0, n - 1), max_size=8)) if n else []
    check_read(store, streams, torch.tensor(rows, dtype=torch.int64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_piece_by_piece_makes_the_same_file(tmp_path: Path, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    streams = {"image": stream([3, 0, 2, 1], 5, generator), "text": stream([0, 1, 1, 4], 2, generator)}
    arguments = dict(item_ids=list("abcd"), about={}, dtype=dtype)
    TokenStore.write(tmp_path / "whole", streams, **arguments)
    with TokenStore.writer(tmp_path / "pieces", {"image": 5, "text": 2}, **arguments) as writer:
        for name, (values, offsets) in streams.items():
            middle = int(offsets[2])
            writer.append(name, values[:middle], offsets[:3])
            writer.append(name, values[middle:], offsets[2:] - middle)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces", "whole"]


def test_is_a_safetensors_file(stored) -> None:
    path, streams = stored
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["about"])["encoder"] == "e"
        for name, (values, offsets) in streams.items():
            assert torch.equal(file.get_tensor(f"streams.{name}.values"), values.half())
            assert torch.equal(file.get_tensor(f"streams.{name}.offsets"), offsets)


@pytest.mark.parametrize(("rows", "was"), [([0, 40], "40"), ([-1], "-1"), ([2**40], str(2**40))])
def test_row_out_of_range(stored, rows: list[int], was: str) -> None:
    with pytest.raises(ValueError, match=f"rows: was {was}, must be from 0 to 39"):
        TokenStore.open(stored[0]).read(torch.tensor(rows))


@pytest.mark.parametrize("rows", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)])
def test_rows_of_another_form(stored, rows: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.int64 \[U\]"):
        TokenStore.open(stored[0]).read(rows)


def test_truncated_anywhere(stored) -> None:
    path, _ = stored
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in {0, 3, 7, 8, 9, 200, header - 1, header, header + 1, len(whole) // 2 + header // 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(TokenStoreError) as error:
            TokenStore.open(path)
        assert str(error.value).startswith(str(path)), size
        assert "long" in str(error.value), size
    path.write_bytes(whole + b"x")
    with pytest.raises(TokenStoreError, match="too long"):
        TokenStore.open(path)


def test_a_flipped_byte_is_found(stored, seed: int) -> None:
    path, _ = stored
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    end_of_text = whole[:header].rstrip(b" ")
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, len(end_of_text), (30,), generator=generator).tolist()
    places += torch.randint(header, len(whole), (30,), generator=generator).tolist() + [header, len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(damaged)
        if place < header:
            with pytest.raises(TokenStoreError):
                TokenStore.open(path)
        else:
            with pytest.raises(TokenStoreError, match=r"damaged: (streams|item_ids)\.\S+; write the store again"):
                TokenStore.open(path).verify()


def test_damaged_offsets_stop_the_read(stored) -> None:
    path, _ = stored
    whole = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[header + 8 : header + 16] = struct.pack("<q", 10**9)  # the first stream's offset of item 1
    path.write_bytes(whole)
    store = TokenStore.open(path)
    for row in (0, 1):
        with pytest.raises(TokenStoreError, match="'text' are damaged"):
            store.read(torch.tensor([row]))
    assert len(store.read(torch.arange(2, 40))) == 2


def with_metadata(path: Path, **changes: str) -> None:
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def test_newer_and_foreign_files(stored, tmp_path: Path) -> None:
    path, _ = stored
    with_metadata(path, version="2")
    with pytest.raises(TokenStoreError, match="format version 2, this em3 reads up to 1"):
        TokenStore.open(path)
    with_metadata(path, format="pt")
    with pytest.raises(TokenStoreError, match="safetensors file of format 'pt'"):
        TokenStore.open(path)
    for content in (b"PAR1" * 100, b"\xff" * 100, struct.pack("<Q", 20) + b"[1, 2, 3]".ljust(20), bytes(100)):
        path.write_bytes(content)
        with pytest.raises(TokenStoreError, match="not a token store"):
            TokenStore.open(path)
    with pytest.raises(FileNotFoundError):
        TokenStore.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(item_ids=["a", "a"]), "item_ids: an item was there twice"),
        (dict(item_ids=["a"]), "stream 'image': had 2 sequences, must have one for each of 1 items"),
        (dict(dtype=torch.float64), r"dtype: was torch\.float64"),
        (dict(streams={}), "widths: was {}, must hold one stream"),
        (dict(streams={"image": (torch.zeros(3), torch.tensor([0, 1, 3]))}), r"values were \[3\], must be \[T, C\]"),
        (dict(streams={"image": (torch.zeros(3, 2), torch.tensor([0, 4, 3]))}), "never fall and end at T = 3"),
        (dict(streams={"image": (torch.zeros(3, 2), torch.tensor([0, 1, 2]))}), "never fall and end at T = 3"),
        (dict(streams={"image": (torch.full((3, 2), 1e6), torch.tensor([0, 1, 3]))}), "too large for torch.float16"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "tokens"
    path.write_text("the old file")
    arguments = dict(streams={"image": (torch.zeros(3, 2), torch.tensor([0, 1, 3]))}, item_ids=["a", "b"], about={},
                     dtype=torch.float16) | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        TokenStore.write(path, arguments.pop("streams"), **arguments)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_streams_come_one_after_the_other(tmp_path: Path) -> None:
    token, arguments = (torch.zeros(1, 2), torch.tensor([0, 1])), dict(item_ids=["1"], about={}, dtype=torch.float16)
    with TokenStore.writer(tmp_path / "x", {"a": 2, "b": 2}, **arguments) as writer:
        writer.append("a", *token)
        writer.append("b", *token)
        for name in ("a", "c"):
            with pytest.raises(ValueError, match=f"stream '{name}': was out of turn, must be one of b"):
                writer.append(name, *token)
    assert TokenStore.open(tmp_path / "x").names == ["a", "b"]


def test_threads(stored, seed: int) -> None:
    path, streams = stored
    store, wrong = TokenStore.open(path), []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(seed + number)
        try:
            for _ in range(20):
                check_read(store, streams, torch.randint(0, 40, (25,), generator=generator), torch.float16)
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _child(store: TokenStore, rows: Tensor, pipe) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    pipe.send([jagged.values().tolist() for jagged in store.read(rows)])


def test_forked_child(stored) -> None:
    store, rows = TokenStore.open(stored[0]), torch.tensor([5, 5, 39, 0])
    want = [jagged.values().tolist() for jagged in store.read(rows)]
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(store, rows, there))
    child.start()
    assert here.poll(60), "the child said nothing"
    assert here.recv() == want
    child.join()
    assert child.exitcode == 0


def test_pickle_opens_the_file_again(stored) -> None:
    path, streams = stored
    again = pickle.loads(pickle.dumps(TokenStore.open(path)))
    check_read(again, streams, torch.arange(40), torch.float16)


def test_open_reads_only_the_header(tmp_path: Path) -> None:
    """A store of 64 GiB, all of it a hole in the file but the header: nothing could read it whole."""
    path, grown = tmp_path / "tokens", 2**36 - 4
    TokenStore.write(path, {"image": (torch.zeros(1, 1), torch.tensor([0, 1]))}, item_ids=["a"], about={})
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    metadata = header.pop("__metadata__")
    del metadata["header_checksum"]
    header["streams.image.values"]["shape"][0] = 2**36 // 4
    header["streams.image.values"]["data_offsets"][1] += grown
    header["item_ids.values"]["data_offsets"] = [place + grown for place in header["item_ids.values"]["data_offsets"]]
    metadata["header_checksum"] = header_checksum(metadata, header)
    text = json.dumps({"__metadata__": metadata} | header).encode().ljust(length + 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        file.truncate(len(whole) + 64 + grown)
    store = TokenStore.open(path)
    assert store.widths == {"image": 1}
    assert store.read(torch.tensor([0]))[0].values().tolist() == [[0.0]]
