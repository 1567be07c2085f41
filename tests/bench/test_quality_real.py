"""What the benchmarks of a pretrained model count and ask."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import retrieval_real  # noqa: E402


@pytest.mark.parametrize("task", retrieval_real.TASKS)
def test_a_question_has_its_answer(task: str) -> None:
    question = retrieval_real.TASKS[task](random.Random(1))
    context = question.notes if question.listed is None else question.listed(2000)
    said = " ".join(context)
    assert all(answer in said for answer in question.answers)
    assert retrieval_real.score(", ".join(question.answers), question) == 1
    assert retrieval_real.score("none of them", question) == 0
    if question.listed is not None:
        often = sorted(set(context), key=context.count, reverse=True)[: len(question.answers)]
        assert sorted(often) == sorted(question.answers)


def test_truncation_keeps_begin_and_end() -> None:
    ids = torch.arange(20)[None]
    assert retrieval_real.truncated(ids, 0.25).tolist() == [[0, 1, 17, 18, 19]]
