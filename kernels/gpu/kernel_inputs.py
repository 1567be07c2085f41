"""The inputs of an attention kernel in the form in which kernels take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.arguments import as_int32
from rewriter.kernels.gpu.launch import LaunchConfig
from rewriter.kernels.gpu.launch import architecture
from rewriter.kernels.gpu.launch import launch_config
from rewriter.kernels.gpu.schedule import Schedule
from rewriter.kernels.gpu.shared_schedule import ordered_index
from rewriter.kernels.gpu.shared_schedule import places_for
from rewriter.kernels.gpu.shared_schedule import schedule_for
from rewriter.kernels.gpu.shared_schedule import tile_shape
from torch import Tensor


@dataclass(frozen=True)
class KernelInputs:
    """Tensors and sizes as the kernels' pointers, strides and constants want them; built by `make`.

    Attributes:
        query, key, value: as given; elements of a row are neighbours.
        start, end: int32 `[B|1, Hkv|1, K]`.
        query_index: int32 `[B|1, Q]`, ascending.
        row_order: int32 `[B|1, Q]`, the query row that has each of these indices; None where that is the row's own number.
        key_index: int32 `[B|1, K]`, or None without ALiBi, which alone reads it.
        bias: `[B|1, Hkv|1, K]`, or None.
        alibi_slopes, sinks: `[Hq]`, or None.
        given_schedules: what `rewriter::schedule` made, without its indices; empty where it was not called.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor
    end: Tensor
    query_index: Tensor
    row_order: Tensor | None
    key_index: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    given_schedules: tuple[Tensor, ...]
    scale: float
    softcap: float

    @classmethod
    def make(cls, arguments: AttentionArguments, *, sort: bool) -> KernelInputs:
        """From arguments that are checked; `sort` for kernels with a schedule, which visits rows in the order of their
        indices, so that those of a tile see much the same keys."""
        query, key, value = arguments.query, arguments.key, arguments.value
        query_index, key_index = arguments.query_index, arguments.key_index
        bias, sinks, alibi_slopes = arguments.bias, arguments.sinks, arguments.alibi_slopes
        num_queries, num_keys = query.size(2), key.size(2)
        row_order, schedules = None, list(arguments.schedule or ()) if sort else []
        if schedules:
            row_order = None if query_index is None else schedules.pop(0)
            query_index = schedules.pop(0)
        elif query_index is None or sort:
            query_index, row_order = ordered_index(query_index, num_queries, num_keys, query.device)
        else:
            query_index = as_int32(query_index).reshape(-1, num_queries)
        query_index, start, end = query_index.contiguous(), _with_rows(arguments.start), _with_rows(arguments.end)
        if alibi_slopes is None:
            key_index = None
        elif key_index is None:
            key_index = torch.arange(num_keys, dtype=torch.int32, device=query.device)[None]
        else:
            key_index = as_int32(key_index).reshape(-1, num_keys).contiguous()
        return cls(
            _with_rows(query),
            _with_rows(key),
            _with_rows(value),
            start,
            end,
            query_index,
            row_order,
            key_index,
            None if bias is None else _with_rows(bias),
            None if alibi_slopes is None else _with_rows(alibi_slopes),
            None if sinks is None else _with_rows(sinks),
            tuple(schedules),
            1 / math.sqrt(query.size(3)) if arguments.scale is None else arguments.scale,
            arguments.softcap or 0.0,
        )

    @property
    def num_batch(self) -> int:
        return self.query.size(0)

    @property
    def num_kv_heads(self) -> int:
        return self.key.size(1)

    @property
    def group(self) -> int:
        return self.query.size(1) // self.key.size(1)

    @property
    def num_queries(self) -> int:
        return self.query.size(2)

    @property
    def num_keys(self) -> int:
        return self.key.size(2)

    @property
    def head_dim(self) -> int:
        return self.query.size(3)

    @property
    def value_dim(self) -> int:
        return self.value.size(3)

    def config(self, kernel: str) -> LaunchConfig:
        return launch_config(
            architecture(self.query.device), kernel, self.query.element_size(), max(self.head_dim, self.value_dim)
        )

    def places(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """`places_in_lists` for the gradients of keys: those that were given, or new ones."""
        return places_for(self.config("backward_key"), schedule, self.given_schedules)

    def list_stages(self, config: LaunchConfig) -> int:
        """Stages of a loop over listed keys, whose rows are loaded by indices that are loaded before them.

        On NVIDIA's GPUs Triton gives each of two loads in a row half of the stages (`(num_stages - 1) // 2` of latency), so that
        with a loop's own number nothing is on its way while a block is computed. Elsewhere more of them take more shared memory.
        """
        is_nvidia = architecture(self.query.device).startswith("sm")
        return 2 * config.num_stages - 1 if is_nvidia else config.num_stages

    def tile_shape(self, block_m: int) -> tuple[int, int, int]:
        """Query rows and heads of a tile, and the chunks of heads that a group takes."""
        return tile_shape(self.group, block_m)

    def schedule(self, kernel: str) -> Schedule:
        """Of "forward" or "backward_query": the one that was given, or a new one."""
        ranges = (self.start, self.end, self.query_index)
        sizes = (self.num_queries, self.group)
        return schedule_for(kernel, self.config(kernel), *ranges, *sizes, self.given_schedules)

    def empty_output(self) -> Tensor:
        """Heads innermost: what follows an attention is their concatenation, which then copies nothing."""
        shape = (self.num_batch, self.num_queries, self.query.size(1), self.value_dim)
        return self.query.new_empty(shape).transpose(1, 2)

    def constants(self, config: LaunchConfig) -> dict[str, Any]:
        """Compile-time constants and launch parameters."""
        block_d, block_dv = padded(self.head_dim), padded(self.value_dim)
        # Rows of 32 elements in keys and of 16 in values: what Triton 3.6 made of that for sm_90 read illegal addresses.
        block_d, block_dv = max(block_d, min(block_dv, 64)), max(block_dv, min(block_d, 64))
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_ALIBI": self.alibi_slopes is not None,
            "HAS_SOFTCAP": self.softcap > 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "EVEN": block_d == self.head_dim and block_dv == self.value_dim,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def logit_tensors(self) -> tuple[Tensor, ...]:
        """Bias, slopes and key index; another tensor, never read, stands for one that is absent."""
        return tuple(self.query if t is None else t for t in (self.bias, self.alibi_slopes, self.key_index))

    def logit_strides(self) -> tuple[int, ...]:
        return (
            *((0, 0) if self.bias is None else shared_strides(self.bias, 2)),
            *((0,) if self.key_index is None else shared_strides(self.key_index, 1)),
        )

    def order(self) -> tuple[Tensor, int]:
        """The row order and its stride of the batch; another tensor, never read, stands for it where there is none."""
        return (self.query, 0) if self.row_order is None else (self.row_order, shared_strides(self.row_order, 1)[0])


def padded(dim: int) -> int:
    """The tile's size for a head dim: a power of two, and at least 16, the least that a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def row_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of batch, head and row of each `[B, H, S, D]`."""
    return tuple(stride for t in tensors for stride in t.stride()[:3])


def range_strides(schedule: Schedule) -> tuple[int, int]:
    """What a batch row and a KV head add to the row of the live ranges: 0 where they are shared."""
    rows, heads = schedule.start.shape[:2]
    return (0 if rows == 1 else heads), (0 if heads == 1 else 1)


def shared_strides(tensor: Tensor, num_dims: int) -> tuple[int, ...]:
    """Strides of the first dimensions, 0 where the one entry is for all."""
    return tuple(0 if tensor.size(d) == 1 else tensor.stride(d) for d in range(num_dims))


def _with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
