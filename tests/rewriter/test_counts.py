"""What an optimized call does, counted: kernels, graphs, copies. Times vary, these must not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow

LAYERS = 3
ATTENTION = "rewriter::live_range_attention_cpu"
COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy")
POLICIES = [Exact(), SlidingWindow(8, sinks=1), SeparatorMask((3, 7), window=6)]


def operators(call: Callable[[], object]) -> Counter[str]:
    """What PyTorch runs in a call, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return Counter(event.name for event in profile.events())


def ids(rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 60


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@torch.no_grad()
def test_a_call_attends_once_a_layer_and_copies_nothing(tiny_model: Callable[..., nn.Module], policy: Policy) -> None:
    fast = rewriter.optimize(tiny_model("llama", "sdpa", layers=LAYERS).eval(), policy, strict=True)
    given = {"use_cache": False, "attention_mask": (torch.arange(24) >= torch.tensor([[0], [5], [9]])).long()}
    fast(input_ids=ids(3, 24), **given)
    ran = operators(lambda: fast(input_ids=ids(3, 24), **given))
    assert ran[ATTENTION] == LAYERS
    assert not {name: ran[name] for name in COPIES if ran[name]}
    assert not [name for name in ran if "scaled_dot_product" in name]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@torch.no_grad()
def test_a_step_over_a_cache_attends_once_a_layer(tiny_model: Callable[..., nn.Module], policy: Policy) -> None:
    fast = rewriter.optimize(tiny_model("llama", "sdpa", layers=LAYERS).eval(), policy, strict=True)
    cache = fast.new_cache(max_length=64)
    fast(input_ids=ids(1, 20), past_key_values=cache)
    fast(input_ids=ids(1, 1), past_key_values=cache)
    ran = operators(lambda: fast(input_ids=ids(1, 1), past_key_values=cache))
    assert ran[ATTENTION] == LAYERS
    assert not [name for name in ran if "scaled_dot_product" in name]


def test_other_sizes_need_no_other_graph(tiny_model: Callable[..., nn.Module]) -> None:
    """Rows, lengths and padding change; one row is a graph of its own to Dynamo."""
    fast = rewriter.optimize(tiny_model("llama", "sdpa").eval(), SlidingWindow(8), backend="eager", strict=True)
    with torch.no_grad():
        for rows, length in ((3, 24), (2, 17), (5, 31), (1, 24), (1, 9)):
            fast(input_ids=ids(rows, length), attention_mask=torch.ones(rows, length).long(), use_cache=False)
    assert len(fast.report.graphs) == 2
    assert {site.kernel for site in fast.report.sites} == {"live_range_attention (CPU)"}
