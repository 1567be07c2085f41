"""The retrieval task of `train_retrieval.py`, `quality_chunked.py` and `prefill.py`: notes among sentences, and a question.

    note bafe kilo muna .  the grass is green .  ...  question what was noted for bafe ? bafe   ->   kilo muna

Each note is a key word and two words noted for it. In the pass-key task one note, whose key is `passkey`, lies in a
context of sentences; in the key-value task every eighth word of the context begins a note. A question is only ever asked for
a note of the context, so that a context makes its own questions likely.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers import models
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS = "<bos>"
SENTENCES = (
    "the grass is green .",
    "the sky is blue .",
    "the sun is warm today .",
    "we went to the river .",
    "there and back again .",
    "a dog ran over the hill .",
    "it was late in the day .",
    "they sat under a tree .",
    "he read an old book .",
    "she wrote a long letter .",
    "rain fell on the roof .",
    "the road goes on and on .",
)
PASSKEY = "passkey"
QUESTION = "question what was noted for {0} ? {0}"
ANSWER_LENGTH = 2
SPACING = 8
"""Tokens from a note of the key-value task to the next."""

_PLAIN = frozenset(f"note {QUESTION.format(PASSKEY)} {' '.join(SENTENCES)}".split())
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = tuple(sorted({a + b for a in _SYLLABLES for b in _SYLLABLES} - _PLAIN)[::2])
"""2,449 words of two syllables: keys and values."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {word: number for number, word in enumerate((BOS, "<unk>", *sorted(_PLAIN), *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, unk_token="<unk>"
    )


@dataclass(frozen=True)
class Sample:
    """A context and what can be asked about it.

    Attributes:
        context: words, without a BOS.
        notes: key -> the two words noted.
        key: that the question is for.
    """

    context: list[str]
    notes: dict[str, tuple[str, str]]
    key: str

    @property
    def question(self) -> list[str]:
        return QUESTION.format(self.key).split()

    @property
    def answer(self) -> tuple[str, str]:
        return self.notes[self.key]


def filler(rng: random.Random, length: int) -> list[str]:
    """So many words of sentences; the last may be cut."""
    words: list[str] = []
    while len(words) < length:
        words.extend(rng.choice(SENTENCES).split())
    return words[:length]


def make_context(
    rng: random.Random, length: int, places: dict[int, str]
) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """`length` words with a note for each key at its place (a multiple of 5, say, so that notes do not overlap)."""
    words, notes = filler(rng, length), {}
    for place, key in places.items():
        first, second = rng.sample(WORDS, 2)
        words[place : place + 5] = ["note", key, first, second, "."]
        notes[key] = (first, second)
    return words, notes


def pass_key(rng: random.Random, length: int, depth: float) -> Sample:
    """One note among sentences, at `depth` (0 the begin, 1 the end) of the context."""
    context, notes = make_context(rng, length, {round(depth * (length - 5)): PASSKEY})
    return Sample(context, notes, PASSKEY)


def key_value(rng: random.Random, length: int, depth: float) -> Sample:
    """A note at every eighth word; the question is for the one at `depth`."""
    places = range(0, length - 4, SPACING)
    keys = rng.sample(WORDS, len(places))
    context, notes = make_context(rng, length, dict(zip(places, keys, strict=True)))
    return Sample(context, notes, keys[round(depth * (len(keys) - 1))])


TASKS = {"pass key": pass_key, "key-value": key_value}


def training_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list[int], int]:
    """(ids of a row of `length` tokens: a context, then questions with their answers to the end; length of the context)."""
    size = rng.randint(length // 4, length - 32)
    if rng.random() < 0.25:  # as the pass-key task has it
        places = {rng.randrange(0, size - 4): PASSKEY}
    else:
        slots = list(range(rng.randrange(SPACING), size - 4, SPACING))
        count = len(slots) if rng.random() < 0.5 else rng.randint(1, len(slots))
        keys = rng.sample(WORDS, count)
        if rng.random() < 0.1:
            keys[0] = PASSKEY
        places = dict(zip(rng.sample(slots, count), keys, strict=True))
    words, notes = make_context(rng, size, places)
    while len(words) < length:
        key = rng.choice(list(notes))
        words += [*QUESTION.format(key).split(), *notes[key], "."]
    return tokenizer.convert_tokens_to_ids([BOS, *words[: length - 1]]), size + 1


def repeated_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list[int], int]:
    """The same for random words, and then pieces of what they are: every token of a piece but its first can be found before."""
    words = rng.sample(WORDS, rng.randint(length // 4, length // 2))
    size = len(words)
    while len(words) < length:
        begin, piece = rng.randrange(size), rng.randint(4, 16)
        words += words[begin : min(begin + piece, size)]
    return tokenizer.convert_tokens_to_ids([BOS, *words[: length - 1]]), size + 1


def training_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, rows: int, length: int, repeated: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 `[rows, length]`, bool of the same shape: true for what is learned, questions and answers).

    Args:
        repeated: share of rows of random words that repeat, from which a model learns to look things up.
    """
    make = [repeated_row if rng.random() < repeated else training_row for _ in range(rows)]
    made = [row(rng, tokenizer, length) for row in make]
    ids = torch.tensor([row for row, _ in made])
    begins = torch.tensor([begin for _, begin in made])
    return ids, torch.arange(length)[None] >= begins[:, None]
