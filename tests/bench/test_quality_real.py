"""What the benchmarks of a pretrained model count and ask."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import quality_real  # noqa: E402
import retrieval_real  # noqa: E402


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("first", [0, 3])
def test_kept_pairs_are_those_of_the_ranges(window: int, first: int) -> None:
    length = 33
    forever = torch.rand(length, generator=torch.Generator().manual_seed(window)) < 0.2
    index = torch.arange(length, dtype=torch.int32)
    stays = forever | (index < first)
    live = LiveRanges(index[None, None], torch.where(stays, FOREVER, index + window)[None, None])
    assert quality_real.kept_pairs(length, window, first, forever) == live.live_pairs()


@pytest.mark.parametrize("share", quality_real.SHARES)
def test_the_window_is_the_widest_that_keeps_no_more(share: float) -> None:
    length, none = 200, torch.zeros(200, dtype=torch.bool)
    window = quality_real.window_for(share, length, 4, none)
    assert window is not None
    kept = [quality_real.kept_pairs(length, w, 4, none) / (length * (length + 1) / 2) for w in (window, window + 1)]
    assert kept[0] <= share < kept[1]
    assert quality_real.window_for(share, length, 4, torch.ones(length, dtype=torch.bool)) is None


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
