from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rewriter import Exact
from rewriter import PerLayer
from rewriter import Policy
from rewriter import PolicyError
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.demo.models import MODEL
from rewriter.policies.ranges import policy_ranges

POLICIES = [
    Exact(),
    SlidingWindow(64, sinks=4),
    SeparatorMask((5, 9, 7), initial=2, window=16),
    PerLayer({0: Exact(), "1-3": SlidingWindow(8), "default": SeparatorMask((1,))}),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_survives_json_and_prints(policy: Policy) -> None:
    again = Policy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert repr(policy).startswith(type(policy).__name__)


ERRORS: list[tuple[Any, str]] = [
    (lambda: SlidingWindow(0), "SlidingWindow: window must be an integer of at least 1, got 0"),
    (lambda: SlidingWindow(2.5), "window must be an integer of at least 1, got 2.5"),  # type: ignore[arg-type]
    (lambda: SlidingWindow(True), "got True"),
    (lambda: SlidingWindow(4, sinks=-1), "sinks must be an integer of at least 0, got -1"),
    (lambda: SeparatorMask(()), r"separators is empty; give token ids, use SeparatorMask\.from_tokenizer"),
    (lambda: SeparatorMask((1, -2)), "token ids of at least 0, got -2"),
    (lambda: SeparatorMask("."), "separators must be token ids, got '.'"),  # type: ignore[arg-type]
    (lambda: SeparatorMask((1,), window=0), "SeparatorMask: window must be an integer of at least 1, got 0"),
    (lambda: SeparatorMask((1,), initial=-1), "initial must be an integer of at least 0, got -1"),
    (lambda: PerLayer({"first": Exact()}), "'first' is not a layer"),
    (lambda: PerLayer({"5-2": Exact()}), "'5-2' is not a layer"),
    (lambda: PerLayer({-1: Exact()}), "-1 is not a layer"),
    (lambda: PerLayer({0: Exact(), "0-2": Exact()}), "layer 0 is named twice"),
    (lambda: PerLayer({0: 3}), "expected a policy"),  # type: ignore[dict-item]
    (lambda: PerLayer({0: PerLayer({})}), "itself a PerLayer"),
    (lambda: Policy.from_dict({"policy": "Magic"}), "'Magic' is not a policy; known are .*SlidingWindow"),
    (lambda: Policy.from_dict({"policy": "SlidingWindow", "size": 3}), "has no field 'size'; it has window, sinks"),
]


@pytest.mark.parametrize(("build", "message"), ERRORS)
def test_bad_values_are_named(build: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        build()


def test_per_layer_picks_by_number() -> None:
    policy = PerLayer({0: SlidingWindow(1), "2-3": SlidingWindow(2), "default": SlidingWindow(9)})
    assert [policy.for_layer(i).window for i in range(5)] == [1, 9, 2, 2, 9]  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match=r'nothing of layer 0; add "default": Exact\(\)'):
        PerLayer({1: SlidingWindow(1)}).for_layer(0)


def test_separators_are_found_in_a_tokenizer_merged_ones_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    policy = SeparatorMask.from_tokenizer(tokenizer, window=7, initial=1)
    assert (policy.window, policy.initial) == (7, 1)
    found = dict(zip(policy.separators, policy.names, strict=True))
    vocabulary = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    for text in (".", ",", ":", "\n", "\n\n", '."', "):\n"):
        if text in vocabulary:
            assert found[vocabulary[text]] == text
    assert {".", ",", ":", "\n"} <= set(policy.names)
    assert any(len(name.strip(" ")) > 1 for name in policy.names), "merged punctuation"
    assert not any(c.isalnum() for name in policy.names for c in name)
    assert not set(policy.separators) & set(tokenizer.all_special_ids)


def test_a_tokenizer_without_separators_is_an_error() -> None:
    with pytest.raises(PolicyError, match="no token of this tokenizer is made of"):
        SeparatorMask.from_tokenizer(AutoTokenizer.from_pretrained(MODEL), characters="\u2603")


def test_ranges_for_token_ids() -> None:
    ids = torch.tensor([[1, 2, 3, 2, 1, 1]])
    visible = policy_ranges(SeparatorMask((3,), initial=1, window=2), ids).visible(torch.arange(6))[0, 0]
    assert visible[5].tolist() == [True, False, True, False, True, True]
