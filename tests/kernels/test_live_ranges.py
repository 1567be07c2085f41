from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges


def dense(live: LiveRanges) -> torch.Tensor:
    return live.visible(torch.arange(live.num_keys))


def indices(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(size)[:, None], torch.arange(size)[None, :]


def test_constructors_are_the_masks_they_are_named_after() -> None:
    i, j = indices(9)
    assert torch.equal(dense(LiveRanges.causal(9))[0, 0], j <= i)
    assert dense(LiveRanges.bidirectional(9)).all()
    assert torch.equal(dense(LiveRanges.sliding_window(9, 3))[0, 0], (j <= i) & (i - j < 3))
    assert torch.equal(dense(LiveRanges.sliding_window(9, 3, sinks=2))[0, 0], (j <= i) & ((i - j < 3) | (j < 2)))
    is_separator = torch.tensor([[0, 0, 0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    expected = (j <= i) & ((i - j < 2) | (j < 1) | is_separator[:, None, :])
    assert torch.equal(dense(LiveRanges.separators(is_separator, window=2, initial=1))[:, 0], expected)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    assert torch.equal(dense(LiveRanges.documents(documents))[0, 0], documents[0][:, None] == documents[0][None, :])
    tokens = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]])
    assert torch.equal(dense(LiveRanges.padding(tokens))[0, 0], tokens.bool().expand(9, 9))
    prefix = torch.tensor([0, 4])
    assert torch.equal(dense(LiveRanges.prefix(9, prefix))[:, 0], (j <= i) | (j < prefix[:, None, None]))


def test_a_window_as_long_as_the_sequence_is_no_window() -> None:
    for window in (9, 10, 2**31 - 1, 2**40):
        assert torch.equal(dense(LiveRanges.sliding_window(9, window)), dense(LiveRanges.causal(9)))


ranges = st.integers(1, 12).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(-2, k + 2), min_size=k, max_size=k),
        st.lists(st.one_of(st.integers(-2, k + 3), st.just(FOREVER)), min_size=k, max_size=k),
    )
)


def build(pair: tuple[list[int], list[int]]) -> LiveRanges:
    return LiveRanges(*(torch.tensor(part, dtype=torch.int32)[None, None] for part in pair))


@given(ranges)
def test_counts_pressure_and_pairs_agree_with_the_dense_mask(pair: tuple[list[int], list[int]]) -> None:
    live = build(pair)
    visible = dense(live)
    assert torch.equal(live.live_counts(), visible.sum(dim=3))
    assert live.pressure() == int(visible.sum(dim=3).max())
    assert live.live_pairs() == int(visible.sum())


@given(ranges, st.data())
def test_intersection_is_and(pair: tuple[list[int], list[int]], data: st.DataObject) -> None:
    live = build(pair)
    window = data.draw(st.integers(1, live.num_keys + 1))
    other = LiveRanges.sliding_window(live.num_keys, window)
    assert torch.equal(dense(live & other), dense(live) & dense(other))


def test_rows_and_heads_broadcast() -> None:
    live = LiveRanges.padding(torch.tensor([[0, 1, 1], [1, 1, 0]])) & LiveRanges.causal(3)
    assert live.shape == (2, 1, 3)
    assert live.live_counts(torch.tensor([[2], [1]])).tolist() == [[[2]], [[2]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LiveRanges.sliding_window(4, 0), "window must be at least 1.*got 0"),
        (lambda: LiveRanges.sliding_window(4, 2, sinks=-1), "sinks must not be negative, got -1"),
        (lambda: LiveRanges(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)), "start must be int32, got torch.float32"),
        (
            lambda: LiveRanges(*(torch.zeros(4, dtype=torch.int32),) * 2),
            r"must have shape \[B\|1, Hkv\|1, K\], got \[4\]",
        ),
        (
            lambda: LiveRanges(torch.zeros(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 5, dtype=torch.int32)),
            "start has 4 keys and end has 5",
        ),
        (
            lambda: LiveRanges(torch.zeros(2, 1, 4, dtype=torch.int32), torch.zeros(3, 1, 4, dtype=torch.int32)),
            "start has 2 batch rows and end has 3",
        ),
        (lambda: LiveRanges.documents(torch.tensor([[1, 0]])), "non-decreasing"),
        (lambda: LiveRanges.separators(torch.zeros(1, 4), window=2), r"is_separator must be bool \[B, K\]"),
        (lambda: LiveRanges.causal(4) & LiveRanges.causal(5), "4 and 5 keys"),
    ],
)
def test_bad_ranges_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
