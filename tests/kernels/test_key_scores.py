"""Attention mass per key: `rewriter verify` has the properties; here its meaning and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewriter.kernels import AttentionInputError
from rewriter.kernels import LiveRanges
from rewriter.kernels import key_scores
from rewriter.kernels import live_range_attention

from rewriter.testing.verify import run_suite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8, device=DEVICE), torch.randn(2, 2, 9, 8, device=DEVICE)
    live = LiveRanges.causal(9, device=DEVICE)
    lse = live_range_attention(query, key, key, live, return_lse=True)[1]
    return {"query": query, "key": key, "lse": lse, "live": live, **changes}


def test_equals_the_dense_form() -> None:
    outcomes = run_suite(device=DEVICE, examples=20, only="key_scores")
    assert len(outcomes) == 3
    assert [o.failure for o in outcomes] == [None] * 3
    assert all(o.cases > 0 for o in outcomes)


def test_the_scores_of_a_row_sum_to_the_rows_that_see_keys() -> None:
    scores = key_scores(**inputs(), group="per_query_head")
    torch.testing.assert_close(scores.sum(dim=2), torch.full((2, 4), 3.0, device=DEVICE))


def test_mean_and_max_are_over_the_heads_of_a_group() -> None:
    each = key_scores(**inputs(), group="per_query_head").unflatten(1, (2, 2))
    torch.testing.assert_close(key_scores(**inputs(), group="mean"), each.mean(dim=2))
    torch.testing.assert_close(key_scores(**inputs(), group="max"), each.amax(dim=2))


ERRORS = {
    "group": ({"group": "sum"}, "group must be one of mean, max, per_query_head, got 'sum'"),
    "lse": (
        {"lse": torch.zeros(2, 4, 2, device=DEVICE)},
        r"lse must be \[2, 4, 3\], one per query row, got \[2, 4, 2\]",
    ),
    "live": ({"live": None}, "live must be LiveRanges, got NoneType"),
    "softcap": ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
    "keys": ({"live": LiveRanges.causal(8, device=DEVICE)}, r"start must be \[B\|1, Hkv\|1, K\] with K = 9"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name: str) -> None:
    changes, message = ERRORS[name]
    with pytest.raises(AttentionInputError, match=message):
        key_scores(**inputs(**changes))
