"""Streaming: the log-probability of each token of a text without an end, in constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Iterator

import torch
from torch import Tensor
from torch import nn

from rewriter.api import optimize
from rewriter.errors import RewriteError
from rewriter.optimized_model import OptimizedModel
from rewriter.passes.policy import Policy


def stream(
    model: nn.Module, policy: Policy | None, tokens: Iterable[int] | Tensor, *, block: int = 256
) -> Iterator[float]:
    """log p(token | all earlier ones, as far as the policy keeps them) of each token but the first, in nats.

    Nothing grows with the text, which may be as long as it likes (up to 2^30 tokens). For texts longer than the model was
    trained for, number keys by their place in the cache: `SeparatorMask(..., positions="cache")`, or StreamingLLM
    (arXiv 2309.17453), which is the same with `max_separators=0` and a window that fills the capacity.

    Args:
        model: a causal model of transformers, or one that is optimized already.
        policy: one that bounds the keys that live; None for an optimized model's own.
        tokens: ids, one after the other, read as they are needed; or an integer tensor `[N]`.
        block: tokens that run at once. The results do not depend on it; a token's own comes when its block is full.

    Raises:
        CacheError: the policy does not bound the keys that live, or the model cannot go on from a cache.
        RewriteError: the model is optimized, and a policy is given too.
        ValueError: `block` is below 1, or the tokens are not a row of integers.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if isinstance(tokens, Tensor) and (tokens.dim() != 1 or tokens.is_floating_point()):
        raise ValueError(f"tokens must be integer [N], got {tokens.dtype} {list(tokens.shape)}")
    if isinstance(model, OptimizedModel):
        if policy is not None and policy != model.policy:
            raise RewriteError(f"the model is optimized already, with {model.policy}; leave the policy out")
        fast = model
    else:
        fast = optimize(model, policy, strict=True)
    return _stream(fast, fast.new_cache(), tokens, block)


def _stream(fast: OptimizedModel, cache: object, tokens: Iterable[int] | Tensor, block: int) -> Iterator[float]:
    device = next(fast.model.parameters()).device
    rest = iter(tokens)
    before: Tensor | None = None  # log-probabilities of the token after the last block, [vocabulary]
    while part := list(itertools.islice(rest, block)):
        ids = torch.as_tensor([int(token) for token in part], device=device)
        logits = fast(input_ids=ids[None], past_key_values=cache).logits[0]
        own = logits.float().log_softmax(dim=-1)
        first = [] if before is None else [before[ids[0]]]
        inner = own[:-1].gather(1, ids[1:, None])[:, 0]
        before = own[-1]
        yield from torch.cat((torch.stack(first) if first else inner[:0], inner)).tolist()
