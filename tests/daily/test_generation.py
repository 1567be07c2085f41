"""Generation: caches, options, encoders and decoders, images; see README.md beside this."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from everyday_models import IMAGE
from everyday_models import bart
from everyday_models import gemma3
from everyday_models import llama
from everyday_models import llava
from torch import Tensor

import rewriter
from rewriter import CacheError
from rewriter import Exact
from rewriter import Policy
from rewriter import PolicyWarning
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.generation import cache_of_call

GREEDY = {"max_new_tokens": 6, "do_sample": False}
POLICIES = [SlidingWindow(4), SlidingWindow(4, sinks=2), SeparatorMask([5, 6, 7, 8], 2, 3)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("asks", [True, None], ids=["use_cache", "default"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_loop_by_hand_goes_on_under_the_policy(
    policy: Policy, asks: bool | None, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_of_call, "STEPS", 1)
    fast = rewriter.optimize(llama(max_position_embeddings=1024), policy, backend="eager")
    text = torch.randint(3, 64, (2, 250))
    with torch.set_grad_enabled(grad):
        output = fast(text, use_cache=asks)
        expected = fast(text, use_cache=False).logits
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        for size in (1, 3, 1, 30):  # beyond the 256 tokens that the cache was made for
            new = torch.randint(3, 64, (2, size))
            text = torch.cat((text, new), 1)
            output = fast(new, past_key_values=output.past_key_values)
            expected = fast(text, use_cache=False).logits[:, -size:]
            torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    assert output.past_key_values.length == text.size(1)


def test_a_cache_that_nobody_uses_costs_nothing_and_one_of_another_library_is_an_error() -> None:
    model = llama()
    fast = rewriter.optimize(model, SlidingWindow(4), backend="eager")
    ids = torch.randint(3, 64, (2, 12))
    output = fast(ids)
    assert fast._decoder is None and list(output.keys()) == ["logits", "past_key_values"]
    with pytest.raises(CacheError, match="DynamicCache, which keeps what the policy forgets"):
        fast(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values)


def test_under_exact_the_cache_is_the_models() -> None:
    model = llama()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    ids, new = torch.randint(3, 64, (2, 12)), torch.randint(3, 64, (2, 1))
    output = fast(ids, use_cache=True)
    assert type(output.past_key_values).__name__ == "DynamicCache"
    expected = model(torch.cat((ids, new), 1)).logits[:, -1:]
    actual = fast(new, past_key_values=output.past_key_values).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_is_copied_and_pickled_for_the_same_model() -> None:
    fast, other = (rewriter.optimize(llama(), SlidingWindow(4), backend="eager") for _ in range(2))
    ids, new = torch.randint(3, 64, (2, 12)), torch.randint(3, 64, (2, 1))
    cache = fast(ids).past_key_values
    copies = [pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    expected = fast(new, past_key_values=cache).logits
    for own in copies:
        torch.testing.assert_close(fast(new, past_key_values=own).logits, expected)
        with pytest.raises(CacheError, match="another optimized model"):
            other(new, past_key_values=own)


def test_options_of_generate_are_the_models_or_refused_before_the_first_token() -> None:
    model = llama()
    exact, window, long = (
        rewriter.optimize(model, policy, backend="eager") for policy in (Exact(), SlidingWindow(8), SlidingWindow(64))
    )
    ids = torch.randint(3, 64, (1, 20)).repeat(1, 2)
    expected = model.generate(ids, guidance_scale=1.5, **GREEDY)
    assert torch.equal(exact.generate(ids, guidance_scale=1.5, **GREEDY), expected)
    assert torch.equal(window.generate(ids, cache_implementation="static", **GREEDY), window.generate(ids, **GREEDY))
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(long.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)
    draft = rewriter.optimize(llama(num_hidden_layers=1), Exact(), backend="eager")
    assert torch.equal(exact.generate(ids, assistant_model=draft, **GREEDY), expected)
    refused = {
        "keys are forgotten": {"prompt_lookup_num_tokens": 3},
        "guesses tokens and takes wrong ones back": {"assistant_model": llama(num_hidden_layers=1)},
        "gives logits and no hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
        "made once and of fixed size": {"cache_implementation": "quantized"},
    }
    for message, options in refused.items():
        with pytest.raises(CacheError, match=message):
            window.generate(ids, **options, **GREEDY)
    with pytest.raises(CacheError, match="needs input_ids, got inputs_embeds"):
        window.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)


def dense_window(window: int) -> Callable[..., Tensor]:
    """bool `[1, 1, n, n]`: the mask of a window, written out."""

    def mask(length: int) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        return ((distance >= 0) & (distance < window))[None, None]

    return mask


def test_an_encoder_and_a_decoder_generate() -> None:
    model = bart()
    ids = torch.randint(3, 64, (2, 9))
    expected = model.generate(ids, num_beams=2, **GREEDY)
    exact = rewriter.optimize(model, Exact(), backend="eager")
    assert torch.equal(exact.generate(ids, num_beams=2, **GREEDY), expected)
    window = rewriter.optimize(model, SlidingWindow(3), backend="eager")
    with pytest.warns(PolicyWarning, match="each new token computes the whole text"):
        text = window.generate(ids, num_beams=1, min_new_tokens=6, **GREEDY)
    mask = dense_window(3)
    own = torch.full((2, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        for step in range(6):  # greedily, over the dense masked model
            seen = mask(step + 1).expand(2, 1, -1, -1)
            logits = model(ids, decoder_input_ids=own, decoder_attention_mask=seen, use_cache=False).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            own = torch.cat((own, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(text[:, 1:6], own[:, 1:6])


@pytest.mark.parametrize("make", [llava, gemma3], ids=["LLaVA", "Gemma 3"])
def test_models_of_images_generate_with_and_without(make: Callable[[], Any]) -> None:
    model = make()
    ids = torch.randint(3, IMAGE, (1, 12))
    with_image = ids.clone()
    with_image[0, 2:6] = IMAGE
    image = {"pixel_values": torch.randn(1, 3, 16, 16)}
    if make is gemma3:
        image["token_type_ids"] = (with_image == IMAGE).long()
    fast = rewriter.optimize(model, Exact(), backend="eager")
    with torch.no_grad():
        for call in ({"input_ids": ids}, {"input_ids": with_image, **image}):
            torch.testing.assert_close(fast(**call).logits, model(**call).logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(fast.generate(**call, **GREEDY), model.generate(**call, **GREEDY))
    window = rewriter.optimize(model, SlidingWindow(64), backend="eager")  # longer than the text: it changes nothing
    assert torch.equal(window.generate(input_ids=ids, **GREEDY), model.generate(input_ids=ids, **GREEDY))
