"""The configuration of a run: typed, from YAML and `key=value` words, with the nearest right name in every complaint."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ARMS = ("id_only", "two_stage", "em3", "em3_mean_tokens", "em3_no_lora", "em3_no_contrast")
FOLDERS = ("data", "posters", "tokens")  # keys that name places outside the run
# Words that a key may be set to; every other value is checked by its type alone.
CHOICES = {
    "arms": ARMS,
    "model.ranker": ("din", "dcnv2"),
    "model.contrast_gradient": ("both", "content", "id"),
    "model.history": ("frozen", "lora", "full"),
    "model.pooling": ("softmax", "din", "top_k"),
    "encoder.train": ("frozen", "lora", "last_n"),
}
# Numbers, and the least that they may be.
LEAST = {
    "requests_per_user": 1, "history_length": 1, "seeds": 0, "encoder.last_n": 1, "encoder.rank": 1, "encoder.epochs": 0,
    "model.id_dim": 1, "model.hidden": 1, "model.content_dim": 1, "model.num_queries": 1, "model.dim": 1, "model.ffn_dim": 1,
    "model.num_layers": 1, "model.num_heads": 1, "model.rank": 0, "model.top_k": 1,
    "model.position_buckets": 0, "model.time_buckets": 0, "model.contrast_weight": 0, "train.epochs": 1,
    "train.batch_size": 1, "train.micro_batch": 1, "train.rows_per_item": 1,
    "train.lr": 0, "train.warmup_steps": 0, "train.weight_decay": 0, "train.refresh_every": 1,
    "train.checkpoint_every": 1, "train.log_every": 1,
}  # fmt: skip


class ConfigError(ValueError):
    """A key or value that is not right; the message names it and the nearest right one."""


@dataclass
class EncoderConfig:
    """What turns pictures and words into tokens."""

    image: str = "small"  # small: trained on the catalogue itself by image-text contrast; none; else a transformers model
    text: str = "small"
    train: str = "frozen"  # frozen | lora | last_n: how far the ranking loss reaches into them
    last_n: int = 1  # layers trained under last_n
    rank: int = 8  # of LoRA
    width: int = 128  # C of the small encoders' tokens
    height: int = 96  # picture size in pixels for the small encoder
    width_pixels: int = 64
    epochs: int = 12  # of the contrast between pictures and words
    seed: int = 0


@dataclass
class ModelConfig:
    """The ranker and what em3 puts around it."""

    ranker: str = "din"  # din | dcnv2
    id_dim: int = 32  # V
    id_dropout: float = 0.0  # of the ID-only ranker; see content_id_dropout
    content_id_dropout: float = 0.5  # share of IDs taken for unseen in training, where there is content to fall back on
    hidden: list[int] = field(default_factory=lambda: [128, 64])
    dropout: float = 0.3
    content_dim: int = 64
    num_queries: int = 4  # Q
    dim: int = 64  # D of the Fusion-Q-Former
    ffn_dim: int = 64  # of its feed-forward block
    num_layers: int = 1
    num_heads: int = 4  # H, of the Fusion-Q-Former and of the attention over the history
    rank: int = 8  # R of the LoRA over the history; 0 trains the projections themselves
    # How far the ranking loss reaches into the history: frozen: its projections stay as they start; lora: adapters on them;
    # full: the adapters, and the Fusion-Q-Former through every history item, computed anew at every step.
    history: str = "lora"
    pooling: str = "softmax"  # softmax | din | top_k: of the attention over the history
    top_k: int | None = None  # for top_k: so many events count
    position_buckets: int = 0  # rows of the attention's bias by an event's position, in buckets that double; 0 = no bias
    time_buckets: int = 0  # the same by the seconds since the event
    contrast_weight: float = 0.05  # lambda
    contrast_gradient: str = "id"  # both | content | id


@dataclass
class TrainConfig:
    """The optimisation."""

    epochs: int = 4
    batch_size: int = 2048
    micro_batch: int | None = None  # rows, and distinct items, held at a time, with dropout of their own; all by default
    rows_per_item: int = 1  # rows of one item that share a batch, and so its content, where an arm computes content
    lr: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    id_lr_factor: float = 1.0  # of the ID tables' learning rate
    average: float = 0.0  # decay of a moving average of the weights, which is validated and kept; 0 for the weights themselves
    write_back: bool = True  # a step's content goes into the bank
    refresh_every: int = 50  # steps between full refreshes of the bank
    checkpoint_every: int = 200  # steps
    log_every: int = 20  # steps


@dataclass
class Config:
    """One run: arms and seeds on one catalogue."""

    data: str = "???"  # folder of the catalogue
    posters: str | None = None  # folder of pictures, for MovieLens
    requests_per_user: int | None = None  # at most so many, drawn at random, for MovieLens; all by default
    history_length: int = 200
    tokens: str | None = None  # a token store to use; made in the run folder by default
    arms: list[str] = field(default_factory=lambda: ["id_only", "two_stage", "em3"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load(files: Sequence[str | os.PathLike[str]] = (), words: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML files in order, then words such as ``model.ranker=dcnv2``; later ones win.

    Relative paths are those of the working directory, and come back absolute: a run goes on from wherever it is asked to.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, a missing ``data``, unreadable YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    merged = OmegaConf.structured(Config)
    sources = [(str(path), lambda path=path: OmegaConf.load(path)) for path in files]
    sources += [(word, lambda word=word: _from_word(word)) for word in words]
    for name, read in sources:
        try:
            given = read()
            _known(OmegaConf.to_container(given), Config, "", name)
            merged = OmegaConf.merge(merged, given)
        except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: {_said(error)}") from None
        except OSError as error:
            if error.errno is not None:  # of the file system
                raise
            raise ConfigError(f"{name}: {error}, must be keys and values") from None  # a file that is just a number
    if OmegaConf.is_missing(merged, "data"):
        raise ConfigError("data: was not given, must be the folder of a catalogue (--data FOLDER)")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${...} of something that is not there
        raise ConfigError(_said(error)) from None
    assert isinstance(config, Config)
    _check(config)
    for key in FOLDERS:
        if getattr(config, key) is not None:
            setattr(config, key, os.path.abspath(getattr(config, key)))
    for kind in ("image", "text"):  # a model of transformers may be a folder, or a name that only looks like one
        name = getattr(config.encoder, kind)
        if name not in ("small", "none") and os.path.isdir(name):
            setattr(config.encoder, kind, os.path.abspath(name))
    return config


def differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys that two configurations both have and do not agree in, as ``model.rank``."""
    found = []
    for key in was.keys() & now.keys():
        if isinstance(was[key], dict) and isinstance(now[key], dict):
            found += differences(was[key], now[key], f"{prefix}{key}.")
        elif was[key] != now[key]:
            found.append(f"{prefix}{key}")
    return sorted(found)


