"""The made-up catalogue: repeatable numbers, a known truth, pictures and titles that tell of the items."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from em3.data.catalogue import make, writing
from em3.data.catalogue.attributes import ATTRIBUTES, NAMES
from em3.data.table import DataError

SMALL = dict(num_items=400, num_users=300, num_requests=3000, seed=7)
TINY = dict(num_items=50, num_users=10, num_requests=50, candidates=2)
NUMERIC = ("request", "timestamp", "label", "probability")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return make(tmp_path_factory.mktemp("catalogue") / "small", **SMALL)


def table(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pydict()


def columns(folder):
    """The rows as arrays: user and item as the numbers in their names."""
    read = table(folder, "interactions")
    numbers = {name: np.array(read[name]) for name in NUMERIC}
    numbers["user"], numbers["item"] = (np.array([int(s[1:]) for s in read[name]]) for name in ("user", "item"))
    return numbers | {"split": np.array(read["split"])}


def cold_rows(rows):
    """Nobody clicked the item in the training period; written out again here."""
    clicked = set(rows["item"][(rows["split"] == "train") & (rows["label"] == 1)].tolist())
    return np.array([item not in clicked for item in rows["item"].tolist()])


def about(folder):
    return json.loads((folder / "catalogue.json").read_text())


def test_layout(catalogue):
    names = {path.name for path in catalogue.iterdir()}
    assert names == {"items.parquet", "interactions.parquet", "truth.parquet", "pictures", "catalogue.json"}
    items = pq.read_schema(catalogue / "items.parquet")
    assert {name: str(items.field(name).type) for name in items.names} == {
        "item": "string", "title": "string", "picture": "string",
    }  # fmt: skip
    rows = pq.read_schema(catalogue / "interactions.parquet")
    assert {name: str(rows.field(name).type) for name in rows.names} == {
        "user": "string", "item": "string", "label": "int8", "timestamp": "int64", "request": "int64",
        "split": "string", "probability": "float",
    }  # fmt: skip
    assert about(catalogue)["parameters"] == SMALL | {"candidates": 5}


def test_same_seed_same_catalogue(catalogue, tmp_path):
    again = make(tmp_path / "again", **SMALL)
    for name in ("items", "interactions", "truth"):
        assert table(again, name) == table(catalogue, name)
    assert about(again) == about(catalogue)
    pictures = sorted(path.name for path in (catalogue / "pictures").iterdir())
    assert pictures == sorted(path.name for path in (again / "pictures").iterdir())
    for name in pictures[:20]:
        assert (again / "pictures" / name).read_bytes() == (catalogue / "pictures" / name).read_bytes()


def test_other_seed_other_catalogue(tmp_path):
    one, other = (make(tmp_path / str(seed), **TINY, seed=seed) for seed in (1, 2))
    ours, theirs = columns(one), columns(other)
    for name in ("user", "item", "label", "timestamp", "probability"):
        assert not np.array_equal(ours[name], theirs[name])
    assert table(one, "items")["title"] != table(other, "items")["title"]
    assert about(one)["sha256"] != about(other)["sha256"]


def test_numbers_are_pinned(tmp_path):
    """The same on every machine. A numpy release that changes its random streams may change this, and nothing else."""
    folder = make(tmp_path / "tiny", **TINY, seed=0)
    rows = columns(folder)
    split = np.array(["train", "valid", "test"])
    digest = hashlib.sha256()
    for numbers in (
        rows["request"], rows["user"], rows["item"], rows["timestamp"],
        (rows["split"][:, None] == split).argmax(1), np.rint(rows["probability"].astype(np.float64) * 1e6), rows["label"],
    ):  # fmt: skip
        digest.update(numbers.astype("<i8").tobytes())
    assert digest.hexdigest() == about(folder)["sha256"]
    assert digest.hexdigest() == "b86af34d366cfb7e0448a9ea0a93d898464abfebfedc33a622261a677a8b53b8"


def test_labels_agree_with_probabilities(catalogue):
    rows = columns(catalogue)
    p, label = rows["probability"].astype(np.float64), rows["label"]
    for part in (p > 0, p < 0.2, (p >= 0.2) & (p < 0.5), p >= 0.5):  # all rows, and at every level: calibrated
        error = np.sqrt((p[part] * (1 - p[part])).sum())
        assert part.sum() > 500
        assert abs(label[part].sum() - p[part].sum()) < 4 * error


def test_perfect_ranker(catalogue):
    rows = columns(catalogue)
    test, cold = rows["split"] == "test", cold_rows(rows)
    written = about(catalogue)["perfect_ranker_test_auc"]
    for name, part in {"all": test, "warm": test & ~cold, "cold": test & cold}.items():
        assert written[name] == pytest.approx(roc_auc_score(rows["label"][part], rows["probability"][part]), abs=1e-12)
    assert 0.78 < written["all"] < 0.92


def test_requests(catalogue):
    rows = columns(catalogue)
    assert len(rows["request"]) == 3000 * 5
    by_request = rows["item"].reshape(3000, 5)
    assert all(len(set(shown)) == 5 for shown in by_request.tolist())
    for name in ("request", "user", "timestamp", "split"):
        one = rows[name].reshape(3000, 5)
        assert (one == one[:, :1]).all()
    assert (np.diff(rows["timestamp"].reshape(3000, 5)[:, 0]) > 0).all()
    assert 90 < (rows["timestamp"][-1] - rows["timestamp"][0]) / 86_400 < 150
    split = rows["split"].reshape(3000, 5)[:, 0]
    assert split.tolist() == ["train"] * 2400 + ["valid"] * 300 + ["test"] * 300
    shown = np.bincount(rows["item"], minlength=400)
    assert shown.max() > 4 * np.median(shown)  # by popularity


def test_cold_items(catalogue):
    """A share of the items appears in the last part only, and is a share of its rows."""
    rows = columns(catalogue)
    cold = cold_rows(rows)
    test, valid = rows["split"] == "test", rows["split"] == "valid"
    assert 0.08 < cold[test].mean() < 0.25
    assert 0.01 < cold[valid].mean() < cold[test].mean()
    late = set(rows["item"].tolist()) - set(rows["item"][rows["split"] == "train"].tolist())
    assert 0.1 * 400 < len(late) < 0.2 * 400


def test_items_have_quirks_that_content_does_not_explain(catalogue):
    """What attributes leave of an item's mean logit is found again in the other half of its rows."""
    rows, truth = columns(catalogue), table(catalogue, "truth")
    features = np.concatenate([np.array(truth[name])[:, None] == np.unique(truth[name]) for name in NAMES], axis=1)
    p = rows["probability"].astype(np.float64)
    logit = np.log(p) - np.log1p(-p)
    shown = np.bincount(rows["item"], minlength=400) >= 20
    halves = []
    for half in (rows["user"] % 2 == 0, rows["user"] % 2 == 1):
        item = rows["item"][half]
        mean = (np.bincount(item, logit[half], 400) / np.bincount(item, minlength=400).clip(1))[shown]
        x = features[shown].astype(float)
        halves.append(mean - x @ np.linalg.lstsq(x, mean, rcond=None)[0])
    assert 0.06 < np.mean(halves[0] * halves[1]) < 0.2  # the quirk's variance is 0.35 squared


