"""Attention under a mask that is data, such as one that the caller gives: over live ranges where its columns are ranges.

What such a mask is, no proof can say before the call. One pass over it does, once a call: where each column is one run of rows,
`live_range_attention` computes the same and skips what is dead; elsewhere it is torch's dense attention under the mask itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rewriter.kernels.dense import masked_attention
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.live_ranges import LiveRanges
from rewriter.kernels.reference import per_query_head
from torch import Tensor

HIDDEN = -1e4
"""What is added to a logit hides its key from here on."""

ROWS = 512
"""Rows of a mask that are looked at together."""

SHOWN, RANGES, ADDED = range(3)
"""What a mask was found to be: neither of the next two; ranges; what the call adds, which may be added as it is."""


@torch.library.custom_op("rewriter::mask_ranges", mutates_args=())
def mask_ranges(
    mask: Tensor | None, added: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The live range of each column of a mask, and whether they are all of the mask; waits for the answer.

    Args:
        mask: bool `[B, H, Q, K]`, true where visible; None for all. One of the two is given.
        added: what is added to the logits besides, `[B, H, Q, K]`.
        dtype: of the query.

    Returns:
        start, end, int32 `[B, H, K]`, of rows aligned to the bottom right: the first and the last that see a key; int32 `[]`, on
        the CPU, where each layer asks for it, the form: `RANGES` where all rows between them see it, too, and each row has a key
        to which nothing is added, or is padding: the same number of at most -1e4 everywhere; `ADDED` where there is no `mask`, no
        row is padding, and `added` is of `dtype`; else `SHOWN`, and then, for dense attention, what is added, `[B, H, Q, K]`, of
        the wider of both dtypes, and bool `[B, H, Q, 1]`, the rows that see a key. These two are without values in the other
        forms.
    """
    given = _given(mask, added)
    wide = dtype if added is None else torch.promote_types(dtype, added.dtype)
    ranges = _column_runs(_visible(mask, added))
    if ranges is not None and (added is None or _hides_or_adds_nothing(mask, added)):
        form = RANGES
    elif mask is None and added is not None and added.dtype == dtype and not bool(_is_padding(mask, added).any()):
        form = ADDED
    else:
        return without_ranges(mask, added, dtype)
    if ranges is None:
        ranges = _no_ranges(given)
    shown = torch.empty(given.shape, dtype=wide, device=given.device)
    sees = torch.empty(*given.shape[:3], 1, dtype=torch.bool, device=given.device)
    return *ranges, torch.full((), form, dtype=torch.int32), shown, sees


