"""A pretrained checkpoint: SmolLM2-135M-Instruct, a Llama of 30 layers with 9 query and 3 KV heads of 64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.demo.corpus import held_out_text
from rewriter.demo.models import load_smollm2
from rewriter.demo.run import _dense_masks
from rewriter.policies.ranges import policy_ranges

pytestmark = pytest.mark.xdist_group("real model")  # one process loads it, once

TOLERANCE = 2e-4
"""Largest difference of two computations in fp32 of the same logits, of their largest."""


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """The model, and its tokenizer. No test changes the model."""
    model, tokenizer = load_smollm2()
    return model, tokenizer


@pytest.fixture(scope="module")
def ids(real: tuple[Any, Any]) -> Tensor:
    """int64 `[1, 192]`: source code."""
    return real[1](held_out_text(3000), return_tensors="pt").input_ids[:, :192]


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_each_layer_is_rewritten_and_padded_rows_are_what_they_were(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    tokenizer.padding_side = "left"
    batch = tokenizer(["The capital of France is", held_out_text(400)], padding=True, return_tensors="pt")
    fast = rewriter.optimize(model, backend="eager", strict=True)
    tokens = batch.attention_mask.bool()
    assert off(fast(**batch).logits[tokens], model(**batch).logits[tokens]) < TOLERANCE
    (group,) = fast.report.groups
    assert group.numbers == "0 .. 29" and group.first.mask == "causal + padding"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["window", "separators"])
def test_a_policy_is_the_model_under_its_dense_mask(kind: str, real: tuple[Any, Any], ids: Tensor) -> None:
    model, tokenizer = real
    policy = SlidingWindow(24, sinks=4) if kind == "window" else SeparatorMask.from_tokenizer(tokenizer, window=16)
    fast = rewriter.optimize(model, policy, backend="eager", strict=True)
    with _dense_masks(model, [policy_ranges(policy.for_layer(layer), ids) for layer in range(30)]):
        expected = model(ids, use_cache=False).logits
    assert off(fast(ids).logits, expected) < TOLERANCE
    assert off(model(ids).logits, expected) > 0.05


def test_the_gradients_of_a_layer_are_the_originals(real: tuple[Any, Any], ids: Tensor) -> None:
    model, _ = real
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    layer = model.model.layers[7]
    model.requires_grad_(False)
    layer.requires_grad_(True)
    try:
        gradients = []
        for each in (model, fast):
            each(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({name: p.grad for name, p in layer.named_parameters()})
            layer.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(True)
    original, rewritten = gradients
    assert len(original) == 9
    for name, expected in original.items():
        assert expected.abs().max() > 0 and off(rewritten[name], expected) < 1e-3, name


@torch.no_grad()
def test_it_generates_what_the_original_generates(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the capital of France."}], add_generation_prompt=True, return_tensors="pt"
    )
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**prompt, **options)
    assert torch.equal(fast.generate(**prompt, **options), expected)
    assert "Paris" in tokenizer.decode(expected[0])


@torch.no_grad()
def test_a_bounded_cache_generates_what_the_masked_model_does(real: tuple[Any, Any], ids: Tensor) -> None:
    model, _ = real
    fast = rewriter.optimize(model, SlidingWindow(32, sinks=4), backend="eager", strict=True)
    cache = fast.new_cache()
    given = ids[:, :100]
    tokens = fast.generate(given, past_key_values=cache, max_new_tokens=10, do_sample=False)
    logits = fast(tokens[:, :-1]).logits[:, 99:]
    assert torch.equal(logits.argmax(-1), tokens[:, 100:])
    dense = 2 * 30 * 3 * 64 * 4 * (tokens.size(1) - 1)  # bytes of keys and values of all tokens
    assert cache.num_bytes < 0.6 * dense
