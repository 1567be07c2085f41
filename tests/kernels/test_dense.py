"""torch's own kernel with live ranges as its mask: the same law as the operator's, where it takes the same options."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from rewriter.kernels import LiveRanges
from rewriter.kernels.dense import dense_mask
from rewriter.kernels.dense import masked_attention
from rewriter.kernels.dense import plain_attention
from torch import Tensor

from rewriter.testing import Case
from rewriter.testing import assert_equivalent
from rewriter.testing import attention_cases
from rewriter.testing.equivalence import Features


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    live: LiveRanges,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    group = query.size(1) // key.size(1)
    mask, sees = dense_mask(live.start, live.end, query.size(2), group, bias, query.dtype)
    return masked_attention(query, key, value, mask, sees, scale)


@given(case=attention_cases(features=Features.of(masked)))
def test_under_a_mask_it_is_what_the_dense_reference_is(case: Case) -> None:
    assert_equivalent(masked, case)


def causal(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, *, scale: float | None = None) -> Tensor:
    del live
    return plain_attention(query, key, value, True, scale)


@given(
    case=attention_cases(features=Features.of(causal)).filter(lambda c: c.queries == c.keys and c.ranges == "causal")
)
def test_causal_it_is_what_the_dense_reference_is(case: Case) -> None:
    assert_equivalent(causal, case)


def test_a_row_that_sees_no_key_is_zero_and_so_are_its_gradients() -> None:
    query, key, value = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    live = LiveRanges.causal(4) & LiveRanges.padding(torch.tensor([[False, False, True, True]]))
    output = masked(query, key, value, live)
    assert torch.equal(output[0, 0, :2], torch.zeros(2, 8))
    output.sum().backward()
    assert torch.equal(query.grad[0, 0, :2], torch.zeros(2, 8))
    assert torch.equal(key.grad[0, 0, :2], torch.zeros(2, 8)) and torch.isfinite(value.grad).all()


def test_a_mask_is_shared_by_what_shares_its_ranges() -> None:
    live = LiveRanges.causal(6)
    mask, sees = dense_mask(live.start, live.end, 6, 3, None, torch.float32)
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.bool and bool(sees.all())
    bias = torch.zeros(1, 2, 6)
    mask, _ = dense_mask(live.start, live.end, 6, 3, bias, torch.bfloat16)
    assert mask.shape == (1, 6, 6, 6) and mask.dtype == torch.bfloat16 and mask[0, 0, 0, 1] == -math.inf
