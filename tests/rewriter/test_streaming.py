"""Streams: log-probabilities token by token, the same whatever the block, in memory that does not grow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.demo.corpus import held_out_text
from rewriter.demo.models import load_bundled
from rewriter.errors import CacheError
from rewriter.policies.ranges import policy_ranges

POLICY = SeparatorMask(tuple(range(3, 20)), initial=1, window=3, max_separators=2, capacity=9, positions="cache")


def test_a_stream_equals_one_forward_whatever_the_block(tiny_model: Callable[..., nn.Module]) -> None:
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


@pytest.fixture(scope="module")
def real_text() -> tuple[Tensor, Any]:
    """A held-out file of the standard library, int64 `[N]`, and its tokenizer."""
    tokenizer = load_bundled()[1]
    return torch.tensor(tokenizer(held_out_text(16_384)).input_ids), tokenizer


@pytest.mark.parametrize(
    ("initial", "separators", "window", "capacity"), [(4, 64, 224, 512), (3, 16, 40, 59), (0, 5, 1, 9)]
)
def test_on_real_text_each_query_sees_what_the_cache_holds(
    initial: int,
    separators: int,
    window: int,
    capacity: int,
    real_text: tuple[Tensor, Any],
    cache_itself: Callable[..., Any],
) -> None:
    """Against the cache kept as lists of keys, as SepLLM keeps it; and the slots of a cache that reads the text by tokens."""
    ids, tokenizer = real_text
    policy = SeparatorMask.from_tokenizer(
        tokenizer, initial=initial, window=window, max_separators=separators, capacity=capacity
    )
    is_separator = torch.isin(ids, torch.tensor(policy.separators))
    assert 0.1 < is_separator.double().mean() < 0.9
    visible, compactions = cache_itself(is_separator.tolist(), policy)
    assert len(compactions) > 10
    ranges = policy_ranges(policy, ids[None])
    for query, keys in enumerate(visible):
        seen = (ranges.start[0, 0] <= query) & (query < ranges.end[0, 0])
        assert seen.nonzero()[:, 0].tolist() == keys
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    fast = rewriter.optimize(transformers.LlamaForCausalLM(config).eval(), policy, backend="eager", strict=True)
    cache = fast.new_cache()
    for query in range(2 * capacity if capacity < 100 else 0):
        fast(input_ids=ids[None, query : query + 1], past_key_values=cache)
        table = cache.tables[0]
        held = table["index"][0, 0][table["end"][0, 0] > query]
        assert held.sort().values.tolist() == visible[query]
