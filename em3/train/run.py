"""A whole run: a catalogue, its tokens, every arm with every seed, the costs of a step, the report."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__, env
from ..data.batches import Batches
from ..data.open import open_data
from ..data.table import RankingData
from ..data.token_store import TokenStore
from ..files import atomic, locked, whole_lines
from . import arms, checkpoint, inspect
from . import config as configs
from .catalogue_tokens import ENCODERS, LiveTokens, make_encoders, open_tokens, token_dims
from .config import Config, ConfigError
from .cost import measure_costs
from .loop import BEST, Training, read_metrics
from .metrics import evaluate, spread
from .report import write_report
from .report.summary import PERFECT, Arm, Cost, Curve, RunSummary

log = logging.getLogger("em3.train")
CONFIG, COSTS, SUMMARY, WARNINGS = "config.yaml", "costs.json", "summary.json", "warnings.jsonl"
ELSEWHERE = ("arms", "seeds", *configs.FOLDERS)  # keys that say nothing about a single training
# (what is going on, how far, of how much, numbers to show)
Progress = Callable[[str, int, int, dict[str, float]], None]


class Warnings(logging.Handler):
    """Collects what em3 warns of inside a ``with`` block, each text once, for the report.

    After :meth:`keep` a file remembers them too: what is done once in a run, such as reading its pictures, warns once, and
    the report may be another process's.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.texts:
            self.texts.append(text)
            if self.path is not None:
                with open(self.path, "a") as file:
                    file.write(json.dumps(text) + "\n")

    def keep(self, path: Path) -> None:
        """Take up what earlier processes left in ``path``, and write there from now on."""
        self.texts = list(dict.fromkeys([*self.texts, *whole_lines(path)]))
        with atomic(path) as file:
            file.writelines(json.dumps(text).encode() + b"\n" for text in self.texts)
        self.path = path

    def __enter__(self) -> None:
        logging.getLogger("em3").addHandler(self)

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("em3").removeHandler(self)


