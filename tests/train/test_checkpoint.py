"""Checkpoints come back bit for bit, or say why not."""

from __future__ import annotations

import json
import struct

import pytest
import torch

pytest.importorskip("safetensors")

from em3.train import checkpoint


def model(width=4):
    net = torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.BatchNorm1d(3))
    net.register_buffer("flags", torch.tensor([True, False]))
    return net


def stepped(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        net(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path, seed):
    net = model()
    optimizer = stepped(net)
    checkpoint.save(tmp_path / "a.safetensors", net, optimizer, {"step": 3, "sums": [0.5]})
    return tmp_path / "a.safetensors", net, optimizer


def test_the_same_bits(saved):
    path, net, optimizer = saved
    expected = torch.rand(5)
    other = model()
    fresh = torch.optim.Adam(other.parameters(), lr=0.1, fused=True)
    torch.manual_seed(99)
    assert checkpoint.load(path, other, fresh) == {"step": 3, "sums": [0.5]}
    assert torch.equal(torch.rand(5), expected)
    x = torch.randn(8, 4)
    for pair, steps in ((net, optimizer), (other, fresh)):
        steps.zero_grad()
        pair(x).square().sum().backward()
        steps.step()
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_without_an_optimizer(saved, tmp_path):
    _, net, optimizer = saved
    checkpoint.save(tmp_path / "b.safetensors", net, None, {})
    checkpoint.load(tmp_path / "b.safetensors", model())
    with pytest.raises(checkpoint.CheckpointError, match=r"b\.safetensors: holds no optimizer"):
        checkpoint.load(tmp_path / "b.safetensors", net, optimizer)


def test_damage_is_found(saved):
    path = saved[0]
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(checkpoint.CheckpointError, match="is not a whole safetensors file"):
            checkpoint.load(path, model())
    flipped = bytearray(whole)
    flipped[-40] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load(path, model())


def test_others_files(saved, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint of em3"):
        checkpoint.load(tmp_path / "foreign.safetensors", model())
    path = saved[0]
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    about = json.loads(header["__metadata__"]["em3"])
    header["__metadata__"]["em3"] = json.dumps(about | {"version": 9})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with pytest.raises(checkpoint.CheckpointError, match="has format version 9, this em3 reads up to 1"):
        checkpoint.load(path, model())
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none", model())


def test_another_configuration(saved):
    with pytest.raises(checkpoint.CheckpointError, match=r"0\.weight is \[3, 4\] in the file and \[3, 5\] in this model"):
        checkpoint.load(saved[0], model(5))
    with pytest.raises(checkpoint.CheckpointError, match=r"flags is .* in the file and absent in this model"):
        checkpoint.load(saved[0], torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)))


def test_a_flipped_bit_in_what_is_said_about_the_tensors(saved, seed):
    """Every byte of the header, one bit of it at random: a step that is off by a bit would train on from there."""
    path = saved[0]
    whole = path.read_bytes()
    expected = checkpoint.read(path)[1]
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    bits = torch.randint(0, 8, (size,)).tolist()
    places = sorted({whole.index(b"step"), whole.index(b": 3,") + 2, *torch.randperm(size)[:300].tolist()})
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (0 if flipped[place] == ord("3") else bits[place])
        path.write_bytes(flipped)
        try:
            _, state = checkpoint.read(path)
        except checkpoint.CheckpointError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
        else:
            assert state == expected, place  # padding, or a letter whose case does not matter
