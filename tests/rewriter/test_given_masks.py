"""Masks that a call gives as `[B, 1, Q, K]`: the same model, over live ranges where the columns are ranges."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import transformers
from everyday_models import IMAGE
from everyday_models import paligemma
from rewriter.kernels import given_mask

import rewriter
from rewriter import Exact
from rewriter import SlidingWindow
from rewriter.errors import RewriteError

TOKENS = 24


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def masks(kind: str, length: int) -> torch.Tensor:
    """bool `[2, 1, length, length]`."""
    generator = torch.Generator().manual_seed(length)
    index = torch.arange(length)
    causal = index[:, None] >= index
    if kind == "documents":
        own = causal & (index[:, None] // 7 == index // 7)
    elif kind == "a window":
        own = causal & (index[:, None] - index < 5)
    else:  # a tree of drafts: each sees the text and its own ancestors, so that some keys are seen in several runs
        own = (torch.rand(length, length, generator=generator) < 0.5) & causal | torch.eye(length, dtype=torch.bool)
    other = own.clone()
    other[:, :3] = torch.eye(length, dtype=torch.bool)[:, :3]
    return torch.stack((own, other))[:, None]


def as_added(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often a site's mask was not ranges."""
    counts: collections.Counter[str] = collections.Counter()
    dense = given_mask._dense

    def call(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        counts["dense"] += 1
        return dense(*arguments)

    monkeypatch.setattr(given_mask, "_dense", call)
    return counts


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_model_and_its_gradients(backend: str, counted: collections.Counter[str]) -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend=backend, strict="verified" if rewriter.passes.HAS_SOLVER else True)
    for kind, form in (("documents", "bool"), ("a tree", "bool"), ("a window", "added"), ("a tree", "added")):
        for length in (TOKENS, TOKENS + 9):
            ids, mask = torch.randint(64, (2, length)), masks(kind, length)
            given = mask if form == "bool" else as_added(mask)
            counted.clear()
            losses = [m(input_ids=ids, attention_mask=given, labels=ids, use_cache=False).loss for m in (model, fast)]
            torch.testing.assert_close(*losses)
            grads = [torch.autograd.grad(loss, model.model.embed_tokens.weight)[0] for loss in losses]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
            assert counted["dense"] == (2 if kind == "a tree" else 0)  # of two layers, the forward alone
    assert len(fast.report.graphs) == 2  # bool, and added
    site = fast.report.sites[0]
    assert site.mask == "given at the call" and "found at the call" in site.visible and not site.reason


def test_values_that_are_neither_0_nor_masking_are_added() -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    ids = torch.randint(64, (2, TOKENS))
    given = as_added(masks("a window", TOKENS)) + torch.randn(2, 1, TOKENS, TOKENS)
    with torch.no_grad():
        results = [m(input_ids=ids, attention_mask=given, use_cache=False).logits for m in (model, fast)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_mask_that_learns(backend: str) -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend=backend, strict=True)
    ids = torch.randint(64, (2, TOKENS))
    given = as_added(masks("a window", TOKENS)).requires_grad_()
    grads = []
    for m in (model, fast):
        loss = m(input_ids=ids, attention_mask=given, labels=ids, use_cache=False).loss
        grads.append(torch.autograd.grad(loss, given)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert grads[0].abs().max() > 0


def test_a_policy_that_drops_keys_says_why_not() -> None:
    fast = rewriter.optimize(llama(), SlidingWindow(4), backend="eager", strict=True)
    ids = torch.randint(64, (2, TOKENS))
    with pytest.raises(RewriteError, match=r"a mask that a call gives .* use Exact\(\)"):
        fast(input_ids=ids, attention_mask=masks("a window", TOKENS), use_cache=False)


def test_a_call_with_one_and_a_call_without() -> None:
    fast = rewriter.optimize(llama(), Exact(), backend="eager", strict=True)
    ids = torch.randint(64, (2, TOKENS))
    with torch.no_grad():
        plain = fast(input_ids=ids, use_cache=False)
        given = fast(input_ids=ids, attention_mask=masks("a window", TOKENS), use_cache=False)
    assert plain.logits.shape == given.logits.shape
    assert not torch.allclose(plain.logits, given.logits)


class Attend(torch.nn.Module):
    """Attention by hand, its mask added in the mask's own dtype."""

    def forward(self, query: torch.Tensor, mask: Any) -> torch.Tensor:
        mask = mask["full_attention"] if isinstance(mask, dict) else mask
        logits = query @ query.transpose(2, 3) * 8**-0.5 + mask
        return torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype) @ query


