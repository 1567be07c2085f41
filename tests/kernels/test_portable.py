"""The operator in plain ATen, which a CPU's package holds: the same law as the operator's, where it takes the same options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from rewriter.kernels import LiveRanges
from rewriter.kernels import portable
from torch import Tensor

from rewriter.testing import Case
from rewriter.testing import assert_equivalent
from rewriter.testing import attention_cases
from rewriter.testing.equivalence import Features


def in_aten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    live: LiveRanges,
    *,
    query_index: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    result = portable.attention(
        query, key, value, live.start, live.end, query_index, None, bias, sinks, None, scale, softcap
    )
    return result if return_lse else result[0]


FEATURES = Features.of(in_aten, gradients=False)


def tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    live: LiveRanges,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    rows = torch.arange(query.size(2), dtype=torch.int32) + (key.size(2) - query.size(2))
    scale = query.size(3) ** -0.5 if scale is None else scale
    result = portable.attend_tile(query, key, value, live.start, live.end, rows, bias, scale, softcap)
    return result if return_lse else result[0]


@given(case=attention_cases(features=Features.of(tile, gradients=False)))
def test_a_tile_is_what_the_dense_reference_is(case: Case) -> None:
    assert_equivalent(tile, case, features=Features.of(tile, gradients=False))


@pytest.mark.parametrize("kind", ["causal", "window", "separators", "padding", "topk", "nothing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_several_tiles(kind: str, dtype: str) -> None:
    case = Case(dtype=dtype, kv_heads=2, group=2, queries=300, keys=300, head_dim=16, value_dim=16, ranges=kind)
    assert_equivalent(in_aten, case, features=FEATURES)


def test_a_row_that_sees_no_key_has_no_logits() -> None:
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    live = LiveRanges.causal(4) & LiveRanges.padding(torch.tensor([[False, False, True, True]]))
    output, lse = in_aten(query, key, value, live, return_lse=True)
    assert torch.equal(output[0, :, :2], torch.zeros(2, 2, 8))
    assert (lse[0, :, :2] == -torch.inf).all() and torch.isfinite(lse[0, :, 2:]).all()


def test_heads_may_share_ranges_and_not_biases() -> None:
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    live, bias = LiveRanges.causal(9), torch.randn(2, 2, 9)
    rows = torch.arange(9, dtype=torch.int32)
    given = (query, key, value, live.start, live.end, rows, bias, 0.3, None)
    for actual, expected in zip(portable.attend_tile(*given), portable.attend(*given), strict=True):
        torch.testing.assert_close(actual, expected)
