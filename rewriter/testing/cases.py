"""A test case of an attention kernel: a few numbers, from which all its tensors follow, so that it prints as one line."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges

RANGE_KINDS = (
    "causal",
    "window",
    "separators",
    "topk",
    "padding",
    "documents",
    "bidirectional",
    "prefix",
    "scattered",
    "nothing",
)
"""Families of live ranges; the seed of a case chooses a member."""

ADVERSARIAL_RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "first tile empty": ((7, FOREVER),) * 14,
    "skip then live": ((0, 0),) * 7 + tuple((j, FOREVER) for j in range(7, 14)),
    "live then skip": tuple((j, 7) for j in range(7)) + ((0, 0),) * 7,
    "live, skip, live": ((0, FOREVER),) * 5 + ((0, 0),) * 5 + ((0, FOREVER),) * 4,
    "ends at tile borders": ((0, 7), (0, 8), (6, 7), (7, 14), (7, 8), (0, 14), (13, 14)) * 2,
    "one key": ((0, 0),) * 13 + ((0, FOREVER),),
    "no key": ((3, 3),) * 14,
    "only between two queries": ((3, 4),) * 14,
    "ends before it starts": ((9, 2), (2, 9)) * 7,
    "extremes of int32": ((-(2**31), FOREVER), (FOREVER, FOREVER), (-(2**31), -(2**31)), (0, FOREVER)) * 3,
}
"""Ranges that broke kernels: NaN after an empty first tile, gradients lost after a skipped one, borders of tiles."""


@dataclass(frozen=True)
class Case:
    """Inputs of live-range attention, made from a seed. Values are exact in `dtype`.

    Attributes:
        seed: of all random values.
        dtype: "float32", "bfloat16" or "float16".
        batch, kv_heads, group, queries, keys, head_dim, value_dim: sizes; there are `kv_heads * group` query heads.
        ranges: one of `RANGE_KINDS`, or the `(start, end)` of each key.
        strided: whether query, key and value are views with the heads innermost.
        bias: None, or for whom there is one: "all", "row" (each batch row) or "head" (each row and KV head).
        sinks: whether there are sinks.
        alibi: whether there are ALiBi slopes.
        scale, softcap: as the kernel takes them.
        query_index, key_index: None, "all" or "row".
    """

    seed: int = 0
    dtype: str = "float32"
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 8
    keys: int = 8
    head_dim: int = 4
    value_dim: int = 4
    ranges: str | tuple[tuple[int, int], ...] = "causal"
    strided: bool = False
    bias: str | None = None
    sinks: bool = False
    alibi: bool = False
    scale: float | None = None
    softcap: float | None = None
    query_index: str | None = None
    key_index: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ranges, str):
            if self.ranges not in RANGE_KINDS:
                raise ValueError(f"ranges must be one of {', '.join(RANGE_KINDS)}, got {self.ranges!r}")
        elif len(self.ranges) != self.keys:
            raise ValueError(f"ranges has {len(self.ranges)} entries for {self.keys} keys; give one for each key")

    def __repr__(self) -> str:
        """A line of Python that makes this case, without what is left at its default."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(f'{name}={value!r}' for name, value in given)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable inputs in fp64: query, key, value, and bias and sinks where there are any."""
        heads = self.kv_heads * self.group
        tensors = {
            "query": self._values(1, self.batch, heads, self.queries, self.head_dim),
            "key": self._values(2, self.batch, self.kv_heads, self.keys, self.head_dim),
            "value": self._values(3, self.batch, self.kv_heads, self.keys, self.value_dim),
        }
        if self.bias is not None:
            rows = {"all": (1, 1), "row": (self.batch, 1), "head": (self.batch, self.kv_heads)}[self.bias]
            tensors["bias"] = self._values(4, *rows, self.keys)
        if self.sinks:
            tensors["sinks"] = self._values(5, heads)
        return tensors

    def options(self) -> dict[str, Any]:
        """The inputs without a gradient, floats in fp64."""
        options: dict[str, Any] = {}
        if self.scale is not None:
            options["scale"] = self.scale
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if self.alibi:
            options["alibi_slopes"] = self._values(6, self.kv_heads * self.group).abs()
        if self.key_index is not None:
            shape = (self.keys,) if self.key_index == "all" else (self.batch, self.keys)
            options["key_index"] = torch.randint(0, 99, shape, generator=self._random(7))
        if self.query_index is not None:
            shape = (self.queries,) if self.query_index == "all" else (self.batch, self.queries)
            options["query_index"] = torch.randint(-2, self.keys + 2, shape, generator=self._random(8))
        return options

    def live(self) -> LiveRanges:
        if not isinstance(self.ranges, str):
            start, end = (torch.tensor(part, dtype=torch.int32)[None, None] for part in zip(*self.ranges, strict=True))
            return LiveRanges(start, end)
        return _random_ranges(self.ranges, self.batch, self.kv_heads, self.keys, self._random(9))

    def _random(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 16 + stream)

    def _values(self, stream: int, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self._random(stream)).to(self.torch_dtype).double()
        if self.strided and len(shape) == 4:
            values = values.transpose(1, 2).contiguous().transpose(1, 2)
        return values


def _random_ranges(kind: str, batch: int, heads: int, keys: int, random: torch.Generator) -> LiveRanges:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    if kind == "causal":
        return LiveRanges.causal(keys)
    if kind == "window":
        return LiveRanges.sliding_window(keys, integer(1, keys + 1), sinks=integer(0, 3))
    if kind == "separators":
        is_separator = torch.rand(batch, keys, generator=random) < 0.2
        return LiveRanges.separators(is_separator, window=integer(1, 9), initial=integer(0, 3))
    if kind == "topk":
        return running_topk_ranges(torch.rand(batch, heads, keys, generator=random), integer(1, keys))
    if kind == "padding":
        return LiveRanges.causal(keys) & LiveRanges.padding(torch.rand(batch, keys, generator=random) < 0.6)
    if kind == "documents":
        ids = (torch.rand(batch, keys, generator=random) < 0.2).cumsum(1)
        return LiveRanges.documents(ids) & LiveRanges.causal(keys)
    if kind == "bidirectional":
        return LiveRanges.bidirectional(keys)
    if kind == "prefix":
        return LiveRanges.prefix(keys, torch.randint(0, keys + 1, (batch,), generator=random))
    if kind == "nothing":
        start = torch.zeros(1, 1, keys, dtype=torch.int32)
        return LiveRanges(start, start)
    start = torch.randint(-2, keys + 2, (batch, heads, keys), generator=random).int()
    end = start + torch.randint(0, keys, (batch, heads, keys), generator=random).int()
    return LiveRanges(start, torch.where(torch.rand(batch, heads, keys, generator=random) < 0.1, FOREVER, end).int())
