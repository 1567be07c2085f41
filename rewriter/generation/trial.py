"""That a model may be run over a cache is tried and not assumed: on a few tokens, at once and in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import nn

from rewriter.errors import CacheError
from rewriter.generation.model_facts import logits_of
from rewriter.generation.model_facts import takes_use_cache

if TYPE_CHECKING:
    from rewriter.generation.decoder import Decoder

TRIAL_LENGTH = 9
"""Tokens of the check."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the check, relative to the size of all logits; 16-bit models may differ by more, as rounding does."""


@torch.no_grad()
def check_in_pieces(decoder: Decoder) -> None:
    """Runs a few tokens at once, and in pieces.

    Raises:
        CacheError: the logits differ: something besides attention mixes tokens.
    """
    random = torch.Generator().manual_seed(0)
    device = decoder.device
    # Distinct tokens: scores of equal ones tie, and rounding, which depends on the pieces, would decide.
    ids = torch.stack([torch.randperm(decoder.vocabulary, generator=random)[:TRIAL_LENGTH] for _ in range(2)])
    ids = ids.repeat(1, -(-TRIAL_LENGTH // ids.size(1)))[:, :TRIAL_LENGTH].to(device)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    mask[0, 5] = 0  # the first token of the second piece
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for pieces in ((TRIAL_LENGTH,), (5, 3, 1)):
        cache = decoder.new_cache(TRIAL_LENGTH)
        cache.allocate(2)
        outputs, begin = [], 0
        for size in pieces:
            part = slice(begin, begin + size)
            arguments = {
                "input_ids": ids[:, part],
                "attention_mask": mask[:, part],
                "position_ids": position_ids[:, part],
                "logits_to_keep": torch.arange(size, device=device),
            }
            call = decoder.graphs.decode if size == 1 else decoder.graphs.prefill
            outputs.append(decoder.call(call, arguments, cache))
            begin += size
        logits.append(torch.cat(outputs, dim=1)[mask.bool()])
    difference = _difference(*logits)
    if difference is not None:
        raise CacheError(
            f"{type(decoder.model).__name__} cannot go on from a cache: it gives other logits for {TRIAL_LENGTH} tokens in "
            f"pieces than at once (they differ by {difference:.1e} of their size), so something besides attention mixes "
            "tokens, or it does not take its positions from position_ids"
        )


def _difference(expected: Tensor, found: Tensor) -> float | None:
    """How much logits differ, of their size; None where it is no more than rounding."""
    exact = expected.double()
    difference = float((exact - found.double()).norm() / exact.norm().clamp(min=1e-30))
    return None if difference <= TOLERANCES.get(expected.dtype, 0.05) else difference


@torch.no_grad()
def check_alone(model: nn.Module, vocabulary: int) -> None:
    """Runs two rows of a few tokens, then one of them alone, and then their first tokens alone.

    The graphs are those of several rows and tokens, and sizes of one are special to a model that asks for them.

    Raises:
        CacheError: the logits differ.
    """
    device = next(model.parameters()).device
    ids = torch.stack([torch.arange(TRIAL_LENGTH, device=device), torch.arange(1, TRIAL_LENGTH + 1, device=device)])
    ids %= vocabulary
    options = {"use_cache": False} if takes_use_cache(model) else {}

    def logits(part: Tensor) -> Tensor:
        positions = torch.arange(part.size(1), device=device).expand(part.size(0), -1).contiguous()
        given = {"input_ids": part, "attention_mask": torch.ones_like(part), "position_ids": positions}
        return logits_of(model(**given, **options))

    together = logits(ids)
    for what, alone, part in (
        ("a row", logits(ids[:1].contiguous()), together[:1]),
        ("a token", logits(ids[:, :1].contiguous()), together[:, :1]),
    ):
        difference = _difference(part, alone)
        if difference is not None:
            raise CacheError(
                f"{type(model).__name__} cannot go on from a cache: it gives {what} alone other logits than among others (they "
                f"differ by {difference:.1e} of their size), so it does different things for sizes of one"
            )


@torch.no_grad()
def takes_indices_as_positions(model: nn.Module, vocabulary: int) -> bool:
    """Whether the model itself, given no positions, takes the places of tokens, padding included."""
    device = next(model.parameters()).device
    ids = (torch.arange(TRIAL_LENGTH, device=device) % vocabulary).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        **({"use_cache": False} if takes_use_cache(model) else {}),
    }
    places = torch.arange(TRIAL_LENGTH, device=device).expand(2, -1)
    try:
        own = logits_of(model(**given))
    except TypeError:  # position_ids is not optional
        return False
    by_place = logits_of(model(**given, position_ids=places))
    own, by_place = (t[mask.bool()].double() for t in (own, by_place))
    return bool((own - by_place).norm() <= 1e-3 * own.norm())
