"""What people do with a model on an ordinary day; see README.md beside this."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from everyday_models import llama
from transformers import AutoTokenizer
from transformers import pipeline

import rewriter
from rewriter import Exact
from rewriter import PerLayer
from rewriter import PolicyError
from rewriter import SlidingWindow
from rewriter import tracing

TOKENIZER = Path(rewriter.__file__).parent / "demo" / "model"


def test_what_is_not_defined_here_is_the_models() -> None:
    model = llama()
    fast = rewriter.optimize(model, SlidingWindow(6), backend="eager")
    for name in ("config", "device", "dtype", "generation_config", "main_input_name"):
        assert getattr(fast, name) is getattr(model, name) or getattr(fast, name) == getattr(model, name)
    assert fast.num_parameters() == model.num_parameters() and fast.can_generate()
    assert fast.get_input_embeddings() is model.get_input_embeddings()
    assert fast.lm_head is model.lm_head
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = fast.nothing_of_the_kind
    assert fast.policy == SlidingWindow(6) and fast.report is not None


def test_copies_and_pickles_have_a_model_of_their_own() -> None:
    fast = rewriter.optimize(llama(), SlidingWindow(6), backend="eager")
    ids = torch.randint(64, (1, 12))
    expected = fast(input_ids=ids).logits
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.config is not fast.config and other.get_input_embeddings() is not fast.get_input_embeddings()
        torch.testing.assert_close(other(input_ids=ids).logits, expected)


def test_a_pipeline_generates_what_the_model_generates() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = llama()
    model.resize_token_embeddings(len(tokenizer))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [
        pipeline("text-generation", model=m, tokenizer=tokenizer, device="cpu")("def main(", **options)
        for m in (model, rewriter.optimize(model, Exact(), backend="eager"))
    ]
    assert texts[0] == texts[1] and len(texts[1][0]["generated_text"]) > len("def main(")


def test_a_training_script_calls_a_model_in_more_than_eight_ways() -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    kinds = itertools.product((True, False), (True, False), ((2, 16), (1, 16), (2, 1)), (True, False))
    for train, grad, (rows, length), masked in kinds:
        fast.train(train)
        ids = torch.randint(64, (rows, length))
        given = {"attention_mask": torch.ones_like(ids)} if masked else {}
        with torch.set_grad_enabled(grad):
            actual = fast(input_ids=ids, use_cache=False, **given).logits
            expected = model(input_ids=ids, use_cache=False, **given).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_more_kinds_of_calls_than_there_may_be_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "KINDS_OF_CALLS", 2)
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    warned = 0
    for rows, length, masked in itertools.product((1, 2), (1, 16), (True, False)):
        ids = torch.randint(64, (rows, length))
        given = {"attention_mask": torch.ones_like(ids)} if masked else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = fast(input_ids=ids, use_cache=False, **given).logits
        warned += any("all graphs are dropped" in str(warning.message) for warning in caught)
        torch.testing.assert_close(actual, model(input_ids=ids, **given).logits, rtol=1e-4, atol=1e-5)
    assert warned > 0


def test_a_policy_for_sites_that_are_not_there_is_an_error() -> None:
    for layers, message in (
        (
            {0: SlidingWindow(4), 7: SlidingWindow(8), "default": Exact()},
            "names layer 7, and the model's .* sites are 0 to 1",
        ),
        ({0: SlidingWindow(4)}, 'says nothing of layer 1; add "default"'),
    ):
        fast = rewriter.optimize(llama(), PerLayer(layers), backend="eager")
        with pytest.raises(PolicyError, match=message):
            fast(input_ids=torch.randint(64, (1, 12)))
