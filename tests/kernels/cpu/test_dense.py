"""Ranges that are dense in blocks: which they are, and that torch's fused kernel computes them as the dense reference does."""

from __future__ import annotations

import math

import pytest
import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels import reference
from rewriter.kernels.cpu import dense
from rewriter.kernels.cpu.dense import Block
from rewriter.kernels.cpu.dense import dense_blocks
from rewriter.kernels.dispatch import INTERPRETED
from torch import Tensor


def blocks(live: LiveRanges, queries: int | None = None) -> list[Block] | None:
    num_keys = live.num_keys
    return dense_blocks(live.start[0, 0], live.end[0, 0], num_keys - (queries or num_keys))


def padded(pattern: str) -> LiveRanges:
    """Causal, `x` a token and `.` padding."""
    tokens = torch.tensor([[c == "x" for c in pattern]])
    return LiveRanges.causal(len(pattern)) & LiveRanges.padding(tokens)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MIN_ROWS", 1)


def test_what_is_dense_in_blocks() -> None:
    assert blocks(LiveRanges.causal(5)) == [Block((0, 5), (0, 5), True)]
    assert blocks(LiveRanges.bidirectional(5)) == [Block((0, 5), (0, 5), False)]
    assert blocks(padded("..xxx")) == [Block((2, 5), (2, 5), True)]
    assert blocks(padded("xxx..")) == [Block((0, 5), (0, 3), True)]  # rows of padding see all
    assert blocks(padded(".....")) == []
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    causal = LiveRanges.causal(6) & LiveRanges.documents(documents)
    assert blocks(causal) == [Block((0, 3), (0, 3), True), Block((3, 5), (3, 5), True), Block((5, 6), (5, 6), True)]
    whole = LiveRanges.documents(documents)
    assert blocks(whole) == [Block((0, 3), (0, 3), False), Block((3, 5), (3, 5), False), Block((5, 6), (5, 6), False)]
    assert blocks(LiveRanges.sliding_window(6, 6)) == [Block((0, 6), (0, 6), True)]
    assert blocks(LiveRanges.bidirectional(6), queries=2) == [Block((0, 2), (0, 6), False)]


def test_what_is_not() -> None:
    assert blocks(LiveRanges.sliding_window(6, 3)) is None
    assert blocks(padded("xx.xx")) is None
    assert blocks(LiveRanges.causal(6), queries=3) is None  # early keys are seen by all, late ones from their place on
    start, end = torch.tensor([0, 0, 2, 2]), torch.tensor([3, 3, 4, 4])  # row 2 would be in two
    assert dense_blocks(start.int(), end.int(), 0) is None
    assert blocks(LiveRanges.prefix(6, torch.tensor([3]))) is None


def test_many_small_blocks_are_left_to_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = LiveRanges.causal(64) & LiveRanges.documents(torch.arange(64)[None] // 8)
    assert len(blocks(documents) or []) == 8
    monkeypatch.setattr(dense, "MIN_ROWS", 9)
    assert blocks(documents) is None
    assert blocks(LiveRanges.causal(3)) is not None  # however short, one block is one call


RANGES = {
    "causal": LiveRanges.causal(24),
    "bidirectional": LiveRanges.bidirectional(24),
    "documents": LiveRanges.causal(24) & LiveRanges.documents((torch.arange(24) // 7)[None]),
    "padded": LiveRanges.causal(24) & LiveRanges.padding(torch.stack([torch.arange(24) >= n for n in (0, 5, 23)])),
    "padded right": LiveRanges.causal(24) & LiveRanges.padding(torch.stack([torch.arange(24) < n for n in (24, 5, 1)])),
    "nothing": LiveRanges(torch.zeros(1, 1, 24, dtype=torch.int32), torch.zeros(1, 1, 24, dtype=torch.int32)),
    "sooner than forever": LiveRanges(torch.arange(24).int()[None, None], torch.full((1, 1, 24), FOREVER - 3).int()),
}


through_the_operator = pytest.mark.skipif(INTERPRETED, reason="the operator runs the Triton kernels in the interpreter")


@through_the_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", RANGES)
def test_it_is_what_the_dense_reference_is(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, grouped heads, and NaN in the keys that nothing sees; the tiles are not asked."""
    live = RANGES[name]
    made: list[str] = []
    for kind in ("forward", "backward"):
        monkeypatch.setattr(f"rewriter.kernels.cpu.attention.{kind}", lambda *_, kind=kind: made.append(kind))
    shapes = {"query": (3, 6, 24, 16), "key": (3, 2, 24, 16), "value": (3, 2, 24, 16)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    dead = ~(live.end > live.start).expand(3, 1, -1)
    for name in ("key", "value"):
        tensors[name].masked_fill_(dead[..., None], math.nan)
    given = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    output, lse = live_range_attention(*given.values(), live, return_lse=True)
    assert output.transpose(1, 2).is_contiguous() and lse.is_contiguous()  # as compiled code expects them
    clean = {name: t.detach().to(dtype).double().nan_to_num().requires_grad_() for name, t in tensors.items()}
    expected, expected_lse = reference.live_range_attention(*clean.values(), live, return_lse=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[
        dtype
    ]  # of bf16: the rounding of results
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    direction = torch.randn_like(expected)
    (output.double() * direction.to(dtype).double()).sum().backward()
    (expected * direction.to(dtype).double()).sum().backward()
    for each, tensor in given.items():
        torch.testing.assert_close(tensor.grad.double(), clean[each].grad, atol=4 * tolerance, rtol=4 * tolerance)
    assert made == []


@through_the_operator
def test_a_gradient_of_the_log_sum_exp_goes_through_the_tiles() -> None:
    query, key, value = (torch.randn(1, 2, 9, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    live = LiveRanges.causal(9)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return live_range_attention(q, k, v, live, return_lse=True)

    assert torch.autograd.gradcheck(both, (query, key, value))