def without_ranges(
    mask: Tensor | None, added: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `mask_ranges` returns for a mask that is no ranges; by torch's operators alone."""
    given = _given(mask, added)
    wide = dtype if added is None else torch.promote_types(dtype, added.dtype)
    form = torch.full((), SHOWN, dtype=torch.int32)
    return *_no_ranges(given), form, *_for_dense(mask, added, wide)


def _given(mask: Tensor | None, added: Tensor | None) -> Tensor:
    given = added if mask is None else mask
    if given is None:
        raise ValueError("a mask, what is added, or both must be given, got neither")
    return given


def _no_ranges(given: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.zeros(given.size(0), given.size(1), given.size(3), dtype=torch.int32, device=given.device)
    return none, none.clone()


def _visible(mask: Tensor | None, added: Tensor | None) -> Tensor:
    """bool `[B, H, Q, K]`: what neither hides."""
    if added is None:
        assert mask is not None
        return mask
    shows = added > HIDDEN
    return shows if mask is None else shows & mask


def _hides_or_adds_nothing(mask: Tensor | None, added: Tensor) -> bool:
    """Whether each row has a key to which 0 is added, beside which at most -1e4 hides, and nothing else; or is padding."""
    others = ((added != 0) & _visible(mask, added)).any()
    has_key = ((added == 0) if mask is None else mask & (added == 0)).any(dim=-1)
    return not bool(others) and bool((has_key | _is_padding(mask, added)).all())


def _is_padding(mask: Tensor | None, added: Tensor) -> Tensor:
    """bool `[B, H, Q]`: rows in which all that is not hidden by the mask has one number of at most -1e4 added."""
    above, below = (added, added) if mask is None else (torch.where(mask, added, end) for end in (-math.inf, math.inf))
    high = above.amax(dim=-1)
    return (high <= HIDDEN) & below.amin(dim=-1).ge(high)


def _for_dense(mask: Tensor | None, added: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What dense attention adds to the logits, and the rows that see a key; a row without one has 0 everywhere."""
    given = _given(mask, added)
    sees = torch.ones(*given.shape[:3], 1, dtype=torch.bool, device=given.device)
    if mask is not None:
        sees = mask.any(dim=-1, keepdim=True)
    if added is not None:
        sees = sees & ~_is_padding(mask, added)[..., None]
    values = torch.zeros((), dtype=dtype, device=given.device) if added is None else added.to(dtype)
    if mask is not None:
        values = torch.where(mask, values, -math.inf)
    return torch.where(sees, values, 0.0).to(dtype), sees


def _column_runs(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Start and end of the one run of rows in each column, None where a column has several; 0, 0 where it has none."""
    num_queries, num_keys = mask.shape[2:]
    begins = mask[:, :, :1].sum(dim=2, dtype=torch.int32)
    count = begins.clone()
    for first in range(1, num_queries, ROWS):
        rows, before = mask[:, :, first : first + ROWS], mask[:, :, first - 1 : first - 1 + ROWS]
        begins += (rows & ~before[:, :, : rows.size(2)]).sum(dim=2, dtype=torch.int32)
        count += rows.sum(dim=2, dtype=torch.int32)
        if mask.device.type == "cpu" and bool((begins > 1).any()):
            return None  # without a look at the rest; a GPU would be waited for at each part
    if bool((begins > 1).any()):
        return None
    offset = num_keys - num_queries
    start = mask.to(torch.uint8).argmax(dim=2).to(torch.int32)
    end = torch.where(start + count == num_queries, FOREVER, start + count + offset)
    return torch.where(count > 0, start + offset, 0), torch.where(count > 0, end, 0)


@mask_ranges.register_fake
def _(mask: Tensor | None, added: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _given(mask, added)
    start = given.new_empty(given.size(0), given.size(1), given.size(3), dtype=torch.int32)
    wide = dtype if added is None else torch.promote_types(dtype, added.dtype)
    form, shown = torch.empty((), dtype=torch.int32), given.new_empty(given.shape, dtype=wide)
    return start, torch.empty_like(start), form, shown, given.new_empty(*given.shape[:3], 1, dtype=torch.bool)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown: Tensor,
    sees: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """`[B, Hq, Q, Dv]` by torch's operators; a row that sees no key is 0. Arguments as of `attention_under_mask`; all rows see a
    key where `sees` is None."""
    group = query.size(1) // key.size(1)
    added = _with_bias(shown, bias, group)
    if softcap is None and sinks is None and added.dtype == query.dtype:
        rows = None if sees is None else per_query_head(sees, group)
        return masked_attention(query, key, value, added, rows, scale)
    weights, _, _, values = _weights(query, key, value, added, sinks, scale, softcap)
    return _zero_elsewhere((weights @ values).to(query.dtype), sees, group)


def _zero_elsewhere(rows: Tensor, sees: Tensor | None, group: int) -> Tensor:
    return rows if sees is None else rows.masked_fill(~per_query_head(sees, group), 0)


def _with_bias(shown: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """All that is added to the logits, `[B|1, Hq|1, Q, K]`."""
    added = per_query_head(shown, group)
    return added if bias is None else added + per_query_head(bias, group)[:, :, None]


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The softmax's weights, the derivative of the softcap, keys and values of each query head; with a sink, as a last key."""
    group = query.size(1) // key.size(1)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (t.repeat_interleave(group, dim=1).to(wide) for t in (key, value))
    logits = query.to(wide) @ keys.transpose(2, 3) * (1 / math.sqrt(query.size(3)) if scale is None else scale)
    slope = torch.ones((), dtype=wide, device=query.device)
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits, slope = softcap * tanh, 1 - tanh * tanh
    logits = logits + added
    if sinks is not None:
        logits = torch.cat((logits, sinks.to(wide)[:, None, None].expand(*logits.shape[:3], 1)), dim=3)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    return torch.softmax(logits, dim=-1), slope, keys, values


def dense_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown: Tensor,
    sees: Tensor | None,
    added: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, sinks and what is added of `dense_attention`: the weights are computed anew."""
    group, num_keys = query.size(1) // key.size(1), key.size(2)
    weights, slope, keys, values = _weights(query, key, value, _with_bias(shown, bias, group), sinks, scale, softcap)
    grad = _zero_elsewhere(grad, sees, group).to(weights.dtype)
    of_weights = grad @ values.transpose(2, 3)
    of_logits = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
    of_sinks = None if sinks is None else of_logits[..., num_keys].sum(dim=(0, 2)).to(sinks.dtype)
    of_logits = of_logits[..., :num_keys]
    of_bias = of_added = None
    if bias is not None:
        per_head = of_logits.sum(dim=2).unflatten(1, (key.size(1), group)).sum(dim=2)
        of_bias = per_head.sum_to_size(bias.shape).to(bias.dtype)
    if added is not None:
        per_head = of_logits.unflatten(1, (key.size(1), group)).sum(dim=2) if added.size(1) > 1 else of_logits
        of_added = per_head.sum_to_size(added.shape).to(added.dtype)
    of_products = of_logits * slope * (1 / math.sqrt(query.size(3)) if scale is None else scale)
    of_keys, of_values = (
        whole.unflatten(1, (key.size(1), group)).sum(dim=2)
        for whole in (
            of_products.transpose(2, 3) @ query.to(keys.dtype),
            weights[..., :num_keys].transpose(2, 3) @ grad,
        )
    )
    of_query = (of_products @ keys).to(query.dtype)
    return of_query, of_keys.to(key.dtype), of_values.to(value.dtype), of_bias, of_sinks, of_added


@torch.library.custom_op("rewriter::attention_under_mask", mutates_args=())
def attention_under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    form: Tensor,
    shown: Tensor,
    sees: Tensor,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention under a mask of which `mask_ranges` has found start, end, form, `shown` and `sees`.

    Args:
        query, key, value, bias, sinks, scale, softcap: as of `rewriter.kernels.live_range_attention`.
        added: what was given to `mask_ranges`, before it was expanded; for its gradient, which is dense, too.

    Returns:
        `[B, Hq, Q, Dv]`, and `[B, Hq, Q]` for the backward alone, the log-sum-exp, or 0 where it computes the weights anew.
    """
    if int(form) == RANGES:
        return torch.ops.rewriter.live_range_attention(
            query, key, value, start, end, None, None, bias, sinks, None, scale, softcap
        )
    shown, rows_that_see = _as_shown(form, shown, sees, added)
    output, lse = _dense(query, key, value, shown, rows_that_see, bias, sinks, scale, softcap)
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()  # heads innermost, as over live ranges


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown: Tensor,
    sees: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`dense_attention`, by torch's fused kernel for CPUs where that can, and what its backward needs."""
    if _is_fused(query, value, shown, bias, sinks, softcap):
        group = query.size(1) // key.size(1)
        output, lse = _FUSED(query, key, value, attn_mask=_with_bias(shown, None, group), scale=scale)
        return _zero_elsewhere(output, sees, group), lse
    output = dense_attention(query, key, value, shown, sees, bias, sinks, scale, softcap)
    return output, output.new_zeros(output.shape[:3], dtype=torch.float32)


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _is_fused(
    query: Tensor, value: Tensor, shown: Tensor, bias: Tensor | None, sinks: Tensor | None, softcap: float | None
) -> bool:
    """Whether torch's fused attention for CPUs computes a mask that is no ranges, and gradients but that of what is added."""
    plain = bias is None and sinks is None and softcap is None and shown.dtype == query.dtype
    known = query.dtype in (torch.float32, torch.bfloat16, torch.float16) and query.device.type == "cpu"
    return plain and known and query.size(3) == value.size(3)


def _as_shown(form: Tensor, shown: Tensor, sees: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What dense attention adds, and the rows that see a key; None for all."""
    if int(form) == SHOWN:
        return shown, sees
    assert added is not None
    return added.detach().expand(shown.shape), None


@attention_under_mask.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.rewriter.live_range_attention(query, key, value, *rest[:2])


@torch.library.custom_op("rewriter::attention_under_mask_backward", mutates_args=())
def _backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    form: Tensor,
    shown: Tensor,
    sees: Tensor,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    of_added: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows_that_see: Tensor | None
    if of_added and int(form) == RANGES:  # what is added was 0 where the ranges show a key
        rows = torch.arange(key.size(2) - query.size(2), key.size(2), dtype=torch.int32, device=key.device)
        shown, rows_that_see = _for_dense(LiveRanges(start, end).visible(rows), None, torch.float32)
    elif int(form) == RANGES:
        of_query, of_key, of_value, of_bias, of_sinks = torch.ops.rewriter.live_range_attention_backward(
            *(grad, torch.zeros_like(lse), query, key, value, output, lse),
            *(start, end, None, None, bias, sinks, None, scale, softcap),
        )
        return of_query, of_key, of_value, of_bias, of_sinks, query.new_empty(0)
    else:
        shown, rows_that_see = _as_shown(form, shown, sees, added)
    if not of_added and _is_fused(query, value, shown, bias, sinks, softcap):
        group, none = query.size(1) // key.size(1), query.new_empty(0)
        grad, mask = _zero_elsewhere(grad, rows_that_see, group), _with_bias(shown, None, group)
        fused = _FUSED_BACKWARD(grad, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scale)
        of_query, of_key, of_value = (t.contiguous() for t in fused)
        return of_query, of_key, of_value, none, none.clone(), none.clone()
    grads = dense_gradients(grad, query, key, value, shown, rows_that_see, added, bias, sinks, scale, softcap)
    if not of_added:
        grads = (*grads[:5], None)
    of_query, of_key, of_value, of_bias, of_sinks, own = (
        query.new_empty(0) if t is None else t.contiguous() for t in grads
    )
    return of_query, of_key, of_value, of_bias, of_sinks, own


@_backward.register_fake
def _backward_fake(grad: Tensor, output: Tensor, lse: Tensor, *inputs: Any) -> Any:
    given = dict(zip(_NAMES, inputs, strict=False))  # what has its default may be left out
    query = given["query"]
    of_added = given["added"] if inputs[-1] is True else None
    inputs = (*(given.get(name) for name in ("query", "key", "value", "bias", "sinks")), of_added)
    return tuple(
        query.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs
    )


_NAMES = (
    "query",
    "key",
    "value",
    "start",
    "end",
    "form",
    "shown",
    "sees",
    "added",
    "bias",
    "sinks",
    "scale",
    "softcap",
)
_ADDED = _NAMES.index("added")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = dict(zip(_NAMES, inputs, strict=True))
    ctx.tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    ctx.others = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    ctx.save_for_backward(*output, *(given[name] for name in ctx.tensors))


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    output, lse, *tensors = ctx.saved_tensors
    given = {**dict(zip(ctx.tensors, tensors, strict=True)), **ctx.others}
    of_added = len(ctx.needs_input_grad) > _ADDED and ctx.needs_input_grad[_ADDED]
    inputs = (grad, output, lse, *(given[name] for name in _NAMES), of_added)
    grads = torch.ops.rewriter.attention_under_mask_backward(*inputs)
    by_name = dict(zip(("query", "key", "value", "bias", "sinks", "added"), grads, strict=True))
    if not of_added:
        del by_name["added"]
    return tuple(by_name.get(name) if given[name] is not None else None for name in _NAMES)


attention_under_mask.register_autograd(_autograd, setup_context=_setup_context)
