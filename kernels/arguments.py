"""The arguments of live-range attention: one record, and the one check of them.

A new option of the kernels is a field here, in the dense `reference`, and in the kernels that support it: operators take their
signature from the fields, and pass the record on.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields
from typing import Any
from typing import get_type_hints

import torch
from rewriter.kernels.dispatch import MAX_TRITON_KEYS
from rewriter.kernels.dispatch import runs_triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from rewriter.errors import AttentionInputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionArguments:
    """What `rewriter.kernels.live_range_attention` takes, its ranges as two vectors; see there for each.

    Attributes:
        start, end: int32 `[B|1, Hkv|1, K]`.
        schedule: what `rewriter::schedule` made of the same ranges, indices and sizes, for several calls; made by each call for
            itself when left out. Read by the Triton kernels alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor
    end: Tensor
    query_index: Tensor | None = None
    key_index: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    schedule: list[Tensor] | None = None

    @classmethod
    def parameters(cls, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Name and type of each field, in order: what an operator takes."""
        types = get_type_hints(cls)
        return {f.name: types[f.name] for f in fields(cls) if f.name not in without}

    @classmethod
    def optional(cls) -> tuple[str, ...]:
        """Names of the fields that may be left out."""
        return tuple(f.name for f in fields(cls) if f.default is None)

    @property
    def is_empty(self) -> bool:
        """Whether there is no row, or no key."""
        return 0 in (*self.query.shape[:3], self.key.size(2))

    def astuple(self, *, without: tuple[str, ...] = ()) -> tuple[Any, ...]:
        """The fields in order, as operators take them."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in without)

    def check(self) -> None:
        """Raises `AttentionInputError`; runs on real and on fake tensors, and never reads values."""
        query, key, value, start, end = self.query, self.key, self.value, self.start, self.end
        query_index, key_index, bias = self.query_index, self.key_index, self.bias
        sinks, alibi_slopes = self.sinks, self.alibi_slopes
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 4:
                raise AttentionInputError(f"{name} must be [B, H, S, D], got shape {list(tensor.shape)}")
            if tensor.dtype not in DTYPES:
                raise AttentionInputError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
            if tensor.dtype == torch.float64 and runs_triton(tensor):
                raise AttentionInputError(
                    f"{name} is fp64, which the Triton kernels do not take; use fp32, or move it to the CPU"
                )
            if tensor.dtype != query.dtype:
                raise AttentionInputError(f"query is {query.dtype} and {name} {tensor.dtype}; cast them to one dtype")
        (num_batch, num_heads, num_queries, head_dim) = query.shape
        (_, num_kv_heads, num_keys, _) = key.shape
        if key.size(3) != head_dim:
            raise AttentionInputError(f"query has head_dim {head_dim} and key {key.size(3)}; they must be equal")
        if not 1 <= head_dim <= MAX_HEAD_DIM or not 1 <= value.size(3) <= MAX_HEAD_DIM:
            raise AttentionInputError(f"head dims must be 1 to {MAX_HEAD_DIM}, got {head_dim} (value: {value.size(3)})")
        if key.size(0) != num_batch or value.size(0) != num_batch:
            raise AttentionInputError(
                f"batch sizes differ: query {num_batch}, key {key.size(0)}, value {value.size(0)}"
            )
        if num_kv_heads != value.size(1) or num_keys != value.size(2):
            raise AttentionInputError(
                f"key {list(key.shape)} and value {list(value.shape)} must agree in KV heads and number of keys"
            )
        if num_kv_heads == 0 or num_heads % num_kv_heads:
            raise AttentionInputError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
        for name, tensor in (("start", start), ("end", end)):
            if tensor.dtype != torch.int32:
                raise AttentionInputError(f"{name} must be int32, got {tensor.dtype}; convert with .to(torch.int32)")
            if tensor.dim() != 3 or tensor.size(2) != num_keys:
                raise AttentionInputError(
                    f"{name} must be [B|1, Hkv|1, K] with K = {num_keys} keys, got {list(tensor.shape)}"
                )
            _check_broadcast(name, tensor, (num_batch, num_kv_heads))
        for name, index, size in (("query_index", query_index, num_queries), ("key_index", key_index, num_keys)):
            if index is None:
                continue
            if index.dtype not in (torch.int32, torch.int64) or index.dim() not in (1, 2) or index.size(-1) != size:
                raise AttentionInputError(
                    f"{name} must be int32 or int64 [{size}] or [B, {size}], got {index.dtype} {list(index.shape)}"
                )
            if index.dim() == 2 and not _broadcasts(index.size(0), num_batch):
                raise AttentionInputError(f"{name} has {index.size(0)} rows, expected {num_batch} or 1")
        if bias is not None:
            if bias.dim() != 3 or bias.size(2) != num_keys or not bias.is_floating_point():
                raise AttentionInputError(
                    f"bias must be a float tensor [B|1, Hkv|1, {num_keys}], got {bias.dtype} {list(bias.shape)}"
                )
            _check_broadcast("bias", bias, (num_batch, num_kv_heads))
        limit = MAX_TRITON_KEYS if runs_triton(query) else 2**31
        if isinstance(num_keys, int) and num_keys >= limit:
            raise AttentionInputError(f"{num_keys} keys are too many for int32 indices; give fewer than {limit}")
        if runs_triton(query) and isinstance(num_batch, int) and num_batch >= 2**16:
            raise AttentionInputError(
                f"a grid of a GPU has at most 65,535 batch rows, got {num_batch}; split the batch"
            )
        for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
            if vector is not None and (vector.dim() != 1 or vector.size(0) != num_heads):
                raise AttentionInputError(
                    f"{name} must be [{num_heads}] (one per query head), got {list(vector.shape)}"
                )
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            raise AttentionInputError("alibi_slopes must not require a gradient; detach them")
        for other in (
            key,
            value,
            start,
            end,
            query_index,
            key_index,
            bias,
            sinks,
            alibi_slopes,
            *(self.schedule or ()),
        ):
            if other is not None and other.device != query.device:
                raise AttentionInputError(
                    f"query is on {query.device}, another input on {other.device}; move them together"
                )

        if query.device.type not in ("cpu", "cuda", "meta"):
            raise AttentionInputError(
                f"there is no kernel for device {query.device}; move the inputs to the CPU or a GPU"
            )


def _check_broadcast(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    for dim, what in ((0, "batch rows"), (1, "KV heads")):
        if not _broadcasts(tensor.size(dim), expected[dim]):
            raise AttentionInputError(f"{name} has {tensor.size(dim)} {what}, expected {expected[dim]} or 1")


def _broadcasts(size: int, expected: int) -> bool:
    """Whether it is 1 or the other size. Only where neither is certain of symbols, the answer becomes a guard."""
    return guard_or_false(size == 1) or guard_or_false(size == expected) or bool(size == expected)


def as_int32(index: Tensor) -> Tensor:
    """Indices beyond int32 stand for its ends: no range begins or ends between."""
    return index if index.dtype == torch.int32 else index.clamp(-(2**31), 2**31 - 2).to(torch.int32)