class Run:
    """A run folder and what is needed to train in it. Nothing is written there before :meth:`execute`.

    Args:
        config: of the run.
        folder: of the run; need not exist before :meth:`execute`.
        progress: see ``Progress``.

    Raises:
        DataError: if the data cannot be used.
    """

    def __init__(self, config: Config, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.warnings = Warnings()
        with self.warnings:
            self.data: RankingData = open_data(config.data, config.posters, config.requests_per_user)
        self.batches = Batches(self.data, config.history_length, ages=config.model.time_buckets > 0)
        self._features: torch.Tensor | None = None

    @functools.cached_property
    def store(self) -> TokenStore:
        """The tokens of every item; their first use in a run makes them."""
        return open_tokens(self.data.items, self.config, self.folder, self._setting_up)

    def _setting_up(self, name: str, done: int, total: int) -> None:
        self.progress(name, done, total, {})

    def execute(self, command: list[str]) -> Path:
        """Train what is not trained yet, measure, write the report; returns its path.

        Raises:
            ConfigError: if ``folder/config.yaml`` says otherwise, or the tokens cannot be made or used as configured.
            LockedError: if another process executes a run in this folder.
            TrainingError: if a training must not go on.
        """
        with self._at_work():
            summary = self._summary(self._results(), self._costs(), command)
            with atomic(self.folder / SUMMARY) as file:
                file.write(json.dumps(summary.to_dict(), indent=1).encode())
            return write_report(self.folder, summary)

    def results(self) -> dict[str, list[dict[str, Any]]]:
        """Train what is not trained yet; returns each arm's results, one a seed. Raises as :meth:`execute`."""
        with self._at_work():
            return self._results()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """The folder is this process's to write."""
        with locked(self.folder), self.warnings:
            _claim(self.folder, self.config)
            self.warnings.keep(self.folder / WARNINGS)
            for left_behind in self.folder.rglob(".*.safetensors.*.tmp"):  # by a killed process; nobody else writes these
                left_behind.unlink()
            yield

    def _results(self) -> dict[str, list[dict[str, Any]]]:
        return {arm: [self.train(arm, seed) for seed in self.config.seeds] for arm in self.config.arms}

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        training = self.training(arm, seed)
        name = f"{arms.NAMES[arm]}, seed {seed}"
        training.progress = lambda step, steps, numbers: self.progress(name, step, steps, numbers)
        return training.run()

    def training(self, arm: str, seed: int) -> Training:
        """The training of an arm with a seed, at its beginning."""
        store = self.store  # before the seed is set: its encoders draw random numbers, if they are trained only now
        torch.manual_seed(seed)
        model = self.build(arm)
        read: Any = None
        if arms.reads_tokens(arm):
            live = isinstance(model, arms.WithEncoders)
            read = model.tokens.read if live else functools.partial(store.read, dtype=None)
        # What a checkpoint of it must agree with. The same data may lie in another folder tomorrow.
        about = {key: value for key, value in self.config.to_dict().items() if key not in ELSEWHERE} | {"arm": arm}
        return Training(model, self.batches, read, self.config.train, seed, self.folder / arm / f"seed{seed}", about)

    def trained(self, arm: str, seed: int) -> Training:
        """The same with the weights of its best epoch.

        Raises:
            ConfigError: if there is none yet.
            CheckpointError: if it is damaged or of another model.
        """
        path = self.folder / arm / f"seed{seed}" / BEST
        if not path.exists():
            raise ConfigError(f"{path}: is not there yet; `em3 train --resume {self.folder}` goes on with the run")
        training = self.training(arm, seed)
        checkpoint.load(path, training.model)
        return training

    def build(self, arm: str) -> Any:
        """The untrained model of an arm."""
        if arm == "two_stage" and self._features is None:
            self._features = arms.frozen_features(self.store.read, len(self.data.items.ids))
        model: Any = arms.build(arm, self.config, self.batches, token_dims(self.store), self._features)
        if arms.reads_tokens(arm) and self.config.encoder.train != "frozen":
            path = self.folder / ENCODERS
            encoders = make_encoders(self.data.items, self.config.encoder, path, self._setting_up)
            return arms.WithEncoders(model, LiveTokens(self.data.items, encoders, self.config.encoder))
        return model

    def table(self) -> str:
        """The test metrics of every arm, mean and standard error over the seeds, as plain text."""
        summary = RunSummary.from_dict(json.loads((self.folder / SUMMARY).read_text()))
        lines = [f"{'':<22}{'AUC':>16}{'warm items':>16}{'cold items':>16}{'GAUC':>16}{'log loss':>16}"]
        for arm in summary.arms:
            cells = [_cell([m[key] for m in arm.metrics]) for key in ("auc", "auc_warm", "auc_cold", "gauc", "log_loss")]
            lines.append(f"{arm.name:<22}" + "".join(f"{cell:>16}" for cell in cells))
        return "\n".join(lines)

    def _costs(self) -> dict[str, Any]:
        path = self.folder / COSTS
        if not path.exists():
            costs = measure_costs(self, lambda i, n: self.progress("costs of a step", i, n, {}))
            with atomic(path) as file:
                file.write(json.dumps(costs, indent=1).encode())
        costs_read: dict[str, Any] = json.loads(path.read_text())
        return costs_read

    def _summary(self, results: dict[str, list[dict[str, Any]]], costs: dict[str, Any], command: list[str]) -> RunSummary:
        report = env.env_report()
        rows, names = self.data.rows, self.data.items
        found, test = [], self.data.of_split("test")
        for arm, of_seeds in results.items():
            curves = [self._curve(arm, seed) for seed in self.config.seeds]
            found.append(Arm(arms.NAMES[arm], [r["test"] for r in of_seeds], curves, Cost(**costs[arm])))
        if rows.probability is not None:
            found.append(Arm(PERFECT, [evaluate(rows.label[test], rows.probability[test], rows.request[test], rows.cold[test])]))
        best = next((arm for arm in self.config.arms if arms.reads_tokens(arm)), None)
        shown = inspect.of_training(self, best, self.config.seeds[0]) if best else {}
        splits = ", ".join(f"{len(self.data.of_split(s)):,} {s}" for s in ("train", "valid", "test"))
        return RunSummary(
            data=self.data.name, ranker=self.config.model.ranker, date=datetime.date.today().isoformat(),
            version=__version__, machine=inspect.machine(), seeds=self.config.seeds, arms=found,
            facts={
                "items": f"{len(names.ids):,}, {sum(p is not None for p in names.pictures):,} with a picture",
                "users": f"{self.data.num_users:,}",
                "rows": splits,
                "cold test rows": f"{rows.cold[test].mean():.1%}" if len(test) else "-",
                "model selection": "the epoch with the best AUC on the validation rows",
            },
            config=self.config.to_dict(), environment=str(report), command=shlex.join(command),
            warnings=self.warnings.texts, **shown,
        )  # fmt: skip

    def _curve(self, arm: str, seed: int) -> Curve:
        lines = read_metrics(self.folder / arm / f"seed{seed}")
        loss, valid = [x for x in lines if "loss" in x], [x for x in lines if "valid" in x]
        return Curve(
            [x["step"] for x in loss], [x["loss"] for x in loss], [x["step"] for x in valid], [x["valid"]["auc"] for x in valid]
        )


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean, error = spread(known)
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


def config_of(folder: Path) -> Config:
    """What the run in ``folder`` was begun with.

    Raises:
        ConfigError: if there is no run in it.
    """
    path = folder / CONFIG
    if not path.is_file():
        was = f"holds no {CONFIG}" if folder.is_dir() else "is a file" if folder.exists() else "is not there"
        raise ConfigError(f"{folder}: {was}, must be the folder of a run; `em3 train --data CATALOGUE --out FOLDER` makes one")
    return configs.load([path])


def _claim(folder: Path, config: Config) -> None:
    """Write config.yaml into a new folder; in one that has it, it must say the same."""
    path = folder / CONFIG
    if path.exists():
        before = config_of(folder)
        if changed := configs.differences(before.to_dict(), config.to_dict()):
            raise ConfigError(
                f"{folder}: holds a run of another configuration ({', '.join(changed)} differ); "
                "choose another --out, or go on with `em3 train --resume FOLDER`, which takes no settings"
            )
        return
    from omegaconf import OmegaConf

    with atomic(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


