"""Mistakes of the first hour: each message says what was given, what is expected, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from everyday_models import llama

import rewriter
from rewriter import Policy
from rewriter import PolicyError
from rewriter import PolicyWarning
from rewriter import RewriteError
from rewriter import SeparatorMask
from rewriter import SlidingWindow


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: rewriter.optimize("tiny"), "expected a torch.nn.Module, got str; load it first"),  # type: ignore[arg-type]
        (lambda: SeparatorMask([".", ","]), r"got '\.'; SeparatorMask\.from_tokenizer"),  # type: ignore[arg-type, list-item]
        (lambda: SeparatorMask(".,"), r"got '\.,'; SeparatorMask\.from_tokenizer"),  # type: ignore[arg-type]
        (lambda: SeparatorMask.from_tokenizer("tiny"), "expected a tokenizer of transformers, got 'tiny'; load it first"),
        (lambda: Policy.from_dict({"policy": "SlidingWindw", "window": 3}), "did you mean SlidingWindow?"),
        (lambda: Policy.from_dict({"policy": "SlidingWindow", "windw": 3}), "no field 'windw'; it has window, sinks"),
        (lambda: Policy.from_dict({"policy": "SlidingWindow"}), "SlidingWindow needs 'window'"),
    ],
)  # fmt: skip
def test_messages(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises((PolicyError, RewriteError), match=message):
        mistake()


def test_weights_of_attention_are_asked_of_a_fused_one() -> None:
    fast = rewriter.optimize(llama(), SlidingWindow(4), backend="eager")
    with pytest.raises(RewriteError, match="load the model with attn_implementation='eager'"):
        fast(torch.randint(3, 64, (1, 9)), output_attentions=True)


def test_a_policy_that_is_not_applied_is_a_warning() -> None:
    fast = rewriter.optimize(llama(attn_implementation="eager"), SlidingWindow(4), backend="eager")
    with pytest.warns(PolicyWarning, match="2 of 2 attention sites keep all their keys.*strict=True"):
        output = fast(torch.randint(3, 64, (1, 9)), output_attentions=True, use_cache=False)
    assert len(output.attentions) == 2
