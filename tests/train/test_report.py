"""The report: honest words, nothing foreign in the page, and how it shows in a real browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from em3.train.metrics import METRICS
from em3.train.report import (
    EM3,
    ID_ONLY,
    PERFECT,
    TWO_STAGE,
    Alignment,
    Arm,
    Card,
    Cost,
    Curve,
    Neighbours,
    RunSummary,
    write_report,
)
from em3.train.report.comparison import Difference, difference, headline

from .browser import Browser, find_browser

for package in ("matplotlib", "sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed")

HOSTILE = "<script>alert('1')</script><img src=http://example.invalid/x.png onerror=alert(2)>\"&amp;"
LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 4


def metrics(rng, centre):
    found = {m + p: (1.2 - centre - shift if m == "log_loss" else centre + shift)
             for p, shift in (("", 0), ("_warm", 0.02), ("_cold", -0.09)) for m in METRICS}  # fmt: skip
    return {key: float(value + rng.normal(0, 0.002)) for key, value in found.items()}


def curve(rng, best):
    steps, valid = list(range(0, 3000, 5)), list(range(100, 3001, 100))
    loss = 0.48 + 0.21 * np.exp(-np.array(steps) / 400) - 0.1 * (best - 0.7) + rng.normal(0, 0.012, len(steps))
    auc = best - 0.2 * np.exp(-np.array(valid) / 500) + rng.normal(0, 0.002, len(valid))
    return Curve(steps, loss.tolist(), valid, auc.tolist())


def alignment(rng, n=400, v=16):
    """Items of seven kinds; training turns their ID embeddings towards their content."""
    kinds = rng.integers(0, 9, n)
    centres = rng.normal(size=(9, v))
    content = centres[kinds] + rng.normal(0, 0.5, (n, v))
    after = content @ np.linalg.qr(rng.normal(size=(v, v)))[0]
    words = ["Lamp", "Chair", "Kettle", "Scarf", "Clock", "Bowl", HOSTILE, "Boots", "Tent"]
    numbers = {"cosine of an item's content and ID": [0.01, 0.71], "own ID nearest, share of items": [0.003, 0.36]}
    return Alignment.from_embeddings((content, rng.normal(size=(n, v))), (after, after + rng.normal(0, 0.4, (n, v))),
                                     [f"{words[k]} no. {i}" for i, k in enumerate(kinds)], numbers=numbers,
                                     groups=[words[k] for k in kinds])  # fmt: skip


def draw_pictures(folder, rng):
    """A tall, a wide and a grey one with transparency, and a file that is no picture."""
    from PIL import Image

    (folder / "pictures").mkdir()
    for name, shape in (("tall.jpg", (300, 200, 3)), ("wide.png", (90, 320, 3)), ("grey.png", (64, 64, 2))):
        rows = np.linspace(0, 200, shape[0])[:, None, None] + rng.integers(0, 55, shape)
        Image.fromarray(rows.astype(np.uint8), {3: "RGB", 2: "LA"}[shape[2]]).save(folder / "pictures" / name)
    (folder / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")


def full_run(rng, seeds=(1, 2, 3)):
    """A run like a real one, with hostile words wherever data reaches the page."""
    def arm(name, centre, step, memory, parts=None):
        return Arm(name, [metrics(rng, centre) for _ in seeds], [curve(rng, centre) for _ in seeds],
                   Cost(step * 0.94, step, step * 1.13, 512e3 / step, memory, parts or {}))  # fmt: skip

    parts = {"tokens": 4.1, "FQ-Former": 21.4, "history": 12.9, "contrast": 6.3, "ranker": 18.8, "optimiser": 9.7}
    arms = [
        arm(ID_ONLY, 0.7012, 31.4, 812), arm(TWO_STAGE, 0.7121, 36.9, 871), arm(EM3, 0.7259, 73.2, 1240, parts),
        arm("EM3 without contrast " + HOSTILE, 0.7188, 66.0, 1199),
        Arm(PERFECT, [metrics(rng, 0.8312)]),
    ]  # fmt: skip
    cards = [
        Card(HOSTILE, "pictures/tall.jpg"), Card("Blue striped kettle, 1.7 l", "pictures/wide.png", 0.913),
        Card("Small grey lamp", "pictures/grey.png", 0.87), Card("Boots without a picture", None, 0.812),
        Card(LONG, "pictures/broken.jpg", 0.8), Card("", "pictures/tall.jpg", 0.766),
    ]  # fmt: skip
    config = {"data": {"name": "catalogue", "items": 2000, "title": HOSTILE}, "train": {"lr": 0.001, "betas": [0.9, 0.99]},
              "em3": {"queries": 8, "contrast": True, "cache": None, "path": LONG}}  # fmt: skip
    return RunSummary(
        data="Synthetic catalogue", ranker="DIN", date="2026-02-03 14:05", version="0.4.0",
        machine="2 cores of an x86-64 processor, torch 2.13", seeds=list(seeds), arms=arms,
        facts={"Items": "2,000 (12 % cold)", "Training rows": "80,000", "Steps": "3,000 of 512 rows"},
        alignment=alignment(rng), neighbours=[Neighbours(dataclasses.replace(cards[i], similarity=None), [*cards[:i], *cards[i + 1 :]]) for i in range(3)],
        config=config, environment="em3 0.4.0 in /usr/lib/python3/em3\n  python   3.11\n" + "  x" * 200,
        command="em3 train --data catalogue --ranker din --seeds 1 2 3 --out runs/" + "a" * 150,
        warnings=[f"2 items have no words: {HOSTILE}", "the run was resumed at step 1,200"],
    )  # fmt: skip


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def page(tmp_path, rng):
    draw_pictures(tmp_path, rng)
    path = write_report(tmp_path, full_run(rng))
    assert path == tmp_path / "report.html"
    return path


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes; fails where an end tag closes another element."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.stack, self.found = [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag


def test_nothing_foreign_in_the_page(page):
    text = page.read_text("utf-8")
    found = Elements(text).found
    assert not [tag for tag, _ in found if tag in ("script", "iframe", "object", "form")]
    for _, attributes in found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)|@import", text)
    pictures = [attributes["src"] for tag, attributes in found if tag == "img"]
    assert len(pictures) == 3 * 4  # of six cards one has no picture and one a broken file
    assert len(text) < 1_500_000


def test_drawings_are_small_and_their_ids_differ(page):
    text = page.read_text("utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    assert all(len(drawing) < 200_000 for drawing in drawings)
    assert not re.search("#000[01]", "".join(drawings))  # every colour has become a variable
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="|url\()#([^")]*)', text):
        assert used in ids


def test_unreadable_pictures_are_drawn_and_named(page):
    text = page.read_text("utf-8")
    assert text.count("picture cannot be read") == 3
    assert text.count("broken.jpg") == 1  # one warning for the three
    assert text.index("Warnings") < text.index("broken.jpg") < text.index("Results on")
    assert text.count('<div class="none">no picture</div>') == 3


def test_the_same_run_gives_the_same_page(tmp_path, rng):
    draw_pictures(tmp_path, rng)
    run = full_run(rng)
    first = write_report(tmp_path, run).read_bytes()
    again = RunSummary.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    assert write_report(tmp_path, again).read_bytes() == first
    assert not list(tmp_path.glob(".*"))


def test_a_bare_run_has_a_page(tmp_path, rng):
    """One arm, one seed, nothing optional; words that UTF-8 cannot hold."""
    run = RunSummary("x\ud800", "DIN", "today", "0", "here", [7], [Arm(EM3, [metrics(rng, 0.6)])])
    text = write_report(tmp_path, run).read_text("utf-8")
    Elements(text)
    assert "EM3 was not compared with ID-only: ID-only did not take part." in text
    assert "One seed, so no standard error." in text
    assert "<svg" not in text
    assert "±" not in text
    assert "Warnings" not in text


def run_of(differences, metric="auc"):
    """EM3 against ID-only with these differences in one metric, a seed each."""
    arms = [Arm(ID_ONLY, [{metric: 0.7} for _ in differences]), Arm(EM3, [{metric: 0.7 + d} for d in differences])]
    return RunSummary("d", "r", "t", "0", "m", list(range(len(differences))), arms)


@pytest.mark.parametrize(
    ("differences", "start", "part"),
    [
        ([0.011, 0.012, 0.013, 0.012], "EM3 ranks better than ID-only: +0.0120 ± 0.0004", "29.4 s.e. over 4 paired seeds"),
        ([-0.011, -0.012, -0.013], "EM3 ranks worse than ID-only: \N{MINUS SIGN}0.0120", "p = 0.002"),
        ([0.010, -0.008, 0.003], "No difference shown between EM3 and ID-only: +0.0017", "0.3 s.e."),
        # More than two standard errors, and still p > 0.05 with three seeds.
        ([0.004, 0.009, 0.014], "No difference shown between EM3 and ID-only: +0.0090", "3.1 s.e. over 3"),
        ([0.02], "EM3 minus ID-only: +0.0200 in test AUC with one seed.", "may be chance"),
        ([0.0, 0.0], "No difference shown between EM3 and ID-only: 0.0000", "p = 1.000"),
    ],
)  # fmt: skip
def test_the_sentence_is_honest(differences, start, part):
    (sentence,) = headline(run_of(differences))
    assert sentence.startswith(start)
    assert part in sentence


def test_cold_items_and_the_two_stage_arm_are_spoken_of(rng):
    first, cold, two_stage = headline(full_run(rng))
    assert first.startswith("EM3 ranks better than ID-only: ")
    assert cold.startswith("EM3 ranks better than ID-only on cold items: ")
    assert two_stage.startswith("EM3 ranks better than two-stage: ")


def test_differences_are_paired():
    run = run_of([0.01, 0.03, 0.02])
    found = difference(run, ID_ONLY, "auc")
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(0.01 / math.sqrt(3))
    assert found.standard_errors == pytest.approx(2 * math.sqrt(3))
    assert difference(run, TWO_STAGE, "auc") is None
    assert difference(run, ID_ONLY, "gauc") is None


def test_p_is_that_of_a_paired_t_test(rng):
    stats = pytest.importorskip("scipy.stats")
    a, b = rng.random(5), rng.random(5)
    run = run_of(list(b - a))
    assert difference(run, ID_ONLY, "auc").p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert Difference(0.1, 0.0, 3).significant
    assert not Difference(0.0, 0.0, 3).significant


def test_a_lower_log_loss_is_the_better_one(tmp_path):
    for sign, kind in ((-1, "good"), (1, "bad")):
        arms = [Arm(ID_ONLY, [{"auc": 0.7, "log_loss": 0.5 + s} for s in (0, 0.001, 0.002)]),
                Arm(EM3, [{"auc": 0.7, "log_loss": 0.5 + s + sign * 0.1} for s in (0, 0.001, 0.003)])]  # fmt: skip
        text = write_report(tmp_path, RunSummary("d", "r", "t", "0", "m", [1, 2, 3], arms)).read_text("utf-8")
        assert re.findall(r'<span class="(good|bad)">', text) == [kind]


def test_a_seed_without_the_metric_leaves_no_mean(tmp_path):
    """A mean over the other seeds would stand beside means over all."""
    arms = [Arm(EM3, [{"auc": 0.7}, {"auc": None}])]
    text = write_report(tmp_path, RunSummary("d", "r", "t", "0", "m", [1, 2], arms)).read_text("utf-8")
    assert "0.7000" not in text


def test_curves_of_unequal_length_meet_where_all_seeds_are(tmp_path, rng):
    from em3.train.report.figures import _common

    steps, values = _common([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 5.0, 6.0])])
    assert steps.tolist() == [2, 3]
    assert values.tolist() == [[2, 3], [4, 5]]
    long = list(range(1000))
    steps, values = _common([(long, [float(s) for s in long])])
    assert len(steps) == 150
    np.testing.assert_allclose(values[0], steps)


def test_alignment_shows_what_training_did(rng):
    found = alignment(rng, n=1000)
    assert len(found.groups) == 400
    apart = [np.linalg.norm(np.subtract(c, i), axis=1).mean() for c, i in (
        (found.content_before, found.ids_before), (found.content_after, found.ids_after))]  # fmt: skip
    assert apart[1] < 0.5 * apart[0]
    plain = Alignment.from_embeddings((np.eye(3), np.eye(3)), (np.eye(3), np.eye(3)), ["Red lamp", "", "Blue"])
    assert plain.groups == ["Red", "", "Blue"]
    with pytest.raises(ValueError, match="must be four times"):
        Alignment.from_embeddings((np.eye(3), np.eye(2)), (np.eye(3), np.eye(3)), ["a"] * 3)
    with pytest.raises(ValueError, match=r"must be \[3\]"):
        Alignment.from_embeddings((np.eye(3), np.eye(3)), (np.eye(3), np.eye(3)), ["a"] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("ranker"), r"run: unknown keys \[\], missing keys \['ranker'\]"),
        (lambda v: v.update(rankr="DIN"), r"run: unknown keys \['rankr'\]"),
        (lambda v: v["arms"][0].update(name=3), r"run.arms\[0\].name: was int, must be str"),
        (lambda v: v["arms"][0]["metrics"][1].update(auc="0.7"), r"run.arms\[0\].metrics\[1\].auc: was str, must be float"),
        (lambda v: v.update(seeds=[1]), "arms: ID-only had metrics of 3 seeds, must be 1"),
        (lambda v: v["arms"][2]["curves"].pop(), "arms: EM3 had curves of 2 seeds, must be 3"),
        (lambda v: v["arms"].append(v["arms"][0]), "different arms"),
        (lambda v: v.update(seeds=[True, 2, 3]), r"run.seeds\[0\]: was bool, must be int"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_read_says_where(change, message, rng):
    values = full_run(rng).to_dict()
    change(values)
    with pytest.raises(ValueError, match=message):
        RunSummary.from_dict(values)


def test_the_old_report_stays_when_writing_fails(tmp_path, monkeypatch):
    path = write_report(tmp_path, run_of([0.01]))
    before = path.read_bytes()

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, run_of([0.02]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_report_draws_in_nothing_heavy():
    code = "import sys, em3.train.report; print([m for m in ('matplotlib', 'sklearn', 'scipy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed (or name one in EM3_BROWSER)")
    with Browser(program) as running:
        yield running


def test_the_browser_tells_of_faults(browser, tmp_path):
    """What the test below relies on: a page with every fault is caught at each."""
    path = tmp_path / "bad.html"
    path.write_text('<div style="width: 2000px">x</div><img src="http://127.0.0.1:9/x.png"><script>missing()</script>')
    found = browser.open(path, 1440)
    assert found.width >= 2000
    assert found.scripts == 1
    assert any("missing is not defined" in error for error in found.errors)
    assert found.requests == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(width, dark, browser, page):
    found = browser.open(page, width, dark=dark)
    assert found.errors == []
    assert found.requests == []
    assert found.scripts == 0
    assert found.width == width  # nothing sticks out, and the page fills the window
    assert HOSTILE in found.text
    assert "EM3 ranks better than ID-only" in found.text
    assert found.screenshot.startswith(b"\x89PNG")
