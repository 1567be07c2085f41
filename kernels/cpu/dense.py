"""Ranges that are dense in blocks, on the CPU: torch's own fused kernel computes each block.

What a model's masks leave visible is often dense: one causal block of all keys, of a row without its padding, of each packed
document, or a block that all its queries see. There is nothing to skip within one, and torch's kernel
(`_scaled_dot_product_flash_attention_for_cpu`), one loop in C++, takes 0.65 to 0.75 of the time of the tiles of
`rewriter.kernels.cpu.attention`, which are driven from Python. As with `fused_tiles`, the logits must be
a product with a scale, and a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from rewriter.kernels.cpu.attention import Logits
from rewriter.kernels.cpu.attention import compute_dtype
from rewriter.kernels.cpu.attention import in_compute_dtype
from rewriter.kernels.cpu.remembered import Remembered
from torch import Tensor

MIN_ROWS = 32
"""Query rows that the blocks must have in the mean: each is a call of some 20 microseconds."""


@dataclass(frozen=True)
class Block:
    """Neighbouring keys that neighbouring query rows see, each all of them, or those up to its own place.

    Attributes:
        rows, keys: begin and end of each; where it is causal, the first row sees the first key alone, the second two, and rows
            beyond the keys all.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    is_causal: bool


def forward(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, sinks: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor] | None:
    """As `rewriter.kernels.cpu.attention.forward`; None where the ranges are not dense blocks, or there are sinks."""
    parts = _parts(query, key, start, end, sinks, logits)
    if parts is None:
        return None
    num_batch, num_heads, num_queries, _ = query.shape
    whole = ((0, num_queries), (0, key.size(2)))
    if len(parts) == 1 and (parts[0][1].rows, parts[0][1].keys) == whole and parts[0][0] == slice(0, num_batch):
        output, lse = _attend(query, key, value, parts[0][1], logits.scale)
        return output.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    # Heads innermost, here as above: what follows an attention is their concatenation, which then copies nothing.
    output = query.new_zeros(num_batch, num_queries, num_heads, value.size(3)).transpose(1, 2)
    lse = torch.full((num_batch, num_heads, num_queries), -math.inf, dtype=compute_dtype(query))
    for batch, block in parts:
        rows, keys = slice(*block.rows), slice(*block.keys)
        output[batch, :, rows], lse[batch, :, rows] = _attend(
            query[batch, :, rows], key[batch, :, keys], value[batch, :, keys], block, logits.scale
        )
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    sinks: Tensor | None,
    logits: Logits,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of query, key and value; None as `forward`. None may reach the log-sum-exp."""
    parts = _parts(query, key, start, end, sinks, logits)
    if parts is None:
        return None
    group = query.size(1) // key.size(1)
    grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    for batch, block in parts:
        rows, keys = (batch, slice(None), slice(*block.rows)), (batch, slice(None), slice(*block.keys))
        given = [in_compute_dtype(t) for t in (grad_output[rows], query[rows], key[keys], value[keys], output[rows])]
        if group > 1:  # which the kernel's backward does not know
            given[2:4] = [t.repeat_interleave(group, dim=1) for t in given[2:4]]
        own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            given[0].contiguous(), *given[1:], lse[rows], 0.0, block.is_causal, scale=logits.scale
        )
        for total, part, place in zip(grads, own, (rows, keys, keys), strict=True):
            if place is keys and group > 1:
                part = part.unflatten(1, (-1, group)).sum(dim=2)
            total[place] = part
    return grads  # type: ignore[return-value]


def _attend(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    inputs = (in_compute_dtype(t) for t in (query, key, value))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, block.is_causal, scale=scale)
    return output.to(query.dtype), lse


Parts = list[tuple[slice, Block]]
"""The blocks of each batch row; of all at once where the rows are alike."""

_KNOWN: Remembered[tuple[Parts | None]] = Remembered()


def _parts(
    query: Tensor, key: Tensor, start: Tensor, end: Tensor, sinks: Tensor | None, logits: Logits
) -> Parts | None:
    index = logits.query_index
    if sinks is not None or max(start.size(1), end.size(1), index.size(0)) > 1:
        return None
    sizes, ranges = (query.size(0), MIN_ROWS), (start, end, index)
    known = _KNOWN.find(sizes, ranges)
    if known is None:
        known = (_find_parts(query.size(0), start, end, index[0]),)
        _KNOWN.keep(sizes, ranges, known)
    return known[0]


def _find_parts(num_batch: int, start: Tensor, end: Tensor, query_index: Tensor) -> Parts | None:
    first = start.size(2) - query_index.numel()
    if not _is_range(query_index, first):
        return None
    starts, ends = (t[:, 0].expand(max(start.size(0), end.size(0)), -1) for t in (start, end))
    if bool((starts == starts[:1]).all()) and bool((ends == ends[:1]).all()):
        own = dense_blocks(starts[0], ends[0], first)
        return None if own is None else [(slice(0, num_batch), block) for block in own]
    parts: Parts = []
    for row, (row_start, row_end) in enumerate(zip(starts, ends, strict=True)):
        own = dense_blocks(row_start, row_end, first)
        if own is None:
            return None
        parts += [(slice(row, row + 1), block) for block in own]
    return parts


def _is_range(index: Tensor, first: int) -> bool:
    return torch.equal(index, torch.arange(first, first + index.numel(), dtype=index.dtype))


def dense_blocks(start: Tensor, end: Tensor, first: int) -> list[Block] | None:
    """The blocks that a row's ranges are, in order, and None where they are anything else, or are many small blocks.

    Args:
        start, end: int32 `[K]`; the queries are the indices `first .. K - 1`.
    """
    # In NumPy: a dozen operations on short vectors take a tenth of torch's time, and each attention asks anew.
    num_keys = start.numel()
    starts, ends = np.maximum(start.numpy(), first), np.minimum(end.numpy(), num_keys)
    (keys,) = (ends > starts).nonzero()
    if not keys.size:
        return []
    starts, ends = starts[keys], ends[keys]
    is_causal = bool((starts == keys).all())
    changes = ends[1:] != ends[:-1]
    if not is_causal:
        changes |= starts[1:] != starts[:-1]
    borders = [0, *(changes.nonzero()[0] + 1).tolist(), keys.size]
    if (len(borders) - 1) * MIN_ROWS > max(MIN_ROWS, num_keys - first):
        return None
    blocks: list[Block] = []
    for begin, last in zip(borders[:-1], (border - 1 for border in borders[1:]), strict=True):
        block = Block(
            (int(starts[begin]) - first, int(ends[begin]) - first), (int(keys[begin]), int(keys[last]) + 1), is_causal
        )
        if block.keys[1] - block.keys[0] != last - begin + 1:
            return None  # keys in between that nothing sees, or that others see
        if blocks and blocks[-1].rows[1] > block.rows[0]:
            return None  # a row in two blocks
        blocks.append(block)
    return blocks
