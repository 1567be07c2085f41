"""What a report says of a mask: which queries see a key, and of a refused one, a key that shows why."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from masked import INF
from masked import Attention
from masked import row_and_key
from torch import Tensor

import rewriter

IDS = torch.randint(1, 16, (2, 12), generator=torch.Generator().manual_seed(0))

Visible = Callable[[Tensor, Tensor, Tensor], Tensor]


def explained(visible: Visible) -> rewriter.Report:
    torch._dynamo.reset()
    model = Attention(lambda s, ids: s.masked_fill(~visible(*row_and_key(s.size(-1)), ids), -INF))
    return rewriter.explain(model, input_ids=IDS)


PROVEN: dict[str, Visible] = {
    "key j is visible to queries j <= i": lambda i, j, ids: j <= i,
    "key j is visible to queries j <= i < j + 5": lambda i, j, ids: (j <= i) & (i - j < 5),
    "key j is visible to queries j - 3 <= i < j + 4": lambda i, j, ids: (i - j).abs() <= 3,
    "key j is visible to queries 4 * (j // 4) <= i < 4 * (j // 4) + 4": lambda i, j, ids: i // 4 == j // 4,
    "key j is visible to queries first key of j's document <= i < key after j's document": lambda i, j, ids: (
        (ids == 7).cumsum(-1)[:, None, :, None] == (ids == 7).cumsum(-1)[:, None, None, :]
    ),
    "key j is visible to queries j <= i < (for ever if not (input_ids[b, j] == 0) else 0)": lambda i, j, ids: (
        (j <= i) & (ids != 0)[:, None, None, :]
    ),
    "key j is visible to all queries": lambda i, j, ids: i >= 0,
}


@pytest.mark.parametrize("words", PROVEN)
def test_a_proof_in_words(words: str) -> None:
    report = explained(PROVEN[words])
    assert report.sites[0].visible == words
    printed = re.sub(r"\s*│\s*│\s*|\s+", " ", str(report))
    assert "verified at all sizes up to" in printed and words.split(" queries ")[0] in printed


EXAMPLES: dict[str, tuple[Visible, int, list[list[int]]]] = {
    "every second query": (lambda i, j, ids: (i - j) % 2 == 0, 0, [[0], [2]]),
    "near and far": (lambda i, j, ids: (i == j) | ((i - j > 2) & (i * j < 9)), 0, [[0], [3]]),
    "all but two": (lambda i, j, ids: (i - j - 1) * (i - j - 1) > 0, 0, [[0], [2]]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_smallest_example_of_why_not(name: str) -> None:
    visible, key, runs = EXAMPLES[name]
    (site,) = explained(visible).sites
    assert not site.rewritten and site.visible == ""
    size = runs[-1][-1] + 1
    listed = ", and ".join(" to ".join(map(str, run)) for run in runs)
    expected = f"of {size} queries and {size} keys, key {key} is seen by queries {listed}, and by none between"
    assert site.example == expected
    assert "is seen by queries" in re.sub(r"\s+", " ", str(explained(visible)))


def test_there_is_no_example_of_what_is_one_range() -> None:
    """Refused for another reason: it is a bias."""
    torch._dynamo.reset()
    report = rewriter.explain(
        Attention(lambda s, ids: s + torch.sin(s.detach().mean((0, 1), keepdim=True))), input_ids=IDS
    )
    (site,) = report.sites
    assert not site.rewritten and site.example == ""