def test_missing_pictures_and_titles(catalogue):
    items = table(catalogue, "items")
    pictures = [name for name in items["picture"] if name is not None]
    assert 0.01 < 1 - len(pictures) / 400 < 0.08
    assert 0.005 < items["title"].count("") / 400 < 0.06
    assert not any(title == "" and picture is None for title, picture in zip(items["title"], items["picture"], strict=True))
    assert sorted(pictures) == sorted(f"pictures/{path.name}" for path in (catalogue / "pictures").iterdir())
    assert len(set(items["item"])) == 400


def test_titles_mention_attributes(catalogue):
    titles, truth = table(catalogue, "items")["title"], table(catalogue, "truth")
    described = [number for number, title in enumerate(titles) if title]
    words = {number: set(re.findall(r"[a-z]+", titles[number].lower())) for number in described}
    for attribute in ATTRIBUTES:
        if attribute.name == "count":
            continue  # said in phrases: "pair of", "3 pack"
        synonyms = {value[0]: {form for word in value for form in (word, f"{word}s")} for value in attribute.values}
        right = np.mean([bool(words[i] & synonyms[truth[attribute.name][i]]) for i in described])
        wrong = np.mean([bool(words[i] & set().union(*(s for v, s in synonyms.items() if v != truth[attribute.name][i]))) for i in described])
        assert right == pytest.approx(attribute.mentioned * (1 - attribute.wrong), abs=0.09), attribute.name
        assert wrong <= 0.06, attribute.name
        assert (wrong > 0) == (attribute.wrong > 0) or attribute.mentioned * attribute.wrong < 0.04, attribute.name
    years = [re.search(r"\b(19|20)\d\d\b", titles[i]) for i in described]
    pairs = [(int(year[0]), truth["year"][i]) for i, year in zip(described, years, strict=True) if year]
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.98
    assert all("  " not in title and " ," not in title and ",," not in title and "in," not in title for title in titles)


