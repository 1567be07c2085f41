"""Does a model still find what a text says? Notes among a text's own sentences, and how each question about one is answered.

    ... The number of amber is 482913. ... The number of amber is   ->   482913

Two tasks after RULER (arXiv 2404.06654, section 3.1): one note, and one of four. The question begins the note again, so that
models that were never told to follow instructions can answer; an answer is right where each of its tokens is the likeliest one.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("amber", "cedar", "elder", "hazel", "jasmine", "laurel", "maple", "olive", "poppy", "rowan", "sage", "willow")
NOTES = (1, 4)
"""Notes of a question, in turns."""


@dataclass(frozen=True)
class Question:
    """int64 `[1, n]` of a text with notes in it and a question behind it, its answer included, which is the last tokens."""

    input_ids: Tensor
    answer_length: int

    def is_answered(self, logits: Tensor) -> bool:
        """Whether each token of the answer is the likeliest one, by the logits of the whole, `[1, n, vocabulary]`."""
        answer = self.input_ids[0, -self.answer_length :]
        return bool((logits[0, -self.answer_length - 1 : -1].argmax(dim=-1) == answer).all())


def questions(tokenizer: Any, text: str, length: int, count: int) -> list[Question]:
    """`count` questions over texts of `length` tokens at most, their note at depths from the begin to the end."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [_question(tokenizer, sentences, length, (n + 0.5) / count, random.Random(n), n) for n in range(count)]


def _question(
    tokenizer: Any, sentences: Sequence[str], length: int, depth: float, source: random.Random, number: int
) -> Question:
    names = source.sample(NAMES, NOTES[number % len(NOTES)])
    notes = [f"The number of {name} is {source.randrange(10**5, 10**6)}." for name in names]
    begin, answer = notes[0].removesuffix(".").rsplit(" ", 1)
    # The note that is asked for lies at the depth, the others evenly from there on around.
    places = [(depth + n / len(notes)) % 1 for n in range(len(notes))]

    def ids(first: int) -> tuple[list[int], list[int]]:
        parts = list(sentences[:first])
        for place, note in sorted(zip(places, notes, strict=True), reverse=True):
            parts.insert(round(place * first), note)
        question = " ".join((*parts, begin))
        whole = tokenizer(f"{question} {answer}").input_ids
        asked = tokenizer(question).input_ids
        return whole, whole[_common(whole, asked) :]

    most = bisect_right(range(1, len(sentences) + 1), length, key=lambda first: len(ids(first)[0]))
    whole, wanted = ids(most)
    return Question(torch.tensor([whole]), len(wanted))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
