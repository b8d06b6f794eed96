"""The word pieces of a catalogue's own texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

SPECIAL = ("[pad]", "[unk]", "[mask]")
PAD, UNKNOWN, MASK = range(len(SPECIAL))
CONTINUES = "##"


class Vocabulary:
    """Word pieces: frequent words whole, other words cut up. Lower case without accents; digits and punctuation stay.

    Args:
        pieces: all pieces in the order of their numbers, the first three being ``SPECIAL``. Pieces that continue a
            word start with ``##``.

    Raises:
        ValueError: if the first pieces are others, or a piece occurs twice.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)
        if tuple(self.pieces[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"pieces: started with {self.pieces[:3]}, must start with {list(SPECIAL)}")
        numbers = {piece: number for number, piece in enumerate(self.pieces)}
        if len(numbers) < len(self.pieces):
            raise ValueError("pieces: a piece occurs twice, each must have one number")
        self._tokenizer = _tokenizer(numbers)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Numbers of the pieces of ``text``; letters that no text of the catalogue had make their word unknown."""
        numbers: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return numbers

    @classmethod
    def build(cls, texts: Iterable[str], *, size: int = 4096, min_count: int = 2) -> Vocabulary:
        """The vocabulary of ``texts``: at most ``size`` pieces, joined ones at least ``min_count`` times in the texts.

        The same texts, in any order, give the same vocabulary.
        """
        from tokenizers.trainers import WordPieceTrainer

        tokenizer = _tokenizer({})
        words = [
            word
            for text in texts
            for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        ]
        # Left alone, the trainer numbers letters in the order of a hash map and then breaks ties by number: two runs
        # would differ. Given as special tokens, all letters come first and sorted. It skips letters that it finds only
        # with ##, and a word of known letters in new places should not be unknown: each gets both forms.
        alphabet = sorted({letter for word in words for letter in word} | set("0123456789"))
        letters = [*alphabet, *(CONTINUES + letter for letter in alphabet)]
        trainer = WordPieceTrainer(
            vocab_size=max(size, len(SPECIAL) + len(letters)), min_frequency=min_count, show_progress=False,
            special_tokens=[*SPECIAL, *letters], continuing_subword_prefix=CONTINUES, limit_alphabet=0,
        )  # fmt: skip
        tokenizer.train_from_iterator(sorted(words), trainer)
        numbers = tokenizer.get_vocab()
        return cls(sorted(numbers, key=lambda piece: numbers[piece]))


def _tokenizer(numbers: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordPiece(numbers, unk_token=SPECIAL[UNKNOWN], continuing_subword_prefix=CONTINUES,
                         max_input_chars_per_word=64)
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.BertNormalizer()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