def test_rows_whose_values_all_lie_far_below_0_are_not_hidden() -> None:
    """As ALiBi has it where the bias of the first keys is counted from the last one."""
    index = torch.arange(64)
    mask = torch.where(index <= index[:, None], -300.0 * (63 - index), -torch.inf)[None, None]
    query, model = torch.randn(1, 2, 64, 8), Attend()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    torch.testing.assert_close(fast(query, mask), model(query, mask), rtol=1e-5, atol=1e-5)
    mask[0, 0, :5] = torch.finfo(torch.float32).min  # padding: an average in the original
    actual, expected = fast(query, mask), model(query, mask)
    assert not actual[:, :, :5].any()
    torch.testing.assert_close(actual[:, :, 5:], expected[:, :, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wider_mask_is_not_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, mask = torch.randn(1, 2, 32, 8), 30 + 3 * torch.randn(1, 1, 32, 32)
    model = Attend()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    exact = model(query.to(dtype).double(), mask.double())
    errors = [float((m(query.to(dtype), mask).double() - exact).norm() / exact.norm()) for m in (model, fast)]
    assert errors[1] < 1.5 * errors[0]


def test_one_in_a_dictionary_as_transformers_takes_it() -> None:
    query, mask = torch.randn(2, 2, TOKENS, 8), as_added(masks("a window", TOKENS))
    model = Attend()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    given = {"full_attention": mask, "sliding_attention": mask}
    torch.testing.assert_close(fast(query, given), model(query, given), rtol=1e-5, atol=1e-5)
    assert fast.report.sites[0].mask == "given at the call"


def image_and_text(scattered: bool) -> dict[str, torch.Tensor]:
    """Two rows, the second with padding; type 0 is a prefix, or is scattered."""
    ids = torch.randint(3, 40, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, 3:7] = IMAGE
    mask, types = torch.ones_like(ids), (torch.arange(TOKENS) >= 12).long().expand(2, -1).clone()
    mask[1, :3] = 0
    if scattered:
        types[:, 18:20] = 0
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "attention_mask": mask,
        "token_type_ids": types,
    }


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_prefix_that_the_ids_say(backend: str, counted: collections.Counter[str]) -> None:
    """PaliGemma: whether the tokens that see each other are a run is found at the call."""
    model = paligemma()
    fast = rewriter.optimize(model, Exact(), backend=backend, strict="verified" if rewriter.passes.HAS_SOLVER else True)
    for scattered in (False, True):
        call = image_and_text(scattered)
        counted.clear()
        labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
        losses = [m(**call, labels=labels, use_cache=False).loss for m in (model, fast)]
        torch.testing.assert_close(*losses)
        weight = model.model.language_model.embed_tokens.weight
        grads = [torch.autograd.grad(loss, weight)[0] for loss in losses]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
        assert counted["dense"] == (2 if scattered else 0)  # of two layers of text
    masks_of_sites = [site.mask for site in fast.report.sites]
    assert masks_of_sites.count("padding + given at the call") == 2 and len(fast.report.graphs) == 1
    with pytest.raises(
        RewriteError, match=r"SlidingWindow drops keys, and a mask compares .* \(input token_type_ids\); use"
    ):
        rewriter.optimize(model, SlidingWindow(4), backend="eager", strict=True)(
            **image_and_text(False), use_cache=False
        )


class ByIds(torch.nn.Module):
    """Tokens of one number see each other, wherever they are, and what is before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 16)

    def forward(self, ids: torch.Tensor, marks: torch.Tensor | None = None) -> torch.Tensor:
        query = self.embedding(ids).unflatten(2, (2, 8)).transpose(1, 2)
        same = ids[:, :, None] == ids[:, None, :]
        if marks is not None:  # a comparison that layers have a part in
            same = same & (marks[:, :, None] <= marks[:, None, :])
        index = torch.arange(ids.size(1))
        mask = (same | (index <= index[:, None]))[:, None]
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)


def test_what_ids_say_is_given_and_what_numbers_say_is_not(counted: collections.Counter[str]) -> None:
    model = ByIds()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    for ids, dense in ((torch.arange(TOKENS)[None] // 6, 0), (torch.randint(16, (3, TOKENS)), 1)):
        counted.clear()
        torch.testing.assert_close(fast(ids), model(ids))
        assert counted["dense"] == dense
    assert all(site.mask == "given at the call" for _, sites in fast.report.outcomes for site in sites)
    with pytest.raises(RewriteError, match="1 of 1 attention sites are refused"):
        rewriter.optimize(model, Exact(), backend="eager", strict=True)(ids, torch.randn(3, TOKENS))
