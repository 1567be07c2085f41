"""What a model's signature and configuration say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch import nn

ARGUMENTS = ("input_ids", "attention_mask", "position_ids")


def text_config(model: Any) -> Any:
    """A transformers model's configuration of what reads text; None for other models."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def signature_of(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that the model knows."""
    size = getattr(text_config(model), "vocab_size", None)
    if isinstance(size, int):
        return size
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return min(sizes, default=2)


def takes_use_cache(model: nn.Module) -> bool:
    return "use_cache" in signature_of(model) or hasattr(getattr(model, "config", None), "use_cache")
