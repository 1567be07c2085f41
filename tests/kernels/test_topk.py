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


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 20), st.booleans())
def test_segments_restart_the_ranking(seed: int, length: int, keep: int, tied: bool) -> None:
    """Packed documents and padding: each document is ranked as if it were alone."""
    random = torch.Generator().manual_seed(seed)
    score = torch.randn(2, 3, length, generator=random)
    score = (score * 2).round() * 0.5 if tied else score  # -0.0 among them
    steps = (torch.rand(2, 1, length, generator=random) < 0.1).int()
    documents = 1 + steps.cumsum(dim=2, dtype=torch.int32)
    padding = torch.rand(2, 1, length, generator=random) < 0.1
    segment = torch.where(padding, 0, documents)
    live = running_topk_ranges(score, keep, segment=segment)
    assert torch.equal(live.end, reference.running_topk_ranges(score, keep, segment=segment).end)
    row = torch.arange(length)
    visible = live.visible(row) & (documents[..., None, :] == documents[..., :, None]) & ~padding[..., None, :]
    for b in range(2):
        for h in range(3):
            for i in range(length):
                allowed = [j for j in range(i + 1) if documents[b, 0, j] == documents[b, 0, i] and not padding[b, 0, j]]
                best = sorted(allowed, key=lambda j: (-score[b, h, j].item(), j))[:keep]
                assert visible[b, h, i].nonzero().flatten().tolist() == sorted(best)


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


def test_a_segment_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"segment must be int32 \[B\|1, H\|1, K\] with K = 4 keys, got torch.int64 \[1, 1, 3\]"
    ):
        running_topk_ranges(torch.zeros(1, 1, 4), 2, segment=torch.zeros(1, 1, 3, dtype=torch.int64))


def test_a_transposed_score_has_the_same_ranges() -> None:
    """A projection to one score per head gives such a layout."""
    score = torch.randn(1, 50, 3)
    ours = running_topk_ranges(score.transpose(1, 2), 7)
    assert torch.equal(ours.end, running_topk_ranges(score.transpose(1, 2).contiguous(), 7).end)
