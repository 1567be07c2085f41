"""Masks as people write them: each is proven to be what it is, or refused with the reason, and the result equals the model's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
from masked import INF
from masked import Attention
from masked import batches
from masked import row_and_key
from torch import Tensor
from torch import nn

import rewriter

MIN = torch.finfo(torch.float32).min


def packed(ids: Tensor) -> Tensor:
    """Document numbers of a packed row: a document ends at token 7."""
    return (ids == 7).cumsum(-1)


def first_token(ids: Tensor) -> Tensor:
    """`[B, 1, 1, 1]`: how many tokens below 12 a row begins with."""
    return ((ids >= 12).cumsum(-1) == 0).sum(-1)[:, None, None, None]


def behind(s: Tensor) -> Tensor:
    """`[Q, K]`: how far a key is behind its query."""
    row, key = row_and_key(s.size(-1))
    return row - key


# name -> (scores, token ids) -> masked scores, and what the report must say the mask is
EAGER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "no mask": (lambda s, ids: s, "none"),
    "near and far": (
        lambda s, ids: s.masked_fill(~((behind(s) < 2) | (behind(s) > 6)), -INF),
        "window 2 + at least 7 behind + 2 ranges",
    ),
    "all but one, of real tokens": (
        lambda s, ids: s.masked_fill((behind(s) == 1) | (ids == 3)[:, None, None, :], -INF),
        "window 1 + at least 2 behind + padding + 2 ranges",
    ),
    "a window, and another one at a distance": (
        lambda s, ids: s.masked_fill(~((behind(s).abs() < 2) | ((behind(s) > 5) & (behind(s) < 9))), -INF),
        "at most 1 ahead + window 2 + at least 6 behind + window 9 + 3 ranges",
    ),
    "tril == 0": (lambda s, ids: s.masked_fill(torch.tril(torch.ones(s.shape[-2:])) == 0, -INF), "causal"),
    "not tril of bool": (
        lambda s, ids: s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -1e9),
        "causal",
    ),
    "triu of -inf added": (lambda s, ids: s + torch.full(s.shape[-2:], -INF).triu(1), "causal"),
    "where tril": (lambda s, ids: torch.where(torch.ones(s.shape[-2:], dtype=torch.bool).tril(), s, MIN), "causal"),
    "where future": (
        lambda s, ids: torch.where(row_and_key(s.size(-1))[1] > row_and_key(s.size(-1))[0], MIN, s),
        "causal",
    ),
    "in place": (
        lambda s, ids: (
            s + torch.zeros(s.shape[-2:]).masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INF)
        ),
        "causal",
    ),
    "scores changed in place": (
        lambda s, ids: s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INF),
        "causal",
    ),
    "mask added in place": (lambda s, ids: s.add_(torch.full(s.shape[-2:], -INF).triu(1)), "causal"),
    "window": (
        lambda s, ids: s.masked_fill(
            (row_and_key(s.size(-1))[1] > row_and_key(s.size(-1))[0])
            | (row_and_key(s.size(-1))[0] - row_and_key(s.size(-1))[1] >= 5),
            -INF,
        ),
        "causal + window 5",
    ),
    "window longer than any row": (
        lambda s, ids: s.masked_fill(
            ~(torch.ones(s.shape[-2:], dtype=torch.bool).tril() & torch.ones(s.shape[-2:], dtype=torch.bool).triu(-99)),
            -INF,
        ),
        "causal + window 100",
    ),
    "symmetric window": (
        lambda s, ids: s.masked_fill((row_and_key(s.size(-1))[0] - row_and_key(s.size(-1))[1]).abs() > 3, -INF),
        "window 4 + at most 3 ahead",
    ),
    "padding added": (lambda s, ids: s + (1.0 - (ids != 0).float())[:, None, None, :] * -10000.0, "padding"),
    "causal and padding, both added": (
        lambda s, ids: s + torch.full(s.shape[-2:], MIN).triu(1) + torch.where(ids == 0, -1e9, 0.0)[:, None, None, :],
        "causal + padding",
    ),
    "padding and then causal": (
        lambda s, ids: s.masked_fill((ids == 0)[:, None, None, :], -1e30).masked_fill(
            torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INF
        ),
        "causal + padding",
    ),
    "documents that need not be runs": (
        lambda s, ids: s.masked_fill(ids[:, None, :, None] != ids[:, None, None, :], -INF),
        "given at the call",
    ),
    "documents": (
        lambda s, ids: s.masked_fill((packed(ids)[:, None, :, None] != packed(ids)[:, None, None, :]), -INF),
        "documents",
    ),
    "documents, causal": (
        lambda s, ids: s.masked_fill(
            (packed(ids)[:, None, :, None] != packed(ids)[:, None, None, :])
            | torch.ones(s.shape[-2:], dtype=torch.bool).triu(1),
            -INF,
        ),
        "documents + causal",
    ),
    "chunks": (
        lambda s, ids: s.masked_fill(row_and_key(s.size(-1))[0] // 4 != row_and_key(s.size(-1))[1] // 4, -INF),
        "chunks of 4",
    ),
    "chunks from the first token": (
        lambda s, ids: s.masked_fill(
            (row_and_key(s.size(-1))[0] - first_token(ids)) // 4
            != (row_and_key(s.size(-1))[1] - first_token(ids)) // 4,
            -INF,
        ),
        "chunks of 4 from an offset",
    ),
    "blocks": (
        lambda s, ids: s.masked_fill(row_and_key(s.size(-1))[0] // 4 < row_and_key(s.size(-1))[1] // 4, -INF),
        "blocks of 4",
    ),
    "prefix": (
        lambda s, ids: s.masked_fill(
            ~((row_and_key(s.size(-1))[1] <= row_and_key(s.size(-1))[0]) | (row_and_key(s.size(-1))[1] < 4)), -INF
        ),
        "causal + prefix",
    ),
    "prefix by row": (
        lambda s, ids: s.masked_fill(
            (row_and_key(s.size(-1))[1] > row_and_key(s.size(-1))[0])
            & (row_and_key(s.size(-1))[1] >= (ids == 9).sum(-1)[:, None, None, None]),
            -INF,
        ),
        "causal + prefix",
    ),
}

# name -> masked scores, and the reason that must be given
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "made from the scores": (lambda s, ids: s.masked_fill(s < s.mean(-1, keepdim=True), -INF), "data|heads"),
    "random": (lambda s, ids: s.masked_fill(torch.rand(s.shape[-2:]) < 0.2, -INF), "not integers"),
    "a union of four ranges": (
        lambda s, ids: s.masked_fill(~((behind(s) < 2) | (behind(s) == 5) | (behind(s) == 9) | (behind(s) > 12)), -INF),
        "union of two ranges",
    ),
    "documents by the scores": (
        lambda s, ids: s.masked_fill(s.argmax(-1)[..., None] != s.argmax(-1)[:, :, None, :], -INF),
        "not known to be non-decreasing|heads",
    ),
    "a distance penalty": (
        lambda s, ids: s - 0.1 * (row_and_key(s.size(-1))[0] - row_and_key(s.size(-1))[1]).abs(),
        "not understood|number|data",
    ),
    "a mask of -1": (lambda s, ids: s + torch.full(s.shape[-2:], -1.0).triu(1), "takes the values"),
    "a bias beside -1e4": (
        lambda s, ids: s + torch.full(s.shape[-2:], -1e4).triu(1) + ids[:, None, None, :] * 0.1,
        "a mask of -10000, which need not hide a key",
    ),
    "hidden logits of -5": (
        lambda s, ids: s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -5.0),
        "expected -inf or a value of at most -1e4",
    ),
    "a learned bias": (
        lambda s, ids: s + torch.sin(s.detach().mean((0, 1), keepdim=True)),
        "computed from data",
    ),
}


@pytest.mark.parametrize("name", EAGER)
def test_proven(name: str) -> None:
    mask, expected = EAGER[name]
    model = Attention(mask)
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    for ids in batches():
        torch.testing.assert_close(optimized(ids), model(ids), rtol=1e-5, atol=1e-6)
    (site,) = optimized.report.sites
    assert set(site.mask.split(" + ")) == set(expected.split(" + "))
    assert len(optimized.report.graphs) == 1


def int32(s: Tensor) -> tuple[Tensor, Tensor]:
    row, key = row_and_key(s.size(-1))
    return row.int(), key.int()


def twenty_times(index: Tensor) -> Tensor:
    for _ in range(20):
        index = index + index
    return index


# Of an index of 2,048 and more these wrap, and hide other keys than at the sizes that are tried.
WRAPPING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a chain of products": lambda i, j: j * 1024 * 1024 <= i * 1024 * 1024,
    "a chain of sums": lambda i, j: twenty_times(j) <= twenty_times(i),
    "a factor of a sum": lambda i, j: torch.add(j * 0, j, alpha=2**20) <= torch.add(i * 0, i, alpha=2**20),
    "a cast": lambda i, j: (j.long() * 2**20).int() <= (i.long() * 2**20).int(),
    "an offset beyond int64": lambda i, j: j.long() + sys.maxsize >= i.long(),
    "an offset": lambda i, j: j + 2**30 + (2**30 - 2000) <= i + 2**30 + (2**30 - 2000),
}


@pytest.mark.parametrize("name", WRAPPING)
def test_what_wraps_beyond_the_sizes_that_are_tried_is_not_claimed(name: str) -> None:
    model = Attention(lambda s, ids: s.masked_fill(~WRAPPING[name](*int32(s)), -INF))
    optimized = rewriter.optimize(model, backend="eager")
    ids, _ = batches()
    optimized(ids)
    (site,) = optimized.report.sites
    assert not site.rewritten and "a mask compares integers that may wrap" in site.reason


@pytest.mark.parametrize("largest", [sys.maxsize, 2**62, 2**31], ids=str)
def test_a_window_that_never_ends_is_proven(largest: int) -> None:
    def masked(s: Tensor, ids: Tensor) -> Tensor:
        row, key = row_and_key(s.size(-1))
        return s.masked_fill(~((key <= row) & (key > row - largest)), -INF)

    model = Attention(masked)
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    ids, _ = batches()
    torch.testing.assert_close(optimized(ids), model(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    mask, reason = REFUSED[name]
    model = Attention(mask)
    optimized = rewriter.optimize(model, backend="eager")
    (ids, _) = batches()
    if name != "random":
        assert torch.equal(optimized(ids), model(ids))
    else:
        optimized(ids)
    (site,) = optimized.report.sites
    assert not site.rewritten
    assert re.search(reason, site.reason), site.reason


def test_strict_makes_a_refusal_an_error() -> None:
    model, (ids, _) = Attention(REFUSED["a distance penalty"][0]), batches()
    with pytest.raises(rewriter.RewriteError, match="1 of 1 attention sites are refused"):
        rewriter.optimize(model, backend="eager", strict=True)(ids)


def test_sdpa_with_is_causal_is_top_left_aligned() -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=True)

    model = Cross()
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    for queries, keys in ((5, 9), (11, 6)):
        q, kv = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8)
        torch.testing.assert_close(optimized(q, kv), model(q, kv))
