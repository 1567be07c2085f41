"""What a model's signature and configuration say."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch import nn

ARGUMENTS = ("input_ids", "attention_mask", "position_ids")


def text_config(model: Any) -> Any:
    """A transformers model's configuration of what reads text; None for other models."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_implementation(model: Any) -> str | None:
    """As transformers names it: "sdpa", "eager", ...; None for other models."""
    return getattr(text_config(model), "_attn_implementation", None)


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def signature_of(model: Any) -> Mapping[str, Any]:
    """The arguments of a model's forward; under peft those of the model inside, which peft passes on."""
    forward = base_model(model).forward
    function = getattr(forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return inspect.signature(forward).parameters
    # Asked at each call, and 60 microseconds each time.
    known = _SIGNATURES.get(function)
    if known is None:
        known = _SIGNATURES[function] = inspect.signature(forward).parameters
    return known


_SIGNATURES: weakref.WeakKeyDictionary[Any, Mapping[str, Any]] = weakref.WeakKeyDictionary()
"""Of the functions behind bound `forward`s, without `self`."""


def base_model(model: Any) -> Any:
    """The model that peft has put adapters into; the model itself where there is no peft."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a training step would compute layers a second time; transformers' models then keep no keys."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def returns_dict(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call returns its outputs by name, and not as a tuple."""
    asked = arguments.get("return_dict")
    return bool(getattr(getattr(model, "config", None), "return_dict", True) if asked is None else asked)


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that the model knows."""
    size = getattr(text_config(model), "vocab_size", None)
    if isinstance(size, int):
        return size
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return min(sizes, default=2)


def takes_use_cache(model: nn.Module) -> bool:
    takes = signature_of(model)
    passes_on = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in takes.values())
    return "use_cache" in takes or (passes_on and hasattr(getattr(model, "config", None), "use_cache"))


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name.

    Raises:
        TypeError: as the call itself, where there are too many, or one is given twice.
    """
    if not args:
        return dict(kwargs)
    positional = inspect.signature(base_model(model).forward).bind_partial(*args).arguments
    if twice := positional.keys() & kwargs:
        raise TypeError(f"forward() got {sorted(twice)[0]} by its place and by its name")
    return {**positional, **kwargs}


def takes_more_than_text(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether a generation is of an encoder and a decoder, or has inputs besides a text: images, sounds, token types."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    takes = [
        name for name in signature_of(model) if name not in (*ARGUMENTS, "past_key_values", "inputs_embeds", "labels")
    ]
    return any(isinstance(options.get(name), Tensor) for name in takes)
