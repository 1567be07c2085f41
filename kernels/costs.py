"""How long attention takes: a model of five numbers for each kernel, measured by `bench/crossover.py` (`costs.json`).

    nanoseconds = base + call * calls + (block * blocks + pairs * (pair + number * (D + Dv))) / threads

A kernel is called once for each tile of a schedule, which costs the same whatever the threads. Within a call torch's kernel goes
over blocks of rows and keys, and what is in them, an exponential and two products for each pair of query and key, is shared among
the threads. From it a report says what a policy will gain, and from which length on.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Work:
    """What one attention computes.

    Attributes:
        calls: of the kernel: tiles, or dense blocks.
        blocks: within the calls, of all heads and batch rows.
        pairs: of query and key in them, of all heads and batch rows.
        width: numbers of a key and of a value, `D + Dv`.
    """

    calls: int
    blocks: int
    pairs: int
    width: int

    def __add__(self, other: Work) -> Work:
        return Work(self.calls + other.calls, self.blocks + other.blocks, self.pairs + other.pairs, self.width)


def fused_work(rows: int, keys: int, heads: int, width: int, *, is_causal: bool = False) -> Work:
    """Of one call of torch's fused kernel on a CPU.

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
    return Work(1, blocks * heads, pairs * heads, width)


@dataclass(frozen=True)
class Cost:
    """Nanoseconds of a kernel on one device; see the formula above."""

    base: float
    call: float
    block: float
    pair: float
    number: float

    def seconds(self, work: Work, threads: int) -> float:
        shared = self.block * work.blocks + work.pairs * (self.pair + self.number * work.width)
        return (self.base + self.call * work.calls + shared / threads) * 1e-9


@functools.cache
def costs(device_type: str, mode: str = "forward") -> dict[str, Cost] | None:
    """Of each kernel, by name; None where nothing was measured.

    Args:
        device_type: "cpu", say.
        mode: "forward", or "training": with its backward.

    Returns:
        "causal": torch's fused kernel, causal; "masked": the same under a mask, in which nothing is skipped; "tiles": live-range
        attention over its schedule.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if device_type not in table:
        return None
    return {name: Cost(**numbers) for name, numbers in table[device_type][mode].items()}
