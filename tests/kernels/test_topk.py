from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewriter.kernels import reference
from rewriter.kernels import running_topk_ranges


@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 75), st.sampled_from(["distinct", "tied", "nan"]))
def test_equals_its_definition(seed: int, length: int, keep: int, kind: str) -> None:
    score = torch.randn(2, 2, length, generator=torch.Generator().manual_seed(seed))
    if kind != "distinct":
        score = (score * 2).round()
    if kind == "nan":
        score[score > 1] = float("nan")
    live, expected = running_topk_ranges(score, keep), reference.running_topk_ranges(score, keep)
    assert torch.equal(live.start, expected.start)
    assert torch.equal(live.end, expected.end)


def test_every_query_sees_exactly_the_best_keys_of_its_prefix() -> None:
    score = torch.rand(1, 1, 50)
    visible = running_topk_ranges(score, 7).visible(torch.arange(50))[0, 0]
    for i in range(50):
        best = set(score[0, 0, : i + 1].topk(min(7, i + 1)).indices.tolist())
        assert set(visible[i].nonzero().flatten().tolist()) == best


def test_of_equal_scores_the_older_key_wins() -> None:
    assert (
        running_topk_ranges(torch.zeros(1, 1, 6), 2).visible(torch.arange(6))[0, 0, -1].tolist()
        == [True, True] + [False] * 4
    )


@pytest.mark.parametrize(
    ("score", "keep", "message"),
    [
        (torch.zeros(1, 1, 4), 0, "keep must be at least 1, got 0"),
        (torch.zeros(1, 1, 4), -3, "keep must be at least 1, got -3"),
        (torch.zeros(4), 2, r"float tensor \[B, H, K\], got torch.float32 \[4\]"),
        (torch.zeros(1, 1, 4, dtype=torch.int64), 2, "got torch.int64"),
    ],
)
def test_bad_input_is_named(score: torch.Tensor, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        running_topk_ranges(score, keep)


def test_a_transposed_score_has_the_same_ranges() -> None:
    """A projection to one score per head gives such a layout."""
    score = torch.randn(1, 50, 3)
    ours = running_topk_ranges(score.transpose(1, 2), 7)
    assert torch.equal(ours.end, running_topk_ranges(score.transpose(1, 2).contiguous(), 7).end)
