"""Tiles of the schedule, each computed by torch's own fused kernel with a mask of that tile's rows and keys.

`rewriter.kernels.cpu.attention` computes a tile in some 25 operations, each a call from Python; this one in one call of
`_scaled_dot_product_flash_attention_for_cpu`, or of its backward, beside the gathering of keys. The kernel takes a scale and an
additive mask: whatever else the logits have, a softcap, a bias or ALiBi, is left to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rewriter.kernels.cpu.attention import Logits
from rewriter.kernels.cpu.attention import compute_dtype
from rewriter.kernels.cpu.attention import in_compute_dtype
from rewriter.kernels.cpu.remembered import Remembered
from rewriter.kernels.cpu.schedule import Tile
from rewriter.kernels.cpu.schedule import fused_tile_rows
from rewriter.kernels.cpu.schedule import tiles
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A tile of some batch rows and KV heads.

    Attributes:
        keys: neighbouring ones as a slice, others by number, int64 `[N]`.
        mask: `[T, N]`, 0 or -inf, added to the logits.
        sees_nothing: bool `[T]`, rows without a key; None where there is none.
    """

    batch: slice
    heads: slice
    rows: slice
    keys: slice | Tensor
    mask: Tensor
    sees_nothing: Tensor | None

    def of_keys(self, tensor: Tensor) -> Tensor:
        """`[B, Hkv, K, D]` -> the piece's `[b, h, N, D]`."""
        part = tensor[self.batch, self.heads]
        part = part[:, :, self.keys] if isinstance(self.keys, slice) else part.index_select(2, self.keys)
        return in_compute_dtype(part)

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Adds `[b, h, N, D]` to the piece's keys; they are distinct."""
        target = total[self.batch, self.heads]
        if isinstance(self.keys, slice):
            target[:, :, self.keys] += part
        else:
            target.index_add_(2, self.keys, part.to(total.dtype))


def applies(key: Tensor, value: Tensor, logits: Logits) -> bool:
    """Whether the logits are a product with a scale, and a mask."""
    plain = logits.bias is None and logits.alibi_slopes is None and not logits.softcap
    return plain and key.size(3) == value.size(3)


def forward(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, sinks: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor]:
    """As `rewriter.kernels.cpu.attention.forward`, where it `applies`."""
    dtype = compute_dtype(query)
    num_batch, num_heads, num_queries, head_dim = query.shape
    group = num_heads // key.size(1)
    # Heads innermost: what follows an attention is their concatenation, which then copies nothing.
    output = query.new_zeros(num_batch, num_queries, num_heads, head_dim).transpose(1, 2)
    lse = torch.full((num_batch, num_heads, num_queries), -math.inf, dtype=dtype)
    for piece in _pieces(query, key, start, end, logits):
        heads = slice(piece.heads.start * group, piece.heads.stop * group)
        rows = (piece.batch, heads, piece.rows)
        own, own_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            in_compute_dtype(query[rows]),
            piece.of_keys(key),
            piece.of_keys(value),
            0.0,
            False,
            attn_mask=piece.mask[None, None],
            scale=logits.scale,
        )
        if piece.sees_nothing is not None:
            own = own.masked_fill(piece.sees_nothing[:, None], 0)
            own_lse = own_lse.masked_fill(piece.sees_nothing, -math.inf)
        output[rows], lse[rows] = own, own_lse
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(dtype).contiguous()[:, None])
        output.mul_(torch.exp(lse - with_sinks)[..., None])
        lse = with_sinks
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, where it `applies`, there are no sinks, and none reaches the log-sum-exp."""
    num_kv_heads = key.size(1)
    group = query.size(1) // num_kv_heads
    dtype = compute_dtype(query)
    finite_lse = lse.masked_fill(lse == -math.inf, 0)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = torch.zeros(key.shape, dtype=dtype), torch.zeros(value.shape, dtype=dtype)

    def folded(tensor: Tensor, piece: Piece) -> Tensor:
        """`[B, Hq, Q, ...]` -> `[b, h, G * T, ...]`: the kernel's backward knows no grouped heads."""
        part = tensor.unflatten(1, (num_kv_heads, group))[piece.batch, piece.heads, :, piece.rows]
        return part.reshape(*part.shape[:2], -1, *part.shape[4:]).to(dtype)

    for piece in _pieces(query, key, start, end, logits):
        own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            folded(grad_output, piece),
            folded(query, piece),
            piece.of_keys(key),
            piece.of_keys(value),
            folded(output, piece),
            folded(finite_lse, piece),
            0.0,
            False,
            attn_mask=piece.mask.repeat(group, 1)[None, None],
            scale=logits.scale,
        )
        rows = slice(piece.heads.start * group, piece.heads.stop * group)
        target = grad_query[piece.batch, rows, piece.rows]
        target.copy_(own[0].reshape(target.shape))
        piece.add_to(grad_key, own[1])
        piece.add_to(grad_value, own[2])
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


