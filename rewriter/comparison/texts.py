"""Rows of a text, as a model reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.errors import RewriteError


def rows_of(tokenizer: Any, text: str, length: int, rows: int) -> list[Tensor]:
    """At most `rows` of `length` tokens each, int64 `[1, length]`; a text that is shorter is one row.

    Each begins with the token that the tokenizer puts in front of a text, if it does.

    Raises:
        RewriteError: the text, or what is asked of it, is too short.
    """
    if length < 2 or rows < 1:
        raise RewriteError(f"length must be at least 2 tokens and rows at least 1, got {length} and {rows}")
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer(text[:100]).input_ids
    front = whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []
    own = length - len(front)
    if len(tokens) < own:
        own = len(tokens)
    if own < 2:
        raise RewriteError(f"the text has {len(tokens)} tokens; give a longer one")
    count = min(rows, len(tokens) // own)
    return [torch.tensor([[*front, *tokens[n * own : (n + 1) * own]]]) for n in range(count)]
