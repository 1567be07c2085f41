"""The operators in plain ATen, for artifacts that run without this package: a CPU's AOTInductor package, an ONNX file.

`rewriter.kernels` has the same for a running process. Attention goes over tiles of query rows in one loop and gathers the keys
that a tile sees, so that nothing of the size rows x keys is made, and memory does not grow with the number of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.given_mask import dense_attention
from rewriter.kernels.given_mask import without_ranges
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.separator_cache import compute_ends
from rewriter.kernels.separator_cache import compute_split
from rewriter.kernels.topk import ordered_bits
from torch import Tensor
from torch.fx import GraphModule

TILE = 128
"""Query rows of a tile."""

MAX_KEYS = 2**20
"""Of a running top-k: the steps of its loop are fixed while a graph is traced for any length."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None = None,
    key_index: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rewriter::live_range_attention`: (output `[B, Hq, Q, Dv]`, log-sum-exp `[B, Hq, Q]`)."""
    assert key_index is None and alibi_slopes is None, "no pass emits these"
    if sinks is not None:
        without = attention(query, key, value, start, end, query_index, bias=bias, scale=scale, softcap=softcap)
        return with_sinks(*without, sinks)
    num_queries, num_keys = query.size(2), key.size(2)
    index = query_index
    if index is None:
        index = torch.arange(num_queries, device=query.device) + (num_keys - num_queries)
    index = index.view(-1).to(torch.int32)
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    if isinstance(num_queries, int) and num_queries == 1:
        return attend(query, key, value, start, end, index, bias, scale, softcap)

    def body(tile: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The last tile is filled with its last row, written again.
        rows = (tile * TILE + torch.arange(TILE, device=query.device)).clamp(max=num_queries - 1)
        own = _in_memory(index[rows])
        seen = ((start < end) & (start <= own.amax()) & (end > own.amin())).flatten(0, 1).any(dim=0)
        keys = seen.nonzero()[:, 0]
        count = keys.size(0)
        torch._check(count <= num_keys)
        # Two more, which nobody sees: sizes of 0 and 1 are special to compilers.
        keys = torch.cat((keys, keys.new_zeros(2)))
        valid = torch.arange(keys.size(0), device=query.device) < count
        part_start, part_end = _in_memory(start[:, :, keys]), _in_memory(torch.where(valid, end[:, :, keys], 0))
        part_bias = None if bias is None else _in_memory(bias[:, :, keys])
        result, part_lse = attend_tile(
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            part_start,
            part_end,
            own,
            part_bias,
            scale,
            softcap,
        )
        return tile + 1, output.index_copy(2, rows, result), lse.index_copy(2, rows, part_lse)

    num_tiles = (num_queries + TILE - 1) // TILE
    output = query.new_zeros(query.size(0), query.size(1), num_queries, value.size(3))
    lse = query.new_zeros(query.size(0), query.size(1), num_queries, dtype=torch.float32)
    first = torch.zeros((), dtype=torch.int64, device=query.device)
    _, output, lse = torch.while_loop(lambda tile, *_: tile < num_tiles, body, (first, output, lse))
    return output, lse


def _in_memory(t: Tensor) -> Tensor:
    """The same tensor: Inductor writes what `as_strided` is of, where it would gather a key's bounds anew for each row."""
    return t.as_strided(t.size(), t.stride())


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and its log-sum-exp, with a logit per query head `[Hq]` that joins the denominator."""
    total = torch.logaddexp(lse, sinks.float()[:, None])
    return (output * torch.exp(lse - total)[..., None]).to(output.dtype), total


def _visible(start: Tensor, end: Tensor, index: Tensor) -> Tensor:
    """bool `[B, H, Q, K]`: whether a row, of index `[Q]`, is in a key's live range."""
    rows = index[:, None]
    return (start[:, :, None] <= rows) & (rows < end[:, :, None])


def attend_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, by torch's fused kernel for CPUs where that can: it is a call of compiled code, not ops on all logits.

    In 16 bits its log-sum-exp is off by a hundred times what it is here.
    """
    fused = query.device.type == "cpu" and query.dtype == torch.float32 and query.size(3) == value.size(3)
    if softcap is not None or not fused:
        return attend(query, key, value, start, end, index, bias, scale, softcap)
    visible = _visible(start, end, index)
    shown = 0.0 if bias is None else bias[:, :, None].float()
    added = torch.where(visible, shown, -math.inf)
    group = query.size(1) // key.size(1)
    if group > 1:
        added, visible = (t.repeat_interleave(group, dim=1) if t.size(1) > 1 else t for t in (added, visible))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=added, scale=scale
    )
    sees = visible.any(dim=3)  # to a row without a key the kernel gives an output of 0, and a log-sum-exp of 0, too
    return output, torch.where(sees, lse, -math.inf)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """All rows against all keys.

    Args:
        index: int32 `[Q]`.
    """
    num_batch, num_heads, num_queries, _ = query.shape
    num_kv_heads = key.size(1)
    grouped = query.float().reshape(num_batch, num_kv_heads, num_heads // num_kv_heads * num_queries, query.size(3))
    logits = (grouped @ key.float().transpose(2, 3)) * scale
    logits = logits.unflatten(2, (num_heads // num_kv_heads, num_queries))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None].float()
    visible = _visible(start, end, index)
    logits = torch.where(visible[:, :, None], logits, -math.inf)
    highest = logits.amax(dim=4, keepdim=True)
    highest = torch.where(highest == -math.inf, 0.0, highest)
    weights = torch.exp(logits - highest)
    total = weights.sum(dim=4, keepdim=True)
    output = weights.flatten(2, 3) @ value.float() / torch.where(total == 0, 1.0, total).flatten(2, 3)
    lse = (torch.log(total) + highest)[..., 0]
    return output.reshape(num_batch, num_heads, num_queries, value.size(3)).to(query.dtype), lse.flatten(1, 2)


def key_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    group: str,
) -> Tensor:
    """As `rewriter::key_scores`."""
    assert query_index is not None and key_index is None and alibi_slopes is None, "no pass emits these"
    num_heads, head_dim = query.size(1), query.size(3)
    num_kv_heads = key.size(1)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    grouped = query.float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    logits = grouped @ key.float()[:, :, None].transpose(3, 4) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None].float()
    visible = _visible(start, end, query_index.view(-1))
    own = torch.where(lse == -math.inf, math.inf, lse).unflatten(1, (num_kv_heads, -1))
    weights = torch.where(visible[:, :, None], torch.exp(logits - own[..., None]), 0.0).sum(dim=3)
    if group == "mean":
        return weights.mean(dim=2)
    return weights.amax(dim=2) if group == "max" else weights.flatten(1, 2)


def running_topk_end(score: Tensor, keep: int, segment: Tensor | None = None) -> Tensor:
    """As `rewriter::running_topk_end`; the bits of its partition in one loop, where unrolled they compile for minutes."""
    rank = torch.nan_to_num(score.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if segment is not None:
        rank = (segment.long() << 32) + ordered_bits(rank)
    order = rank.expand(score.shape).flatten(0, 1).contiguous().argsort(dim=1, descending=True, stable=True)
    num_rows, num_keys = order.shape
    torch._check(
        num_keys <= MAX_KEYS, lambda: f"a portable running top-k takes at most {MAX_KEYS} keys, got {num_keys}"
    )
    prefix = torch.arange(num_keys, dtype=torch.int32, device=score.device).expand(num_rows, -1).contiguous()
    start = torch.zeros_like(prefix)

    def body(
        bit: Tensor, values: Tensor, first: Tensor, last: Tensor, wanted: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        ones = (values >> bit) & 1
        ones_before = torch.nn.functional.pad(ones.cumsum(dim=1, dtype=torch.int32), (1, 0))
        num_zeros = num_keys - ones_before[:, -1:]
        first_ones, last_ones = (ones_before.gather(1, bound.long()) for bound in (first, last))
        first_zeros, last_zeros = first - first_ones, last - last_ones
        zeros = last_zeros - first_zeros
        right = wanted >= zeros
        number = torch.arange(num_keys, dtype=torch.int32, device=values.device)
        before = ones_before[:, :-1]
        moved = torch.where(ones == 1, num_zeros + before, number - before)
        return (
            bit - 1,
            torch.zeros_like(values).scatter(1, moved.long(), values),
            torch.where(right, num_zeros + first_ones, first_zeros).to(torch.int32),
            torch.where(right, num_zeros + last_ones, last_zeros).to(torch.int32),
            torch.where(right, wanted - zeros, wanted).to(torch.int32),
            torch.where(right, answer + (1 << bit), answer).to(torch.int32),
        )

    bit = torch.full((), (MAX_KEYS - 1).bit_length() - 1, dtype=torch.int32, device=score.device)
    carried = (bit, order.to(torch.int32), start, prefix, torch.full_like(prefix, keep - 1), start.clone())
    answer = torch.while_loop(lambda bit, *_: bit >= 0, body, carried)[-1]
    # Place r of the order dies at the keep-th oldest of the r better keys, those before it.
    dies = torch.where(prefix >= keep, torch.maximum(answer, order.to(torch.int32)), FOREVER)
    return torch.zeros_like(dies).scatter(1, order, dies).view(score.shape)


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
    """As `rewriter::attention_under_mask`, always dense."""
    del start, end, form, added
    output = dense_attention(query, key, value, shown, sees, bias, sinks, scale, softcap)
    return output, output.new_zeros(output.shape[:3], dtype=torch.float32)


UNDER_A_MASK: dict[Any, Callable[..., Any]] = {
    torch.ops.rewriter.mask_ranges.default: without_ranges,
    torch.ops.rewriter.attention_under_mask.default: attention_under_mask,
}
"""For masks that are data: always dense, as a graph without this package does not ask whether they are ranges."""

PORTABLE: dict[Any, Callable[..., Any]] = {
    **UNDER_A_MASK,
    torch.ops.rewriter.live_range_attention.default: attention,
    torch.ops.rewriter.key_scores.default: key_scores,
    torch.ops.rewriter.running_topk_end.default: running_topk_end,
    torch.ops.rewriter.separator_cache_ends.default: compute_ends,
    torch.ops.rewriter.split_by_epoch.default: compute_split,
}


_NUM_READ = {"rewriter::live_range_attention": list(AttentionArguments.parameters()).index("schedule")}


def replace_operators(module: GraphModule, functions: Mapping[Any, Callable[..., Any]]) -> dict[str, int]:
    """Puts functions in the place of operators, in place; returns how many of each. Schedules, which no function reads, go."""
    counts: dict[str, int] = {}
    for part in module.modules():
        if not isinstance(part, GraphModule):
            continue
        for node in part.graph.nodes:
            if node.op == "call_function" and node.target in functions:
                name = str(node.target).removesuffix(".default").replace(".", "::")
                counts[name] = counts.get(name, 0) + 1
                node.target = functions[node.target]
                node.args = node.args[: _NUM_READ.get(name, len(node.args))]
        part.graph.eliminate_dead_code()
        part.recompile()
    return counts
