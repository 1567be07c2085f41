"""How long attention takes: a model of four numbers for each kernel, measured by `bench/crossover.py` (`costs.json`).

    nanoseconds = base + (block * blocks + pairs * (pair + number * (D + Dv))) / threads

A kernel goes over blocks, torch's of rows and keys, ours of rows and all keys that are alive for them, and what is in them, an
exponential and two products for each pair of query and key, is shared among the threads. From it a report says what a policy
will gain, and from which length on.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rewriter.kernels.live_ranges import LiveRanges

TABLE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Work:
    """What one attention computes.

    Attributes:
        blocks: of all heads and batch rows.
        pairs: of query and key in them, of all heads and batch rows.
        width: numbers of a key and of a value, `D + Dv`.
    """

    blocks: int
    pairs: int
    width: int


def fused_work(rows: int, keys: int, heads: int, width: int, *, is_causal: bool = False) -> Work:
    """Of torch's fused kernel on a CPU.

    It takes 256 query rows at once, of fewer than 768 rows 64, and of fewer than 192 32, over 512 keys at once; where it is
    causal, over those blocks of keys that the last of the rows sees something of
    (`aten/src/ATen/native/cpu/FlashAttentionKernel.cpp`).

    Args:
        heads: query heads of all batch rows.
        width: `D + Dv`.
    """
    step = 256 if rows >= 768 else 64 if rows >= 192 else 32
    blocks = pairs = 0
    for begin in range(0, rows, step):
        own = min(step, rows - begin)
        over = -(-(min(begin + step, keys) if is_causal else keys) // 512)
        blocks += over
        pairs += own * min(512 * over, keys)
    return Work(blocks * heads, pairs * heads, width)


FEW_ROWS = 8
"""Rows of a KV head, query rows times heads of a group, up to which live-range attention on a CPU computes no row but these."""


def live_range_work(live: LiveRanges, num_queries: int, query_heads: int, kv_heads: int, width: int) -> Work:
    """Of live-range attention on a CPU: in panels of as many rows as two vectors have numbers (`cpu/live_range_attention.cpp`).

    A row is a query row of one query head; the heads of a group are neighbours. A panel takes the keys that are alive for any of
    its rows.

    Args:
        live: its last query sees the last key.
        query_heads, kv_heads: of all batch rows.
        width: `D + Dv`.
    """
    group = query_heads // kv_heads
    rows = num_queries * group
    lanes = {"AVX512": 32, "AVX2": 16}.get(torch.backends.cpu.get_cpu_capability(), 8)
    height = rows if rows <= FEW_ROWS else lanes
    first = torch.arange(0, rows, height)
    offset = live.num_keys - num_queries
    low, high = ((row // group + offset).int() for row in (first, (first + height - 1).clamp(max=rows - 1)))
    keys = 0
    for start, end in zip(*(t.expand(live.shape).flatten(0, 1) for t in (live.start, live.end)), strict=True):
        is_alive = end > start
        begun = torch.searchsorted(start[is_alive].sort().values, high, right=True)
        ended = torch.searchsorted(end[is_alive].sort().values, low, right=True)
        keys += int((begun - ended).sum())
    alike = kv_heads // (live.shape[0] * live.shape[1])
    return Work(first.numel() * kv_heads, keys * height * alike, width)


@dataclass(frozen=True)
class Cost:
    """Nanoseconds of a kernel on one device; see the formula above."""

    base: float
    block: float
    pair: float
    number: float

    def seconds(self, work: Work, threads: int) -> float:
        shared = self.block * work.blocks + work.pairs * (self.pair + self.number * work.width)
        return (self.base + shared / threads) * 1e-9


@functools.cache
def costs(device_type: str, mode: str = "forward") -> dict[str, Cost] | None:
    """Of each kernel, by name; None where nothing was measured.

    Args:
        device_type: "cpu", say.
        mode: "forward", or "training": with its backward.

    Returns:
        "causal": torch's fused kernel, causal; "masked": the same under a mask, in which nothing is skipped; "live_range":
        live-range attention.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if device_type not in table:
        return None
    return {name: Cost(**numbers) for name, numbers in table[device_type][mode].items()}
