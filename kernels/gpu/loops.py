"""What the loops of a compiled kernel hold, counted in its machine code: the cost of a block of keys before any GPU has seen it.

A loop is what lies between a label and a jump back to it. `loop_bounds.json` holds what was counted
when each kernel was last changed, by the release of Triton that compiled it; more of what costs time, or fewer of the copies that
run beside it, is a failure of `rewriter verify --compile-only`, so that a change that makes a loop longer is seen where there is
no GPU. After a change that is meant, `python bench/loops.py` writes the file anew.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

BOUNDS = Path(__file__).with_name("loop_bounds.json")

SLACK = 1.02
"""Instructions of a loop may be so many times those of the bound: schedules differ by a few."""

NVIDIA = {
    "matrix products": r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA|IMMA)\b",
    "waits": r"\b(WARPGROUP|DEPBAR|WARPGROUP\.DEPBAR|SYNCS|LDGDEPBAR)\b",
    "barriers": r"\bBAR\.",
    "asynchronous copies": r"\b(LDGSTS|UTMALDG|UBLKCP)\b",
    "loads": r"\bLDG\b",
    "exponentials": r"\bMUFU\.EX2\b",
    "comparisons": r"\b(ISETP|FSETP|LOP3|FSEL)\b",
}

AMD = {
    "matrix products": r"\bv_mfma",
    "waits": r"\bs_waitcnt",
    "barriers": r"\bs_barrier",
    "asynchronous copies": r"\b(global|buffer)_load_lds",
    "loads": r"\b(global|buffer)_load_(?!lds)",
    "exponentials": r"\bv_exp",
    "comparisons": r"\bv_(cmp|cndmask)",
}

MORE_IS_WORSE = ("instructions", "waits", "barriers", "loads")

Counts = dict[str, int]


def loops_of(assembly: str, kinds: dict[str, str]) -> list[Counts]:
    """Of each loop with matrix products or exponentials and no such loop inside, in the order of the text, its instructions and
    those of each kind.

    Args:
        assembly: of nvdisasm, or AMD's assembly text.
        kinds: `NVIDIA` or `AMD`.
    """
    lines = [line.strip() for line in assembly.splitlines()]
    labels = {match[1]: place for place, line in enumerate(lines) if (match := re.match(r"(\.L[\w$.]*):", line))}
    spans = []
    for place, line in enumerate(lines):
        jump = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L[\w$.]*)", line)
        if jump and jump[1] in labels and labels[jump[1]] < place:
            spans.append((labels[jump[1]], place))
    found = {}
    for first, last in set(spans):
        body = [line for line in lines[first : last + 1] if _is_instruction(line)]
        counts = {"instructions": len(body)}
        counts |= {kind: sum(bool(re.search(pattern, line)) for line in body) for kind, pattern in kinds.items()}
        if counts["matrix products"] or counts["exponentials"]:
            found[first, last] = counts
    # A loop that only waits, for a barrier in memory say, is part of the one around it.
    return [
        counts
        for (first, last), counts in sorted(found.items())
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in found)
    ]


def _is_instruction(line: str) -> bool:
    """nvdisasm has an address before each; in AMD's text they are what is neither label, directive nor comment."""
    return (
        bool(line)
        and (line.startswith("/*") or not line.startswith((".", ";", "//", "s_nop")))
        and not line.endswith(":")
    )


@functools.cache
def bounds() -> dict[str, list[Counts]]:
    """By `key`; empty where Triton is another release than the one that the bounds are of."""
    import triton

    stored = json.loads(BOUNDS.read_text(encoding="utf-8"))
    return stored["loops"] if stored["triton"] == triton.__version__ else {}


def key(architecture: str, kernel: str, bits: int, head_dim: int) -> str:
    return f"{architecture} {kernel.lstrip('_')} {bits} {head_dim}"


def exceeded(counted: Sequence[Counts], bound: Sequence[Counts]) -> str | None:
    """What a kernel's loops have more of than the bound allows, or fewer of; None where they keep to it."""
    if len(counted) != len(bound):
        return f"{len(counted)} loops, and the bound is of {len(bound)}"
    for number, (own, most) in enumerate(zip(counted, bound, strict=True)):
        for kind in MORE_IS_WORSE:
            if own[kind] > most[kind] * (SLACK if kind == "instructions" else 1):
                return f"loop {number} has {own[kind]} {kind}, the bound is {most[kind]}"
        kind = "asynchronous copies"
        if own[kind] < most[kind]:
            return f"loop {number} has {own[kind]} {kind}, the bound is {most[kind]}"
    return None