def _said(error: Exception) -> str:
    """In one line: the key where omegaconf knows it, the line and column where YAML does."""
    key = getattr(error, "full_key", None)
    return f"{key}: {str(error).splitlines()[0]}" if key else " ".join(str(error).split())


def _from_word(word: str) -> Any:
    from omegaconf import OmegaConf

    if "=" not in word:
        raise ConfigError(f"{word}: must be key=value, as in model.ranker=dcnv2")
    return OmegaConf.from_dotlist([word])


def _known(given: Any, kind: Any, prefix: str, source: str) -> None:
    """Every key of ``given`` is one of ``kind``'s."""
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: {prefix.rstrip('.') or 'the file'} was {type(given).__name__}, must be keys and values")
    kinds = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in given.items():
        if key not in kinds:
            everything = [*_keys(Config, ""), *(f"{prefix}{name}" for name in kinds)]
            near = difflib.get_close_matches(f"{prefix}{key}", everything, 1, 0.5)
            near = near or [name for name in everything if name.rsplit(".", 1)[-1] == key]
            hint = f"; did you mean {near[0]!r}?" if near else f" (the keys are {', '.join(kinds)})"
            raise ConfigError(f"{source}: no key '{prefix}{key}'{hint}")
        inner: Any = kinds[key].default_factory
        if dataclasses.is_dataclass(inner):
            _known(value, inner, f"{prefix}{key}.", source)


def _keys(kind: Any, prefix: str) -> list[str]:
    names = []
    for f in dataclasses.fields(kind):
        inner: Any = f.default_factory
        names += [f"{prefix}{f.name}", *(_keys(inner, f"{prefix}{f.name}.") if dataclasses.is_dataclass(inner) else [])]
    return names


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _check(config: Config) -> None:
    for key, allowed in CHOICES.items():
        value = _value(config, key)
        for word in value if isinstance(value, list) else [value]:
            if word not in allowed:
                near = difflib.get_close_matches(word, allowed, 1, 0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{key}: was {word!r}, must be one of {', '.join(allowed)}{hint}")
    for key, least in LEAST.items():
        value = _value(config, key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number >= least:  # nor NaN
                raise ConfigError(f"{key}: was {value}, must be at least {least}")
    if not 0 <= config.train.average < 1:
        raise ConfigError(f"train.average: was {config.train.average}, must be a decay from 0 to below 1")
    for key in ("model.dropout", "model.id_dropout", "model.content_id_dropout"):
        if not 0 <= _value(config, key) <= 1:
            raise ConfigError(f"{key}: was {_value(config, key)}, must be a share from 0 to 1")
    for key in ("model.dim", "model.content_dim"):
        if _value(config, key) % config.model.num_heads:
            raise ConfigError(f"{key}: was {_value(config, key)}, must be a multiple of model.num_heads {config.model.num_heads}")
    if not config.model.hidden:
        raise ConfigError("model.hidden: was [], must hold the width of at least one layer")
    if (config.model.pooling == "top_k") != (config.model.top_k is not None):
        raise ConfigError(f"model.top_k: was {config.model.top_k}, must be a number with model.pooling=top_k and left out without, "
                          f"which was {config.model.pooling}")  # fmt: skip
    if "em3_no_lora" in config.arms and config.model.history == "frozen":
        raise ConfigError("arms: held em3_no_lora, must not with model.history=frozen, under which the arm em3 is the same")
    if config.tokens is not None and config.encoder.train != "frozen":
        raise ConfigError(f"tokens: was {config.tokens}, must be left out with encoder.train={config.encoder.train}: "
                          "the tokens of a store are not trained")  # fmt: skip
    for key in ("arms", "seeds"):
        value = getattr(config, key)
        if not value or len(set(value)) < len(value):
            raise ConfigError(f"{key}: was {value}, must hold at least one entry, each once")
