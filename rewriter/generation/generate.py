"""transformers' `generate` over a decoder, and the cached forward that it calls."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import nn

from rewriter.errors import CacheError
from rewriter.generation.cache import LiveRangeCache
from rewriter.generation.cache import rounded_up
from rewriter.generation.decoder import Decoder
from rewriter.generation.model_facts import ARGUMENTS
from rewriter.generation.model_facts import base_model

IGNORED = ("use_cache", "return_dict", "cache_position", "tokenizer")
"""Arguments that say nothing in a cached call: of a transformers model, and what its `generate` hands on."""


def cached_forward(
    decoder: Decoder,
    cache: LiveRangeCache,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    chunk: int | None = None,
    **others: Any,
) -> Any:
    """The forward of a transformers model with a cache.

    Args:
        chunk: most tokens to run at once; all when None.

    Returns:
        `CausalLMOutputWithPast` with `logits` and the cache as `past_key_values`.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    for name, value in others.items():
        if value is not None and value is not False and name not in IGNORED and value != {}:
            raise CacheError(
                f"{name} is given, and a cached call takes {', '.join(ARGUMENTS)} and logits_to_keep; call the model without "
                "past_key_values"
            )
    if input_ids is None:
        raise CacheError("a cached call needs input_ids")
    _check_own(cache)
    if position_ids is not None and position_ids.dim() == 3 and bool((position_ids == position_ids[:1]).all()):
        position_ids = position_ids[0]  # of each axis of an image; a text has the same on all
    decoder.check_arguments(cache, input_ids, attention_mask, position_ids, chunk)
    num_new = input_ids.size(1)
    cache.make_room(num_new)
    rows = torch.arange(num_new, device=input_ids.device)
    rows = rows[-logits_to_keep:] if isinstance(logits_to_keep, int) else rows[logits_to_keep]
    if attention_mask is not None:
        attention_mask = attention_mask[:, -num_new:]
    logits = []
    step = chunk or num_new
    first = 0 if cache.expected_call is None else min(cache.expected_call.num_tokens, num_new)  # comes as a whole
    borders = [*([0] if first else []), *range(first, num_new, step), num_new]
    if len(borders) == 2:
        output = decoder.run_checked(cache, input_ids, attention_mask, position_ids, rows)
        return CausalLMOutputWithPast(logits=output, past_key_values=cache)
    for begin, end in itertools.pairwise(borders):
        part = slice(begin, end)
        own = rows[(rows >= begin) & (rows < end)] - begin
        mask, places = (None if t is None else t[:, part] for t in (attention_mask, position_ids))
        logits.append(decoder.run_checked(cache, input_ids[:, part], mask, places, own))
    # The rows came part by part; they go back in the order that was asked for.
    asked = (
        torch.bucketize(rows, torch.tensor(borders[1:-1], device=rows.device), right=True)
        .argsort(stable=True)
        .argsort()
    )
    return CausalLMOutputWithPast(logits=torch.cat(logits, dim=1)[:, asked], past_key_values=cache)