MAX_REMEMBERED = 2**23
"""Numbers in the masks of the pieces of a call that are remembered: 32 MiB in fp32, a window of 256 up to 16,384 tokens."""

_KNOWN: Remembered[list[Piece]] = Remembered()


def _pieces(query: Tensor, key: Tensor, start: Tensor, end: Tensor, logits: Logits) -> Iterator[Piece]:
    """All tiles with keys; batch rows and heads that share their ranges come together."""
    rows = fused_tile_rows(query.size(1) // key.size(1), query.size(2), shared=max(start.size(1), end.size(1)) == 1)
    sizes, ranges = (query.shape[:3], key.size(1), compute_dtype(query), rows), (start, end, logits.query_index)
    known = _KNOWN.find(sizes, ranges)
    if known is not None:
        yield from known
        return
    made: list[Piece] = []
    numbers = 0
    for piece in _make_pieces(query, key, start, end, logits, rows):
        numbers += piece.mask.numel()
        if numbers <= MAX_REMEMBERED:
            made.append(piece)
        else:
            made.clear()
        yield piece
    if numbers <= MAX_REMEMBERED:
        _KNOWN.keep(sizes, ranges, made)


def _make_pieces(query: Tensor, key: Tensor, start: Tensor, end: Tensor, logits: Logits, rows: int) -> Iterator[Piece]:
    num_batch, num_kv_heads = key.shape[:2]
    range_batch = max(start.size(0), end.size(0), logits.query_index.size(0))
    range_heads = max(start.size(1), end.size(1))
    start, end = (t.expand(range_batch, range_heads, -1) for t in (start, end))
    for b in range(range_batch):
        batch = slice(0, num_batch) if range_batch == 1 else slice(b, b + 1)
        query_index = logits.query_index[min(b, logits.query_index.size(0) - 1)]
        for h in range(range_heads):
            heads = slice(0, num_kv_heads) if range_heads == 1 else slice(h, h + 1)
            for tile in tiles(start[b, h], end[b, h], query_index, rows):
                if tile.num_keys:
                    yield _piece(batch, heads, tile, start[b, h], end[b, h], query_index, compute_dtype(query))


def _piece(
    batch: slice, heads: slice, tile: Tile, start: Tensor, end: Tensor, query_index: Tensor, dtype: torch.dtype
) -> Piece:
    rows = slice(tile.row_begin, tile.row_end)
    index = query_index[rows, None]
    gathered, num_full = tile.keys, tile.num_full
    if tile.run_end > tile.run_begin:
        gathered = torch.cat((torch.arange(tile.run_begin, tile.run_end), gathered))
        num_full += tile.run_end - tile.run_begin
    low, high = (int(bound) for bound in gathered.aminmax())
    keys: slice | Tensor = gathered
    if high - low + 1 == gathered.numel():
        keys, num_full = slice(low, high + 1), 0 if num_full < gathered.numel() else num_full
    masked = keys if isinstance(keys, slice) else keys[num_full:]
    mask = torch.zeros(rows.stop - rows.start, gathered.numel(), dtype=dtype)
    sees_nothing = None
    if num_full < gathered.numel():
        hidden = (start[masked] > index) | (index >= end[masked])
        mask[:, num_full:].masked_fill_(hidden, -math.inf)
        if not tile.num_full and tile.run_end == tile.run_begin:
            sees_nothing = hidden.all(dim=1)
            sees_nothing = sees_nothing if bool(sees_nothing.any()) else None
    return Piece(batch, heads, rows, keys, mask, sees_nothing)
