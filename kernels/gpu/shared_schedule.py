"""One schedule for all sites with the same live ranges: `rewriter::schedule` makes it, and the operators take its tensors.

Its kernels are launched once for a model in place of once for each layer, and the same again for each layer's gradients. What a
schedule depends on besides ranges and indices, the tile of the attention kernel, is in the launch table: the operators look it
up as `rewriter::schedule` did.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence

import torch
from rewriter.kernels.arguments import as_int32
from rewriter.kernels.gpu.launch import LaunchConfig
from rewriter.kernels.gpu.launch import architecture
from rewriter.kernels.gpu.launch import launch_config
from rewriter.kernels.gpu.schedule import BACKWARD_CAPACITY
from rewriter.kernels.gpu.schedule import FORWARD_CAPACITY
from rewriter.kernels.gpu.schedule import MADE
from rewriter.kernels.gpu.schedule import MAX_SEGMENTS
from rewriter.kernels.gpu.schedule import Schedule
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.gpu.schedule import made_sizes
from rewriter.kernels.gpu.schedule import num_rows
from torch import Tensor

from rewriter.errors import AttentionInputError

CAPACITY = {"forward": FORWARD_CAPACITY, "backward_query": BACKWARD_CAPACITY}
"""Kernels with a schedule of their own, in the order in which `rewriter::schedule` makes them, and the room of their lists."""


def tile_shape(group: int, block_m: int) -> tuple[int, int, int]:
    """Query rows and heads of a tile, and the chunks of heads that a group takes."""
    heads = min(group, block_m)
    return block_m // heads, heads, -(-group // heads)


def ordered_index(
    query_index: Tensor | None, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The indices of the query rows, ascending, int32 `[B|1, Q]`, and the row that has each of them: None for its own number."""
    if query_index is None:
        return torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32, device=device)[None], None
    query_index, order = as_int32(query_index).reshape(-1, num_queries).sort(dim=1, stable=True)
    return query_index.contiguous(), order.to(torch.int32).contiguous()


def make(
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    num_queries: int,
    group: int,
    head_dim: int,
    element_size: int,
    backward: bool,
) -> list[Tensor]:
    """What `rewriter::schedule` returns: the row order where there are indices, the ascending indices, and the tensors of the
    forward's schedule and, with `backward`, of the gradients', and their `places_in_lists`.

    Args:
        start, end: int32 `[B|1, Hkv|1, K]`.
        query_index: as `live_range_attention` takes it.
        num_queries: Q, the query rows.
        group: query heads of a KV head.
        head_dim: the larger of key's and value's.
        element_size: bytes of an element of query, key and value.
    """
    if 0 in (*start.shape, num_queries):
        return make_fake(start, end, query_index, num_queries, group, head_dim, element_size, backward)
    index, order = ordered_index(query_index, num_queries, start.size(2), start.device)
    tensors = [index] if order is None else [order, index]
    for kernel, config, tile_rows in _tiles(start.device, group, head_dim, element_size, backward):
        schedule = build(start, end, index, tile_rows, config.block_n, CAPACITY[kernel])
        tensors += schedule.made()
        if kernel == "backward_query":
            keys_config = launch_config(architecture(start.device), "backward_key", element_size, head_dim)
            tensors += places_in_lists(schedule, keys_config.block_n)
    return tensors


def places_in_lists(schedule: Schedule, block: int) -> tuple[Tensor, Tensor]:
    """Where the partial sums of each key begin, int32 `[Rb, Rh, K]`, and the groups of `block` keys of each segment's list, int32
    `[Rb, Rh, MAX_SEGMENTS + 1]`."""
    rows_of_key = schedule.last_segment - schedule.first_segment
    partial_begin = (rows_of_key.cumsum(dim=2, dtype=torch.int32) - rows_of_key).contiguous()
    groups = (schedule.list_begin.diff(dim=2) + (block - 1)) // block
    return partial_begin, torch.nn.functional.pad(groups.cumsum(dim=2, dtype=torch.int32), (1, 0)).contiguous()


def _tiles(
    device: torch.device, group: int, head_dim: int, element_size: int, backward: bool
) -> Iterator[tuple[str, LaunchConfig, int]]:
    """Each kernel with a schedule of its own, its entry of the launch table, and the query rows of its tile."""
    for kernel in list(CAPACITY)[: 1 + backward]:
        config = launch_config(architecture(device), kernel, element_size, head_dim)
        yield kernel, config, tile_shape(group, config.block_m)[0]


def num_tensors(*, indexed: bool, backward: bool) -> int:
    """How many tensors `make` returns, with `query_index` or without."""
    return 1 + indexed + len(MADE) * (1 + backward) + 2 * backward


def make_fake(
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    num_queries: int,
    group: int,
    head_dim: int,
    element_size: int,
    backward: bool,
) -> list[Tensor]:
    """Tensors of the sizes of `make`'s."""
    num_index_rows = 1 if query_index is None or query_index.dim() == 1 else query_index.size(0)
    index = start.new_empty(num_index_rows, num_queries)
    tensors = [index] if query_index is None else [torch.empty_like(index), index]
    rows = num_rows(start, end, index)
    for kernel, _, tile_rows in _tiles(start.device, group, head_dim, element_size, backward):
        sizes = made_sizes(num_queries, start.size(2), tile_rows, CAPACITY[kernel])
        tensors += [start.new_empty(*rows, *sizes[name]) for name in MADE]
    if backward:
        tensors += [start.new_empty(*rows, n) for n in (start.size(2), MAX_SEGMENTS + 1)]
    return tensors


def schedule_for(
    kernel: str,
    config: LaunchConfig,
    start: Tensor,
    end: Tensor,
    query_index: Tensor,
    num_queries: int,
    group: int,
    given: Sequence[Tensor],
) -> Schedule:
    """The schedule of a kernel: among the tensors given by `make`, without its indices, or a new one.

    Args:
        query_index: int32 `[B|1, Q]`, ascending.
        given: what `make` returned behind the indices; empty, or the forward's alone where no gradient was asked for.

    Raises:
        AttentionInputError: the tensors are another schedule's.
    """
    tile_rows = tile_shape(group, config.block_m)[0]
    place = list(CAPACITY).index(kernel) * len(MADE)
    made = given[place : place + len(MADE)]
    if not made:
        return build(start, end, query_index, tile_rows, config.block_n, CAPACITY[kernel])
    rows = num_rows(start, end, query_index)
    sizes = made_sizes(num_queries, start.size(2), tile_rows, CAPACITY[kernel])
    expected = [num_queries, *((*rows, *sizes[name]) for name in MADE)]
    found = [query_index.size(1), *(tuple(t.shape) for t in made)]
    if found != expected:
        raise AttentionInputError(
            f"schedule is not that of these ranges and sizes for the kernel {kernel!r}: its rows and tensors are {found}, "
            f"expected {expected}; call torch.ops.rewriter.schedule with the same ranges, indices and sizes"
        )
    return Schedule.restored(start, end, query_index, tile_rows, made)


def places_for(config: LaunchConfig, schedule: Schedule, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`places_in_lists` of the gradients' schedule for the keys' kernels: among the tensors given by `make`, or new ones."""
    made = given[len(CAPACITY) * len(MADE) :]
    return (made[0], made[1]) if made else places_in_lists(schedule, config.block_n)
