"""Streams: log-probabilities token by token, the same whatever the block, in memory that does not grow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.caches import CacheError

POLICY = SeparatorMask(tuple(range(3, 20)), initial=1, window=3, max_separators=2, capacity=9, positions="cache")


def test_a_stream_equals_one_forward_whatever_the_block(tiny_model: Callable[..., nn.Module]) -> None:
    torch._dynamo.reset()
    fast = rewriter.optimize(tiny_model("llama", "sdpa").eval(), POLICY, backend="eager")
    tokens = torch.randint(0, 64, (70,))
    with torch.no_grad():
        logits = fast(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    for block in (1, 7, 32, 100):
        actual = torch.tensor(list(rewriter.stream(fast, None, tokens.tolist(), block=block)))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert list(rewriter.stream(fast, None, tokens[:1])) == []
    assert list(rewriter.stream(fast, None, [])) == []


def test_an_endless_text_is_read_as_it_is_needed(tiny_model: Callable[..., nn.Module]) -> None:
    torch._dynamo.reset()
    fast = rewriter.optimize(tiny_model("llama", "sdpa").eval(), POLICY, backend="eager")
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        for token in itertools.cycle(range(64)):
            read += 1
            yield token

    first = list(itertools.islice(rewriter.stream(fast, None, endless(), block=8), 40))
    assert len(first) == 40 and all(p < 0 for p in first)
    assert read == 48


def test_bad_input(tiny_model: Callable[..., nn.Module]) -> None:
    torch._dynamo.reset()
    model = tiny_model("llama", "sdpa").eval()
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        rewriter.stream(model, POLICY, [1, 2], block=0)
    with pytest.raises(ValueError, match=r"tokens must be integer \[N\]"):
        rewriter.stream(model, POLICY, torch.zeros(2, 3))
    with pytest.raises(CacheError, match="every key may live on"):
        rewriter.stream(model, Exact(), [1, 2])
    fast = rewriter.optimize(model, POLICY, backend="eager")
    with pytest.raises(rewriter.RewriteError, match="optimized already, with SeparatorMask"):
        rewriter.stream(fast, SlidingWindow(4), [1, 2])
