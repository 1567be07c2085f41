"""Backward: the query's gradient by tiles of query rows, then those of key, value and bias by groups of keys.

    d logit = p * (dp - delta),   p = exp(logit - lse),   dp = dO V^T,   delta = rowsum(dO * O) - dlse

1. `_query_gradient` visits keys as the forward does; it also writes delta.
2. `_list_gradients` holds `BLOCK_N` keys of a segment's list in registers and goes over the tiles of the segment in which
   they are alive. Its sums are partial: one row for each (segment, key), stored by key.
3. `_key_gradients` holds `BLOCK_N` neighbouring keys, starts from the sum of their partial rows, in the order of the
   segments, goes over the tiles that have them in their run, and writes the gradients.

Nothing is added to an output by two programs, so results are bitwise equal from run to run. Grouping the keys of a segment
computes 1.06 to 1.19 times the visible pairs of a dynamic mask; neighbours or keys of like lifetimes over the whole length
compute 1.4 to 4.8 times, and slots assigned by linear scan 1.00 to 1.04 times, but a group of 64 slots changes occupants
every few tiles and each change costs a reload of its keys (`bench/work_ratio.py`).
"""

from __future__ import annotations

from rewriter.kernels.gpu.backward.launches import backward

__all__ = ["backward"]
