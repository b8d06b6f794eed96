"""``Vocabulary``: what becomes a piece, and that nothing but the texts decides it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from em3.encoders.vocabulary import SPECIAL, UNKNOWN, Vocabulary

TEXTS = ["Fantômas (1913) Crime Drama", "The Bank (1915) Comedy", "Le Crime de la BANK (1915) Drama", "", "42 Tables"]


def pieces_of(vocabulary: Vocabulary, text: str) -> list[str]:
    return [vocabulary.pieces[number] for number in vocabulary.encode(text)]


def test_frequent_words_are_whole_and_others_cut_up():
    vocabulary = Vocabulary.build(TEXTS)
    assert pieces_of(vocabulary, "Crime DRAMA (1915)") == ["crime", "drama", "(", "1915", ")"]
    assert "".join(piece.removeprefix("##") for piece in pieces_of(vocabulary, "Fantômas")) == "fantomas"
    assert "".join(piece.removeprefix("##") for piece in pieces_of(vocabulary, "2413")) == "2413"


def test_other_forms_of_a_letter_are_the_same_word():
    vocabulary = Vocabulary.build(TEXTS)
    decomposed, wide = "Fanto\u0302mas", "\uff22\uff41\uff4e\uff4b"
    assert vocabulary.encode(decomposed) == vocabulary.encode("fantômas")
    assert vocabulary.encode(wide) == vocabulary.encode("bank")


def test_unseen_letters_and_empty_texts():
    vocabulary = Vocabulary.build(TEXTS)
    assert vocabulary.encode("日") == [UNKNOWN]
    assert vocabulary.encode("") == vocabulary.encode("  ") == []
    assert vocabulary.encode("[mask]") != [2], "a title cannot spell a special piece"
    assert Vocabulary.build([]).pieces == [*SPECIAL, *"0123456789", *(f"##{digit}" for digit in range(10))]


def test_size_is_kept_but_every_letter_is_there():
    texts = [f"{a}{b}{c}" for a in "abcd" for b in "efgh" for c in "ijkl"] * 2
    assert len(Vocabulary.build(texts, size=60)) == 60
    small = Vocabulary.build(texts, size=5)
    assert small.pieces[3:] == [*"0123456789abcdefghijkl", *(f"##{letter}" for letter in "0123456789abcdefghijkl")]


def test_min_count():
    vocabulary = Vocabulary.build(["house house house tree tree"], min_count=3)
    assert "house" in vocabulary.pieces
    assert "tree" not in vocabulary.pieces


def test_the_texts_alone_decide():
    """In another process hash maps have another order; and the order of the texts makes no difference."""
    code = f"from em3.encoders import Vocabulary; print(ascii(Vocabulary.build({TEXTS[::-1]!r}).pieces))"
    pieces = Vocabulary.build(TEXTS).pieces
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == ascii(pieces)


def test_error_messages():
    with pytest.raises(ValueError, match=r"pieces: started with \['a'\], must start with"):
        Vocabulary(["a"])
    with pytest.raises(ValueError, match="a piece occurs twice"):
        Vocabulary([*SPECIAL, "a", "a"])
