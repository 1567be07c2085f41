"""The cache that a call returns as `past_key_values`, as the models of transformers do: filled when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewriter.errors import CacheError
from rewriter.generation.cache import LiveRangeCache
from rewriter.generation.cache import rounded_up
from rewriter.generation.decoder import Decoder
from rewriter.generation.generate import cached_forward
from rewriter.generation.model_facts import ARGUMENTS

OF_THE_OUTPUT = ("labels", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states")
"""Arguments that the keys of a call do not depend on, besides those that `cached_forward` ignores."""


STEPS = 256
"""New tokens that a call's cache has room for before it grows."""


class CacheOfCall(LiveRangeCache):
    """The keys of a call that was computed without a cache: they are computed when the cache is first used.

    A training step and an evaluation return a cache that nobody asks for, as the configurations of transformers have it; it
    costs nothing then.

    Args:
        decoder: of the model; asked for when the cache is filled.
        arguments: of the call, by name.
    """

    def __init__(self, decoder: Callable[[], Decoder], arguments: dict[str, Any]) -> None:
        self._decoder, self._arguments = decoder, arguments

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_decoder" not in self.__dict__:
            raise AttributeError(f"a LiveRangeCache has no {name}")
        self._fill()
        return getattr(self, name)

    def __getstate__(self) -> dict[str, Any]:
        if "_decoder" in self.__dict__:
            self._fill()
        return self.__dict__

    def _fill(self) -> None:
        keys = {name: value for name, value in self._arguments.items() if name not in OF_THE_OUTPUT}
        cache = growing_cache(self._decoder(), keys)
        cached_forward(self._decoder(), cache, **keys, logits_to_keep=1)
        del self._decoder, self._arguments
        self.__dict__.update(cache.__dict__)
        for layer in self.layers:
            layer.cache = self  # type: ignore[union-attr]


def growing_cache(decoder: Decoder, arguments: dict[str, Any]) -> LiveRangeCache:
    """An empty cache for the text of a call, and for whatever follows."""
    ids = arguments.get("input_ids")
    if ids is None:
        given = next((name for name in arguments if name != "attention_mask"), "nothing")
        raise CacheError(
            f"a cache is made from input_ids, and the call was given {given}; call the model with input_ids"
        )
    return decoder.new_cache(rounded_up(ids.size(-1) + STEPS), grows=True)


def may_run_over_cache(arguments: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but the logits that `cached_forward` returns."""
    mask = arguments.get("attention_mask")
    return (mask is None or mask.dim() == 2) and all(
        name in (*ARGUMENTS, "logits_to_keep", "use_cache", "past_key_values") or value is None or value is False
        for name, value in arguments.items()
    )
