"""Live-range attention on the CPU by PyTorch's operators, forward and backward, tile by tile: where `native` has no compiler.

    query `[B, Hq, Q, D]`, key `[B, Hkv, K, D]`, value `[B, Hkv, K, Dv]`, start and end int32 `[B|1, Hkv|1, K]`

For each tile of the schedule the live keys are gathered, the query heads of a group are stacked into one matrix, and
matrix products do the work; a tile with more than `BLOCK` keys is folded in by the online softmax. Logits are kept in
base 2 (torch's vectorised `exp2_` takes a fifth of the time of `exp_` on a 512 x 640 tile). Everything is accumulated
in fp32 (fp64 for fp64 inputs), in an order that depends on shapes and ranges alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.arguments import as_int32
from rewriter.kernels.cpu.schedule import Tile
from rewriter.kernels.cpu.schedule import tile_rows
from rewriter.kernels.cpu.schedule import tiles
from torch import Tensor

BLOCK = 1024
"""Keys of one matrix product: logits of 512 rows fit the second-level cache."""

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Logits:
    """What turns `q @ k` into logits, besides the live ranges. Index tensors are int32 and always given.

    Attributes:
        query_index: `[B|1, Q]`.
        key_index: `[B|1, K]`.
        bias: `[B|1, Hkv|1, K]`, or None.
        alibi_slopes: `[Hq]`, or None.
        scale: factor of the products.
        softcap: `softcap * tanh(logit / softcap)` before bias and mask; 0 for none.
    """

    query_index: Tensor
    key_index: Tensor
    bias: Tensor | None
    alibi_slopes: Tensor | None
    scale: float
    softcap: float

    @classmethod
    def of(cls, arguments: AttentionArguments) -> Logits:
        a = arguments
        num_queries, num_keys = a.query.size(2), a.key.size(2)
        query_index, key_index = a.query_index, a.key_index
        if query_index is None:
            query_index = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32)
        if key_index is None:
            key_index = torch.arange(num_keys, dtype=torch.int32)
        return cls(
            query_index=_rows(query_index),
            key_index=_rows(key_index),
            bias=a.bias,
            alibi_slopes=a.alibi_slopes,
            scale=1 / math.sqrt(a.query.size(3)) if a.scale is None else a.scale,
            softcap=a.softcap or 0.0,
        )


def _rows(index: Tensor) -> Tensor:
    """int32 `[B|1, size]`."""
    return as_int32(index)[None] if index.dim() == 1 else as_int32(index)


@dataclass(frozen=True)
class Visit:
    """A tile, for one batch row and some KV heads that share its live ranges."""

    batch: int
    heads: slice
    start: Tensor
    end: Tensor
    tile: Tile


@dataclass(frozen=True)
class Block:
    """Up to `BLOCK` keys of a tile; the last `num_masked` of them are not seen by every row."""

    keys: Tensor | slice
    num_masked: int


def _visits(query: Tensor, key: Tensor, start: Tensor, end: Tensor, logits: Logits) -> Iterator[Visit]:
    """All tiles of all rows and heads; heads that share their ranges come together in one batched product."""
    num_batch, num_heads, num_queries = query.shape[:3]
    num_kv_heads = key.size(1)
    range_heads = max(start.size(1), end.size(1))
    rows = tile_rows(num_heads // num_kv_heads, num_queries, shared=range_heads == 1)
    range_batch = max(start.size(0), end.size(0), logits.query_index.size(0))
    together = max(1, 2048 // (rows * (num_heads // num_kv_heads)))
    start, end = (t.expand(range_batch, range_heads, -1) for t in (start, end))
    for b in range(range_batch):
        batches = range(num_batch) if range_batch == 1 else (b,)
        query_index = logits.query_index[min(b, logits.query_index.size(0) - 1)]
        for h in range(range_heads):
            heads = (
                [slice(i, min(i + together, num_kv_heads)) for i in range(0, num_kv_heads, together)]
                if range_heads == 1
                else [slice(h, h + 1)]
            )
            for tile in tiles(start[b, h], end[b, h], query_index, rows):
                for batch in batches:
                    for part in heads:
                        yield Visit(batch, part, start[b, h], end[b, h], tile)


def _blocks(tile: Tile) -> Iterator[Block]:
    num_gathered = tile.keys.numel()
    for first in range(tile.run_begin, tile.run_end, BLOCK):
        yield Block(slice(first, min(first + BLOCK, tile.run_end)), 0)
    for first in range(0, num_gathered, BLOCK):
        last = min(first + BLOCK, num_gathered)
        yield Block(tile.keys[first:last], max(0, last - max(first, tile.num_full)))


class _TileMath:
    """The matrix form of one visit: query heads of a group and rows of a tile are one dimension, `M = G * T`."""

    def __init__(self, visit: Visit, group: int, dtype: torch.dtype, logits: Logits) -> None:
        self.visit, self.group, self.dtype, self.logits = visit, group, dtype, logits
        self.rows = slice(visit.tile.row_begin, visit.tile.row_end)
        self.query_heads = slice(visit.heads.start * group, visit.heads.stop * group)
        self.num_kv_heads = visit.heads.stop - visit.heads.start
        self.num_rows = self.rows.stop - self.rows.start
        # Products come out in base 2, or divided by the softcap.
        self.query_factor = logits.scale / logits.softcap if logits.softcap else logits.scale * LOG2E

    def stacked(self, tensor: Tensor) -> Tensor:
        """`[B, Hq, Q, D]` -> this tile's `[C, M, D]`."""
        part = tensor[self.visit.batch, self.query_heads, self.rows].to(self.dtype)
        return part.reshape(self.num_kv_heads, self.group * self.num_rows, -1)

    def unstacked(self, tensor: Tensor) -> Tensor:
        """`[C, M, ...]` -> `[C * G, T, ...]`."""
        return tensor.reshape(self.num_kv_heads * self.group, self.num_rows, *tensor.shape[2:])

    def gathered(self, tensor: Tensor, block: Block) -> Tensor:
        """`[B, Hkv, K, D]` -> the block's `[C, N, D]`."""
        part = tensor[self.visit.batch, self.visit.heads]
        part = part[:, block.keys] if isinstance(block.keys, slice) else part.index_select(1, block.keys)
        return part.to(self.dtype)

    def block_logits(
        self, scaled_query: Tensor, key: Tensor, block: Block, row_term: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Masked logits in base 2 `[C, M, N]`, less `row_term` `[C, M, 1]`; and the tanh of a softcap, for its gradient."""
        tanh = None
        if self.logits.softcap:
            torch.bmm(scaled_query, key.transpose(1, 2), out=out)
            tanh = out.tanh()
            torch.mul(tanh, self.logits.softcap * LOG2E, out=out)
            if row_term is not None:
                out -= row_term
        elif row_term is not None:
            torch.baddbmm(-row_term, scaled_query, key.transpose(1, 2), out=out)
        else:
            torch.bmm(scaled_query, key.transpose(1, 2), out=out)
        self._add_terms(out.view(self.num_kv_heads, self.group, self.num_rows, -1), block)
        return out, tanh

    def _add_terms(self, out: Tensor, block: Block) -> None:
        """Bias, ALiBi and mask, in place on `[C, G, T, N]`."""
        batch = self.visit.batch
        if self.logits.bias is not None:
            bias = _select(self.logits.bias, batch)
            bias = bias[self.visit.heads] if bias.size(0) > 1 else bias
            out += (bias[:, block.keys].to(self.dtype) * LOG2E)[:, None, None, :]
        query_index = _select(self.logits.query_index, batch)[self.rows]
        if self.logits.alibi_slopes is not None:
            key_index = _select(self.logits.key_index, batch)[block.keys]
            distance = (query_index[:, None] - key_index).abs().to(self.dtype)
            slopes = self.logits.alibi_slopes[self.query_heads].to(self.dtype).view(self.num_kv_heads, -1, 1, 1)
            out -= slopes * LOG2E * distance
        if block.num_masked:
            assert isinstance(block.keys, Tensor)
            keys = block.keys[-block.num_masked :]
            query_index = query_index[:, None]
            hidden = (self.visit.start[keys] > query_index) | (query_index >= self.visit.end[keys])
            # Added, not filled in: a broadcast masked_fill_ takes four times as long.
            out[..., -block.num_masked :] += torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -math.inf)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    sinks: Tensor | None,
    logits: Logits,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Q, Dv]` in the query's dtype and log-sum-exp `[B, Hq, Q]` in fp32 (fp64 for fp64)."""
    dtype = compute_dtype(query)
    num_batch, num_heads, num_queries, _ = query.shape
    lowest = torch.finfo(dtype).min
    group = num_heads // key.size(1)
    # Heads innermost: what follows an attention is their concatenation, which then copies nothing.
    output = query.new_empty(num_batch, num_queries, num_heads, value.size(3)).transpose(1, 2)
    lse = torch.empty((num_batch, num_heads, num_queries), dtype=dtype)
    scratch = _Scratch(dtype)
    for visit in _visits(query, key, start, end, logits):
        math_ = _TileMath(visit, group, dtype, logits)
        scaled_query = math_.stacked(query) * math_.query_factor
        shape = scaled_query.shape[:2]
        # Of the first block; later ones are folded in.
        maximum: Tensor | None = None
        total = accumulated = torch.empty(0)
        for block in _blocks(visit.tile):
            block_key = math_.gathered(key, block)
            p, _ = math_.block_logits(
                scaled_query, block_key, block, None, scratch.take("logits", (*shape, block_key.size(1)))
            )
            block_max = p.amax(dim=-1, keepdim=True)
            previous, maximum = maximum, block_max if maximum is None else torch.maximum(maximum, block_max)
            # A row that has seen no key yet has a maximum of -inf, which must not be subtracted from -inf.
            shift = maximum.clamp(min=lowest)
            p.sub_(shift).exp2_()
            block_total = p.sum(dim=-1, keepdim=True)
            block_value = math_.gathered(value, block)
            if previous is None:
                total, accumulated = block_total, torch.bmm(p, block_value)
            else:
                decay = torch.exp2(previous - shift)
                total = total * decay + block_total
                accumulated = torch.baddbmm(accumulated * decay, p, block_value)
        if maximum is None:
            maximum = scaled_query.new_full((*shape, 1), -math.inf)
            total = torch.zeros_like(maximum)
            accumulated = scaled_query.new_zeros(*shape, value.size(3))
        tile_lse = maximum + total.log2()
        if sinks is not None:
            sink = sinks[math_.query_heads].to(dtype)[:, None].expand(-1, math_.num_rows).reshape(*shape, 1) * LOG2E
            tile_lse = torch.logaddexp2(tile_lse, sink)
        weight = torch.exp2(maximum - tile_lse.clamp(min=lowest))
        output[visit.batch, math_.query_heads, math_.rows] = math_.unstacked(accumulated * weight).to(query.dtype)
        lse[visit.batch, math_.query_heads, math_.rows] = math_.unstacked(tile_lse / LOG2E).squeeze(-1)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias and sinks (None where there is none), in the dtypes of the inputs."""
    dtype = compute_dtype(query)
    group = query.size(1) // key.size(1)
    # d logits = p * (dp - delta), where delta also carries the gradient that reaches the log-sum-exp.
    delta = (grad_output.to(dtype) * output.to(dtype)).sum(dim=-1) - grad_lse.to(dtype)
    # The gradient of a log-sum-exp of -inf may be anything, NaN too; nothing depends on it.
    delta.masked_fill_(lse == -math.inf, 0)
    finite_lse = lse.masked_fill(lse == -math.inf, 0)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=dtype)
    grad_value = torch.zeros(value.shape, dtype=dtype)
    grad_bias = None if logits.bias is None else torch.zeros(key.shape[:3], dtype=dtype)
    scratch = _Scratch(dtype)
    for visit in _visits(query, key, start, end, logits):
        math_ = _TileMath(visit, group, dtype, logits)
        scaled_query = math_.stacked(query) * math_.query_factor
        tile_grad = math_.stacked(grad_output)
        row_lse = math_.stacked(finite_lse[..., None]) * LOG2E
        row_delta = math_.stacked(delta[..., None])
        tile_grad_query = torch.zeros_like(scaled_query)
        for block in _blocks(visit.tile):
            block_key, block_value = math_.gathered(key, block), math_.gathered(value, block)
            shape = (*scaled_query.shape[:2], block_key.size(1))
            p, tanh = math_.block_logits(scaled_query, block_key, block, row_lse, scratch.take("logits", shape))
            p.exp2_()
            _add_rows(grad_value, visit, block, torch.bmm(p.transpose(1, 2), tile_grad))
            ds = scratch.take("grad", shape)
            torch.baddbmm(-row_delta, tile_grad, block_value.transpose(1, 2), out=ds)
            ds.mul_(p)
            if grad_bias is not None:
                _add_rows(grad_bias, visit, block, ds.sum(dim=1))
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1))
            tile_grad_query.baddbmm_(ds, block_key, alpha=logits.scale)
            _add_rows(grad_key, visit, block, torch.bmm(ds.transpose(1, 2), scaled_query))
        grad_query[visit.batch, math_.query_heads, math_.rows] = math_.unstacked(tile_grad_query).to(query.dtype)
    # The products above took the query with its factor; what is left of the scale is one constant.
    grad_key.mul_(logits.softcap if logits.softcap else 1 / LOG2E)
    if grad_bias is not None:
        assert logits.bias is not None
        grad_bias = grad_bias.sum_to_size(logits.bias.shape).to(logits.bias.dtype)
    grad_sinks = None
    if sinks is not None:
        weight = torch.exp(sinks.to(dtype)[:, None] - lse)
        grad_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias, grad_sinks


def compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _add_rows(total: Tensor, visit: Visit, block: Block, part: Tensor) -> None:
    """Adds `[C, N, ...]` to the block's keys of `[B, Hkv, K, ...]`; the keys of a block are distinct."""
    target = total[visit.batch, visit.heads]
    if isinstance(block.keys, slice):
        target[:, block.keys] += part
    else:
        target.index_add_(1, block.keys, part)


def _select(tensor: Tensor, batch: int) -> Tensor:
    return tensor[batch if tensor.size(0) > 1 else 0]


class _Scratch:
    """Named work arrays that live for one call: fresh ones of this size would be mapped and faulted in for each tile."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.arrays: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if name not in self.arrays or self.arrays[name].numel() < size:
            self.arrays[name] = torch.empty(size, dtype=self.dtype)
        return self.arrays[name][:size].view(shape)