def pixels(catalogue):
    """Pictures ``[k, 64, 64, 3]`` and the numbers of their items."""
    names = table(catalogue, "items")["picture"]
    numbers = [number for number, name in enumerate(names) if name is not None]
    images = []
    for number in numbers:
        with Image.open(catalogue / names[number]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
            images.append(np.asarray(image))
    return np.stack(images).astype(np.float32), np.array(numbers)


def test_pictures_show_attributes(catalogue):
    """What a linear model reads out of a coarse view of held-out pictures; chance is 1 in 8 and 1 in 5."""
    images, numbers = pixels(catalogue)
    truth = table(catalogue, "truth")
    histogram = []
    for image in images.reshape(len(images), -1, 3) // 32:
        cells = (image @ [64, 8, 1]).astype(int)
        histogram.append(np.sqrt(np.bincount(cells, minlength=512) / cells.size))
    split = len(images) * 3 // 4
    for attribute, least in (("colour", 0.4), ("background", 0.6)):
        target = np.array(truth[attribute])[numbers]
        model = LogisticRegression(C=30, max_iter=300).fit(histogram[:split], target[:split])
        assert model.score(histogram[split:], target[split:]) > least
    light = images.mean((1, 2, 3))
    assert np.corrcoef(light, np.array(truth["light"])[numbers])[0, 1] > 0.5


def test_starts_over_where_it_was_cut_off(tmp_path, monkeypatch):
    drawn = []

    def cut_off(rng, values, styles):
        if len(drawn) == 10:
            raise KeyboardInterrupt
        drawn.append(1)
        return b"half"

    with monkeypatch.context() as patched:
        patched.setattr(writing, "draw_picture", cut_off)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", **TINY, seed=3)
    assert not (tmp_path / "cut" / "catalogue.json").exists()
    assert len(list((tmp_path / "cut" / "pictures").iterdir())) == 10
    (tmp_path / "cut" / "pictures" / "i999999.jpg").touch()
    (tmp_path / "cut" / ".items.parquet.1.tmp").touch()
    again, fresh = make(tmp_path / "cut", **TINY, seed=3), make(tmp_path / "fresh", **TINY, seed=3)
    files = {path.relative_to(fresh): path.read_bytes() for path in fresh.rglob("*") if path.is_file()}
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == files


def test_refuses_what_it_did_not_write(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "items.parquet").write_bytes(b"years of work")
    with pytest.raises(DataError, match=r"mine: must be empty, or an unfinished catalogue, but holds items\.parquet"):
        make(mine, **TINY)
    assert (mine / "items.parquet").read_bytes() == b"years of work"
    with pytest.raises(DataError, match="is a file"):
        make(mine / "items.parquet", **TINY)
    make(tmp_path / "done", **TINY)
    with pytest.raises(DataError, match="finished catalogue already"):
        make(tmp_path / "done", **TINY)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_items=49), "num_items: was 49, must be at least 50"),
        (dict(num_users=0), "num_users: was 0"),
        (dict(num_requests=49), "num_requests: was 49"),
        (dict(candidates=0), "candidates: was 0"),
        (dict(candidates=7), "candidates: was 7, must be at most an eighth of the 50 items"),
        (dict(seed=-1), "seed: was -1"),
    ],
)
def test_arguments(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "new", **TINY | wrong)
    assert not (tmp_path / "new").exists()
