"""The table of shapes, and a user's file of the same form."""

from __future__ import annotations

import pytest

pytest.importorskip("yaml")

from em3.benchmarks import shapes

GOOD = "contrastive_loss:\n  - {name: mine, B: 4, V: 8}\n"


def load(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return shapes.load(path)


def test_the_table_covers_what_it_promises():
    table = shapes.load()
    assert {shape.op for shape in table} == set(shapes.DIMENSIONS)
    for op in shapes.DIMENSIONS:
        of_op = [shape for shape in table if shape.op == op]
        assert any(shape.quick for shape in of_op)
        assert any(shape.sweep for shape in of_op)
        assert all(shape.source for shape in of_op)

    def span(op, key):
        values = [shape.dims[key] for shape in table if shape.op == op]
        flat = [n for v in values for n in (v if isinstance(v, list) else [v])]
        return min(flat), max(flat)

    assert span("qformer_attention", "N") == (50, 1024)
    assert span("qformer_attention", "Q") == (1, 64)
    assert span("qformer_attention", "C") == (256, 1024)
    assert span("qformer_attention", "D") == (256, 1024)
    assert {len(s.dims["N"]) for s in table if s.op == "qformer_attention"} == {1, 2, 3}
    assert span("lora_target_attention", "N") == (50, 10_000)
    assert span("lora_linear", "R") == (4, 64)
    assert span("lora_linear", "G") == (0, 1024)
    assert span("contrastive_loss", "B") == (256, 65_536)


def test_a_users_file(tmp_path):
    text = GOOD + "sweeps:\n  - {op: contrastive_loss, of: mine, over: B, values: [2, 16]}\n"
    mine, two, sixteen = load(tmp_path, text)
    assert (mine.op, mine.name, mine.source, mine.quick, mine.sweep) == ("contrastive_loss", "mine", "mine.yaml", False, {})
    assert mine.label == "B=4 V=8"
    assert two.dims == {"B": 2, "V": 8}
    assert sixteen.name == "mine B=16"
    assert sixteen.sweep == {"over": "B", "at": 16, "of": "mine"}


def test_labels_leave_out_what_is_as_usual(tmp_path):
    entry = "{name: a, B: 2, N: [3, 4], C: [8, 16], D: 8, H: 2, Q: 1%s}"
    (plain,) = load(tmp_path, f"qformer_attention: [{entry % ''}]")
    (marked,) = load(tmp_path, f"qformer_attention: [{entry % ', tokens: trained, lengths: skewed'}]")
    assert plain.label == "B=2 N=3+4 C=8+16 D=8 H=2 Q=1"
    assert marked.label == plain.label + " trained skewed"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2", "mine.yaml: while parsing"),
        ("7", "mine.yaml: was int, must be operations"),
        ("[" * 5000, "mine.yaml: "),
        (GOOD + GOOD, "mine.yaml: the key 'contrastive_loss' was given twice"),
        ("contrastive_loss: [{name: a, B: 4, V: 4, B: 5}]", "mine.yaml: the key 'B' was given twice"),
        ("contrastive_loss: [{name: 2024-13-45, B: 4, V: 4}]", "mine.yaml: month must be in 1..12"),
        ("contrastive_loss: [{name: a, B: 4, V: 4, quick: 'no'}]", "a: quick: was 'no', must be true or false"),
        ("contrastive_loss: [{name: null, B: 4, V: 4}]", "name: was None, must be a line of text"),
        ("contrastive_loss: [{name: [a], B: 4, V: 4}]", "name: was ['a'], must be a line of text"),
        ('contrastive_loss: [{name: "a\\nb", B: 4, V: 4}]', "name: was 'a\\nb', must be a line of text"),
        ("contrastive_loss: [{name: a, B: '4', V: 4}]", "B: was '4', must be a whole number"),
        ("contrastive_loss: [{name: a, B: [4], V: 4}]", "B: was [4], must be a whole number"),
        ("contrastive: []", "no operation 'contrastive'; did you mean 'contrastive_loss'?"),
        ("contrastive_loss: 3", "contrastive_loss: must be a list of shapes"),
        ("contrastive_loss: [{name: a, B: 4}]", "contrastive_loss: a: V was not given"),
        ("contrastive_loss: [{B: 4, V: 4}]", "a shape without a name: name was not given"),
        ("contrastive_loss: [{name: a, B: 4, V: 4, quikc: true}]", "no key 'quikc'; did you mean 'quick'?"),
        ("contrastive_loss: [{name: a, B: 0, V: 4}]", "B: was 0, must be a whole number of at least 1"),
        ("contrastive_loss: [{name: a, B: true, V: 4}]", "B: was True, must be a whole number"),
        (GOOD + "  - {name: mine, B: 5, V: 8}", "the name 'mine' was given twice"),
        ("lora_linear: [{name: a, T: 4, C: 4, D: 4, R: 1, G: -1}]", "G: was -1, must be"),
        ("qformer_attention: [{name: a, B: 1, N: 4, C: [4], D: 4, H: 2, Q: 1}]", "N: was 4, must be a list with one number"),
        ("qformer_attention: [{name: a, B: 1, N: [4, 5], C: [4], D: 4, H: 2, Q: 1}]", "C: was [4], must have one width for each of the 2"),
        ("qformer_attention: [{name: a, B: 1, N: [4], C: [4], D: 4, H: 3, Q: 1}]", "H: was 3, must divide D = 4"),
        ("qformer_attention: [{name: a, B: 1, N: [4], C: [4], D: 4, H: 2, Q: 1, tokens: train}]", "tokens: no value 'train'; did you mean 'trained'?"),
        (GOOD + "sweeps: [{op: contrastive_loss, of: min, over: B, values: [1]}]", "of: no shape 'min'; did you mean 'mine'?"),
        (GOOD + "sweeps: [{op: contrastive_loss, of: mine, over: N, values: [1]}]", "over: no key 'N'"),
        (GOOD + "sweeps: [{op: contrastive_loss, of: mine, over: B}]", "values was not given"),
        (GOOD + "sweeps: [{op: contrastive_loss, of: mine, over: B, values: []}]", "values: was [], must be a list of numbers"),
    ],
)  # fmt: skip
def test_complaints(tmp_path, text, complaint):
    with pytest.raises(shapes.ShapeError) as stop:
        load(tmp_path, text)
    assert complaint in str(stop.value)
    assert "\n" not in str(stop.value)
