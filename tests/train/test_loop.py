"""A training that is interrupted ends with the same bits as one that is not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from em3.data.batches import Batches
from em3.jagged import Jagged
from em3.train import checkpoint, loop
from em3.train.arms import build, frozen_features, reads_tokens
from em3.train.config import Config, ModelConfig, TrainConfig

from ..data.test_batches import catalogue

TRAIN = TrainConfig(epochs=3, batch_size=32, warmup_steps=3, refresh_every=3, checkpoint_every=4, log_every=3)


N, WIDTHS = 12, (5, 7)


class Tokens:
    """Random tokens of every item, ``read`` as a token store does; some items have none."""

    def __init__(self):
        lengths = torch.randint(0, 4, (2, N))
        self.rows = [[torch.randn(int(k), c) for k in n] for c, n in zip(WIDTHS, lengths, strict=True)]

    def read(self, items):
        return [Jagged.from_sequences([stream[i] for i in items.tolist()]) for stream in self.rows]


class Killed(Exception):
    pass


class Setting:
    def __init__(self, seed, arm="em3", train=TRAIN, history="lora"):
        data = catalogue(np.random.default_rng(seed), 20, N, 150, 500)
        model = ModelConfig(id_dim=6, hidden=[12], content_dim=8, num_queries=2, dim=8, num_heads=2, rank=2, history=history)
        self.config = Config(data="made up", model=model, train=train)
        self.arm, self.batches = arm, Batches(data, 6)
        torch.manual_seed(seed)
        self.tokens = Tokens()

    def training(self, folder):
        torch.manual_seed(7)
        features = frozen_features(self.tokens.read, N) if self.arm == "two_stage" else None
        model = build(self.arm, self.config, self.batches, list(WIDTHS), features)
        read = self.tokens.read if reads_tokens(self.arm) else None
        return loop.Training(model, self.batches, read, self.config.train, 7, folder, {"arm": self.arm})


def lines(folder):
    return [{k: v for k, v in line.items() if k != "time"} for line in loop.read_metrics(folder)]


@pytest.mark.parametrize(("arm", "history", "average"), [
    ("id_only", "lora", 0.0), ("two_stage", "lora", 0.0), ("em3", "lora", 0.0), ("em3_mean_tokens", "lora", 0.0),
    ("em3", "full", 0.0), ("em3", "frozen", 0.0), ("em3", "lora", 0.9),
])  # fmt: skip
def test_killed_anywhere(arm, history, average, seed, tmp_path):
    setting = Setting(seed, arm, dataclasses.replace(TRAIN, average=average), history=history)
    want = setting.training(tmp_path / "whole").run()
    steps = setting.training(tmp_path / "whole").steps
    assert steps >= 12
    for at in (1, steps // 2, steps - 1):
        folder = tmp_path / f"killed{at}"
        training = setting.training(folder)
        step = training.step

        def failing(batch, training=training, step=step, at=at):
            if training.state.step == at:
                raise Killed
            step(batch)

        training.step = failing
        with pytest.raises(Killed):
            training.run()
        with open(folder / loop.METRICS, "a") as file:
            file.write('{"step": 10000, "lo')  # a process may be killed in the middle of a line
        torch.rand(3)
        assert setting.training(folder).run() == want
        assert lines(folder) == lines(tmp_path / "whole")
        assert (folder / loop.BEST).read_bytes() == (tmp_path / "whole" / loop.BEST).read_bytes()


def test_the_bank_is_refreshed_only_where_it_is_read(seed, tmp_path):
    done = {}
    for history in ("frozen", "lora", "full"):
        training = Setting(seed, history=history).training(tmp_path / history)
        refresh, write_back, calls = training.model.refresh, training.model.write_back, []
        training.model.refresh = lambda read, refresh=refresh, calls=calls: calls.append("refresh") or refresh(read)
        training.model.write_back = lambda *a, write=write_back, calls=calls: calls.append("write") or write(*a)
        training.run()
        epochs, due = TRAIN.epochs, -(-training.steps // TRAIN.refresh_every)
        done[history] = (calls.count("refresh") - epochs, calls.count("write"))  # one before each validation
        assert done[history] == ((0, 0) if history == "full" else (due, training.steps)), history


def test_a_finished_training_is_not_repeated(seed, tmp_path):
    setting = Setting(seed, "id_only")
    want = setting.training(tmp_path).run()
    before = (tmp_path / loop.LAST).stat().st_mtime_ns
    assert setting.training(tmp_path).run() == want
    assert (tmp_path / loop.LAST).stat().st_mtime_ns == before


def test_the_best_epoch_is_tested(seed, tmp_path):
    setting = Setting(seed, "id_only")
    training = setting.training(tmp_path)
    result = training.run()
    valid = {line["step"]: line["valid"]["auc"] for line in lines(tmp_path) if "valid" in line}
    assert result["best_step"] == max(valid, key=lambda step: valid[step])
    assert result["valid"]["auc"] == max(valid.values())
    again = setting.training(tmp_path / "other")
    checkpoint.load(tmp_path / loop.BEST, again.model)
    assert again.evaluate("test") == result["test"]


def test_the_average_of_the_weights_is_kept(seed, tmp_path):
    """Every step enters it; the weights train on as if there were none."""
    decay, train = 0.8, dataclasses.replace(TRAIN, epochs=1, write_back=False)
    plain = Setting(seed, train=train).training(tmp_path / "plain")
    want, step, average = {}, plain.step, {}

    def watched(batch):
        number = plain.state.step
        step(batch)
        for name, p in plain.model.named_parameters():
            p = p.detach().double()
            keep = min(decay, (1 + number) / (10 + number))
            average[name] = p if number == 0 else keep * average[name] + (1 - keep) * p
        want.update({name: p.detach().clone() for name, p in plain.model.named_parameters()})

    plain.step = watched
    plain.run()
    averaged = Setting(seed, train=dataclasses.replace(train, average=decay)).training(tmp_path / "averaged")
    averaged.run()
    kept, _ = checkpoint.read(tmp_path / "averaged" / loop.BEST)
    last, _ = checkpoint.read(tmp_path / "averaged" / loop.LAST)
    assert any(not torch.equal(kept[f"model.{name}"], p) for name, p in want.items())
    for name, p in want.items():
        torch.testing.assert_close(kept[f"model.{name}"].double(), average[name], rtol=0, atol=1e-6)
        assert torch.equal(last[f"model.{name}"], p), name


def test_a_loss_that_is_not_finite(seed, tmp_path):
    setting = Setting(seed, "id_only", TrainConfig(epochs=3, batch_size=32, checkpoint_every=2))
    training = setting.training(tmp_path)
    step = training.step

    def poisoned(batch):
        if training.state.step == 5:
            torch.nn.init.constant_(training.model.ranker.users.weight, torch.nan)
        step(batch)

    training.step = poisoned
    with pytest.raises(loop.TrainingError, match=r"the loss was not finite at step 5 .*last\.safetensors is from an earlier"):
        training.run()
    _, state = checkpoint.read(tmp_path / loop.LAST)
    assert 4 <= state["step"] <= 5  # the last multiple of 2, or the end of the first epoch


@pytest.mark.parametrize("what", ["gradient", "parameter"])
def test_a_step_that_breaks_a_parameter(what, seed, tmp_path):
    """The loss is finite and a checkpoint due after the step: what lies there stays as it was."""
    setting = Setting(seed, "id_only", TrainConfig(epochs=3, batch_size=32, checkpoint_every=1))
    training = setting.training(tmp_path)
    training.run()
    (tmp_path / loop.RESULT).unlink()
    (tmp_path / loop.LAST).unlink()
    training, name = setting.training(tmp_path), "ranker.users.weight"
    weight = training.model.ranker.users.weight
    step, kept = training.step, {}

    def breaking(batch):
        if training.state.step == 4:
            kept.update({path: path.read_bytes() for path in tmp_path.glob("*.safetensors")})
            if what == "gradient":
                weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
            else:  # a finite gradient, and a step beyond what float32 holds
                training.config = dataclasses.replace(training.config, lr=1e42)
        step(batch)

    training.step = breaking
    said = f"the gradient of {name}" if what == "gradient" else r"ranker\.\S+"
    with pytest.raises(loop.TrainingError, match=rf"{said} was not finite at step 4; .*last\.safetensors is from an earlier"):
        training.run()
    assert {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == kept
    tensors, state = checkpoint.read(tmp_path / loop.LAST)
    assert state["step"] == 4
    assert all(t.isfinite().all() for t in tensors.values())


def test_what_progress_shows(seed, tmp_path):
    """The last step too, with the losses since the line before it; no AUC before there is one."""
    training = Setting(seed, "id_only").training(tmp_path)
    every = next(n for n in range(4, 10) if training.steps % n)
    training.config = dataclasses.replace(TRAIN, log_every=every)
    losses, shown = [], []
    whole = training.model.losses
    training.model.losses = lambda *words: losses.append(whole(*words)) or losses[-1]
    training.progress = lambda step, steps, numbers: shown.append((step, steps, numbers))
    training.run()
    assert [step for step, _, _ in shown] == [*range(every, training.steps, every), training.steps]
    assert ["valid_auc" in numbers for *_, numbers in shown] == [step >= training.per_epoch for step, *_ in shown]
    assert shown[-1][2]["valid_auc"] == training.state.best_auc
    written = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    ranking = [float(loss.ranking.detach()) for loss in losses]
    for start in range(0, training.steps, every):
        part = ranking[start : start + every]
        assert written[start + len(part)] == pytest.approx(sum(part) / len(part))


def test_another_configuration_is_refused(seed, tmp_path):
    setting = Setting(seed, "id_only")
    setting.training(tmp_path).run()
    (tmp_path / loop.RESULT).unlink()
    training = setting.training(tmp_path)
    training.about = {"arm": "another"}
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.safetensors: is of another configuration \(arm differ\)"):
        training.run()
    setting.training(tmp_path).run()
    training = setting.training(tmp_path)
    training.seed = 8
    with pytest.raises(checkpoint.CheckpointError, match=r"best\.safetensors: is of another configuration \(seed differ\)"):
        training.run()


@pytest.mark.parametrize(("split", "left", "message"), [
    ("valid", 9, r"made up: the validation rows \(9\) hold one class only or none"),
    ("valid", 0, r"made up: the validation rows \(0\) hold one class only or none"),
    ("train", 0, "made up: has no training rows"),
])  # fmt: skip
def test_rows_that_will_not_do(split, left, message, seed, tmp_path):
    """Said before the first step, not after the first epoch."""
    setting = Setting(seed, "id_only")
    training = setting.training(tmp_path / "t")
    training.rows[split] = training.rows[split][:left]
    setting.batches.data.rows.label[training.rows[split]] = 1
    with pytest.raises(loop.TrainingError, match=message):
        training.run()
    assert not (tmp_path / "t").exists()


def test_an_epoch_of_one_step_is_told(seed, tmp_path, caplog):
    def said(rows):
        setting = Setting(seed, "id_only", TrainConfig(epochs=1, batch_size=32))
        training = setting.training(tmp_path / str(rows))
        training.rows["train"] = training.rows["train"][:rows]
        training.per_epoch = max(1, rows // 32)
        caplog.clear()
        training._check_rows()
        return caplog.messages

    assert said(63) == ["made up: an epoch of 63 training rows is a single step with train.batch_size=32; a smaller one makes more"]
    assert said(64) == []


def test_learning_rate():
    config = TrainConfig(lr=2.0, warmup_steps=10)
    rates = [loop.learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2 * 0.91)
    assert rates[50] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.04)
    assert all(rate > 0 for rate in rates)


def test_the_result_is_json(seed, tmp_path):
    setting = Setting(seed, "id_only")
    assert setting.training(tmp_path).run() == json.loads((tmp_path / loop.RESULT).read_text())


def test_weights_broken_by_the_last_step_before_a_validation(seed, tmp_path):
    setting = Setting(seed, "id_only")
    training = setting.training(tmp_path)
    step = training.step

    def breaking(batch):
        step(batch)
        if training.state.step == training.per_epoch:
            torch.nn.init.constant_(training.model.ranker.users.weight, torch.nan)

    training.step = breaking
    with pytest.raises(loop.TrainingError, match=rf"the scores were not finite at step {training.per_epoch}; lower train\.lr"):
        training.run()
    assert not (tmp_path / loop.BEST).exists()
    if (tmp_path / loop.LAST).exists():
        tensors, state = checkpoint.read(tmp_path / loop.LAST)
        assert state["step"] < training.per_epoch
        assert not any(t.isnan().any() for t in tensors.values())
