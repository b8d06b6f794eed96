"""The configuration: precedence, types, and complaints that name the nearest right word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")

from em3.train.config import Config, ConfigError, load


def test_later_ones_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("data: there\nmodel: {ranker: dcnv2, rank: 4}\nseeds: [3]\n")
    second.write_text("model: {rank: 5}\n")
    config = load([first, second], ["model.num_queries=7", "train.lr=1e-4"])
    assert (config.data, config.model.ranker, config.model.rank, config.model.num_queries) == (str(Path("there").resolve()), "dcnv2", 5, 7)
    assert config.train.lr == 1e-4
    assert config.seeds == [3]
    assert config.train.batch_size == Config().train.batch_size
    assert load((), ["data=x", "seeds=[1,2]", "arms=[em3]"]).arms == ["em3"]


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("small", "models"):  # a word of the configuration stays that, whatever lies there
        (tmp_path / name).mkdir()
    config = load((), ["data=a/../b", "posters=p", "tokens=/t", "encoder.text=models", "encoder.image=small"])
    assert (config.data, config.posters, config.tokens) == (str(tmp_path / "b"), str(tmp_path / "p"), "/t")
    assert (config.encoder.text, config.encoder.image) == (str(tmp_path / "models"), "small")
    assert load((), ["data=x", "encoder.text=openai/clip"]).encoder.text == "openai/clip"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data: was not given"),
        (["data=x", "model.rankr=din"], "no key 'model.rankr'; did you mean 'model.ranker'"),
        (["data=x", "ranker=din"], "no key 'ranker'; did you mean 'model.ranker'"),
        (["data=x", "modle.ranker=din"], "no key 'modle'; did you mean 'model'"),
        (["data=x", "model.ranker=dnc2"], "model.ranker: was 'dnc2', must be one of din, dcnv2; did you mean 'dcnv2'"),
        (["data=x", "arms=[em3,two_stge]"], "did you mean 'two_stage'"),
        (["data=x", "arms=[]"], "arms: was [], must hold at least one entry"),
        (["data=x", "seeds=[1,1]"], "seeds: was [1, 1], must hold at least one entry, each once"),
        (["data=x", "train.epochs=many"], "train.epochs=many: train.epochs: Value 'many'"),
        (["data=x", "train.micro_batch=0"], "train.micro_batch: was 0, must be at least 1"),
        (["data=x", "train.epochs=0"], "train.epochs: was 0, must be at least 1"),
        (["data=x", "model.rank=-1"], "model.rank: was -1, must be at least 0"),
        (["data=x", "train"], "train: must be key=value"),
        (["data=x", "train=3"], "train=3: train was int, must be keys and values"),
        (["data=x", "model.num_heads=3"], "model.dim: was 64, must be a multiple of model.num_heads 3"),
        (["data=x", "model.hidden=[]"], "model.hidden: was [], must hold the width of at least one layer"),
        (["data=x", "model.hidden=[8,0]"], "model.hidden: was [8, 0], must be at least 1"),
        (["data=x", "train.lr=nan"], "train.lr: was nan, must be at least 0"),
        (["data=x", "model.dropout=1.5"], "model.dropout: was 1.5, must be a share from 0 to 1"),
        (["data=x", "requests_per_user=0"], "requests_per_user: was 0, must be at least 1"),
        (["data=x", "seeds=[-1]"], "seeds: was [-1], must be at least 0"),
        (["data=x", "tokens=t", "encoder.train=lora"], "tokens: was t, must be left out with encoder.train=lora"),
        (["data=${oops}"], "data: Interpolation key 'oops' not found"),
        (["data=x", "model.pooling=top_k"], "model.top_k: was None, must be a number with model.pooling=top_k and left out without"),
        (["data=x", "model.top_k=3"], "model.top_k: was 3, must be a number with model.pooling=top_k and left out without, which was softmax"),
        (["data=x", "model.time_buckets=-1"], "model.time_buckets: was -1, must be at least 0"),
        (["data=x", "model.history=ful"], "model.history: was 'ful', must be one of frozen, lora, full; did you mean 'full'"),
        (["data=x", "arms=[em3,em3_no_lora]", "model.history=frozen"], "arms: held em3_no_lora, must not with model.history=frozen"),
        (["data=x", "encoder.train=all"], "encoder.train: was 'all', must be one of frozen, lora, last_n"),
    ],
)
def test_complaints(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load((), words)


@pytest.mark.parametrize("text", ["model: [1, 2", "- 1\n- 2\n", "model: {rank: {}}\n", "just words", "3", "data: a\ndata: b"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load([path], ["data=x"])


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load([path], ["data=x"])
    with pytest.raises(FileNotFoundError):
        load([tmp_path / "none.yaml"], ["data=x"])


def test_a_wrong_type_in_a_file_names_the_key(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  lr: fast\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: train.lr: Value 'fast'")):
        load([path], ["data=x"])


def test_the_page_of_settings():
    """docs/training.md has each key with its default, and none that there is not."""
    import dataclasses

    def defaults(config, prefix=""):
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                yield from defaults(value, f"{f.name}.")
            elif isinstance(value, list):
                yield f"{prefix}{f.name}", f"[{', '.join(map(str, value))}]"
            else:
                yield f"{prefix}{f.name}", {"None": "null", "True": "true", "False": "false", "???": ""}.get(str(value), str(value))

    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`(.*?)`)? ?\| \S", page, re.MULTILINE)
    assert rows == list(defaults(Config()))