def generate(
    decoder: Decoder,
    inputs: Tensor | None,
    past_key_values: Any,
    prefill_chunk: int | None,
    options: dict[str, Any],
    wrapper: nn.Module,
) -> Any:
    """transformers' own `generate` over the decoder; see `OptimizedModel.generate`.

    Args:
        wrapper: whose hooks see each step.
    """
    model: Any = base_model(decoder.model)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise CacheError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
    _check_options(model, options)
    prompt = options.get("input_ids", inputs)
    if not isinstance(prompt, Tensor) or prompt.dim() != 2 or not prompt.size(1):
        given = list(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise CacheError(f"generate needs input_ids [B, n] with at least one token, got {given}")
    longest = longest_text(model, prompt.size(1), options)
    _check_may_take_back(decoder, longest, options)
    if past_key_values is None:
        past_key_values = decoder.new_cache(rounded_up(longest))
    else:
        _check_own(past_key_values)
        _check_continues(past_key_values, prompt, options.get("attention_mask"))
        if past_key_values.length:  # transformers repeats the prompt
            past_key_values.batch_repeat_interleave(_rows_of_each(model, options))

    def forward(input_ids: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is None and input_ids is not None:  # of a second text, as guidance without the prompt has
            past_key_values = decoder.new_cache(rounded_up(longest), grows=True)
        return cached_forward(decoder, past_key_values, input_ids, chunk=prefill_chunk, **kwargs)

    own = {"use_cache": True, "cache_implementation": None}
    return with_forward(model, forward, wrapper).generate(inputs, past_key_values=past_key_values, **{**options, **own})


def generate_whole(
    model: Any, forward: Any, is_lossless: bool, inputs: Any, options: dict[str, Any], wrapper: nn.Module
) -> Any:
    """transformers' own `generate` over an optimized forward that takes the model's own inputs, images say.

    Under a lossless policy with the model's own cache; else without any, and each new token computes the whole text.
    """
    if not is_lossless:
        options = {**options, "use_cache": False}
    given = () if inputs is None else (inputs,)
    return with_forward(base_model(model), forward, wrapper).generate(*given, **options)


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def with_forward(model: Any, forward: Any, wrapper: nn.Module | None = None) -> Any:
    """A shallow copy of a model, with the same parameters and modules, and a forward of its own: the model is not touched.

    Args:
        wrapper: whose hooks the copy has besides the model's.
    """
    view = copy.copy(model)
    for name in HOOKS if wrapper is not None else ():
        setattr(view, name, OrderedDict({**getattr(model, name), **getattr(wrapper, name)}))
    view.forward = functools.wraps(model.forward)(functools.partial(forward))
    return view


CACHE_IMPLEMENTATIONS = (None, "static", "dynamic", "dynamic_full", "hybrid", "sliding_window")
"""What transformers calls caches of another shape than the policy's own; the others are kept elsewhere, or in other bits."""


def _check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raises `CacheError` for what a generation over the policy's own cache cannot give, before the first token."""
    if options.get("use_cache") is False:
        raise CacheError("generate runs over the policy's own cache; leave use_cache out")
    if options.get("inputs_embeds") is not None:
        raise CacheError("generate over the policy's own cache needs input_ids, got inputs_embeds; give the tokens")
    for name in ("output_hidden_states", "output_attentions"):
        if option(model, options, name):
            raise CacheError(
                f"generate over the policy's own cache gives logits and no {name.removeprefix('output_')}; leave {name} out, and "
                f"call the model on the text that it has generated: fast(input_ids=text, {name}=True)"
            )
    wanted = options.get("cache_implementation")
    if wanted not in CACHE_IMPLEMENTATIONS:
        raise CacheError(
            f"cache_implementation={wanted!r} asks for a cache of transformers, and generate runs over the policy's own, which "
            "is made once and of fixed size; leave it out"
        )


def _check_may_take_back(decoder: Decoder, longest: int, options: Mapping[str, Any]) -> None:
    """Raises `CacheError` where tokens would be taken back whose keys made others leave, or are gone."""
    asks = next((n for n in ("assistant_model", "prompt_lookup_num_tokens") if options.get(n) is not None), None)
    if asks is None:
        return
    for table in decoder.layout.tables:
        if not table.policy.keeps_all(longest) or (table.window or longest) < longest:
            raise CacheError(
                f"{asks} guesses tokens and takes wrong ones back, and under {table.policy} keys are forgotten within the "
                f"{longest} tokens of this text; leave it out, or set a window of so many tokens, or max_new_tokens to fewer"
            )


def _check_own(cache: object) -> None:
    if not isinstance(cache, LiveRangeCache):
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, which keeps what the policy forgets; make the cache with "
            "new_cache(max_length=...), or take the one that a call returns"
        )


def _check_continues(cache: LiveRangeCache, prompt: Tensor, attention_mask: Tensor | None) -> None:
    """Raises `CacheError` where a prompt does not go on from what a cache holds."""
    if not cache.length:
        return
    cache.check_rows(prompt.size(0))
    given = prompt.size(1) if attention_mask is None else attention_mask.size(1)
    if given == prompt.size(1) + cache.length:
        return  # the new tokens alone, and the mask of the whole text
    after = "give the whole text, or the new tokens with the attention_mask of the whole text"
    if given != prompt.size(1) or prompt.size(1) <= cache.length:
        raise CacheError(
            f"the cache holds {cache.length} tokens, input_ids are {prompt.size(1)} and attention_mask {given}; {after}"
        )
    last = prompt[:, cache.length - 1]
    if cache.last_ids is not None and not torch.equal(last.to(cache.last_ids.device), cache.last_ids):
        raise CacheError(f"token {cache.length - 1} of input_ids is not the last one that the cache holds; {after}")


def longest_text(model: Any, prompt: int, options: Mapping[str, Any]) -> int:
    """Tokens that a generation may have at most, those of its prompt included."""
    new, length = (option(model, options, name) for name in ("max_new_tokens", "max_length"))
    if new is not None:
        return int(prompt + new)
    return max(options.get("max_length") or max(length or 0, prompt + 20), prompt + 1)


def option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """An option of a generation: as given, or as the configurations have it."""
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))
    given = [options.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in given if value is not None), None)


def _rows_of_each(model: Any, options: Mapping[str, Any]) -> int:
    """Rows that transformers' `generate` makes of each prompt, for beams or several answers."""
    return max(option(model, options, name) or 1 for name in ("num_beams", "num_return_sequences"))
