"""transformers' `generate` over a decoder, and the cached forward that it calls."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import CacheError
from rewriter.generation.cache import LiveRangeCache
from rewriter.generation.cache import rounded_up
from rewriter.generation.decoder import Decoder
from rewriter.generation.model_facts import ARGUMENTS
from rewriter.generation.model_facts import base_model

IGNORED = ("use_cache", "return_dict", "cache_position")
"""Arguments of a transformers model that say nothing in a cached call."""


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
        if value is not None and value is not False and name not in IGNORED:
            raise CacheError(
                f"{name} is given, and a cached call takes {', '.join(ARGUMENTS)} and logits_to_keep; call the model without "
                "past_key_values"
            )
    if input_ids is None:
        raise CacheError("a cached call needs input_ids")
    _check_own(cache)
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
    for begin, end in itertools.pairwise(borders):
        part = slice(begin, end)
        own = rows[(rows >= begin) & (rows < end)] - begin
        mask, places = (None if t is None else t[:, part] for t in (attention_mask, position_ids))
        logits.append(decoder.run(cache, input_ids[:, part], mask, places, own))
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
) -> Any:
    """transformers' own `generate` over the decoder; see `OptimizedModel.generate`."""
    model: Any = base_model(decoder.model)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise CacheError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
    prompt = options.get("input_ids", inputs)
    if not isinstance(prompt, Tensor) or prompt.dim() != 2 or not prompt.size(1):
        given = list(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise CacheError(f"generate needs input_ids [B, n] with at least one token, got {given}")
    if options.get("use_cache") is False:
        raise CacheError("generate runs over the policy's own cache; leave use_cache out")
    if past_key_values is None:
        past_key_values = decoder.new_cache(rounded_up(longest_text(model, prompt.size(1), options)))
    else:
        _check_own(past_key_values)
        _check_continues(past_key_values, prompt, options.get("attention_mask"))
        if past_key_values.length:  # transformers repeats the prompt
            past_key_values.batch_repeat_interleave(_rows_of_each(model, options))

    @functools.wraps(model.forward)
    def forward(input_ids: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return cached_forward(decoder, past_key_values, input_ids, chunk=prefill_chunk, **kwargs)

    # A shallow copy shares parameters and modules, and has a forward of its own: the model itself is not touched.
    view = copy.copy(model)
    view.forward = forward
    return view.generate(inputs, past_key_values=past_key_values, **{**options, "use_cache": True})


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
