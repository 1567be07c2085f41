"""Calibration: keys that get abnormally much attention are hidden (ParallelComp, arXiv 2502.14317, section 3.3).

A key is abnormal where the mean attention of the last query rows to it is above a threshold, and it stands in the region
that the calibration is for: among the first keys of its chunk (sinks), the last ones (recent), or in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn

from rewriter.chunked.calibrate import Calibrate
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.lower.cache_layout import FREE
from rewriter.passes.lower.operator import Attend
from rewriter.passes.lower.operator import widened


class Observe(nn.Module):
    """How much attention keys get from some query rows.

    Args:
        rows: so many last rows of the query.
    """

    def __init__(self, attend: Attend, group: str, rows: int) -> None:
        super().__init__()
        self.attend, self.group, self.rows = attend, group, rows

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor,
        bias: Tensor | None = None,
        is_token: Tensor | None = None,
    ) -> Tensor:
        """fp32 `[B, H, K]`: the attention mass, of H KV heads, or query heads for "per_query_head".

        Args:
            is_token: bool `[B, Q]`, false for rows of padding, which do not count.
        """
        query, key = widened(query[:, :, -self.rows :], key)
        lse, query_index = lse[:, :, -self.rows :], query_index[-self.rows :]
        if is_token is not None:
            lse = torch.where(is_token[:, None, -self.rows :], lse, -torch.inf)
        return torch.ops.rewriter.key_scores(
            query.contiguous(), key, lse.contiguous(), start, end, query_index.contiguous(), None, bias, None,
            self.attend.scale, self.attend.softcap, self.group,
        )  # fmt: skip


class Abnormal(nn.Module):
    """Which keys the calibrations of a site hide.

    Args:
        parity: as the original does it: as many keys in each head, because its tensors are rectangles, those with the least
            attention where fewer are abnormal; and no region has the key that lies on its border.
    """

    def __init__(self, attend: Attend, group: str, calibrations: Sequence[Calibrate], parity: bool) -> None:
        super().__init__()
        self.calibrations, self.parity = calibrations, parity
        self.observe = nn.ModuleList(Observe(attend, group, c.observe) for c in calibrations)

    def forward(
        self,
        from_begin: Tensor,
        to_end: Tensor,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor,
        bias: Tensor | None = None,
        is_token: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(keys that are hidden later, keys that are hidden at once): bool `[B, H, K]` each.

        Args:
            from_begin, to_end: int32 `[B|1, H|1, K]`, keys before and after each one in its chunk; negative for keys that are
                never abnormal.
        """
        later = torch.zeros(query.size(0), 1, key.size(2), dtype=torch.bool, device=key.device)
        at_once = later
        for calibration, observe in zip(self.calibrations, self.observe, strict=True):
            weight = observe(query, key, lse, start, end, query_index, bias, is_token)
            if is_token is None:
                weight = weight / query_index[-calibration.observe :].size(0)
            else:
                rows = is_token[:, -calibration.observe :].sum(dim=1).clamp(min=1)
                weight = weight / rows[:, None, None]
            abnormal = (weight > calibration.threshold) & in_region(calibration, from_begin, to_end, self.parity)
            if self.parity:
                counts = abnormal.sum(dim=2, keepdim=True)
                missing = counts.amax(dim=1, keepdim=True) - counts
                least = (
                    weight.masked_fill(abnormal | (from_begin < 0), torch.inf)
                    .argsort(dim=2, stable=True)
                    .argsort(dim=2)
                )
                abnormal = abnormal | (least < missing)
            later = later | abnormal
            if calibration.apply:
                at_once = at_once | abnormal
        return later, at_once


def in_region(calibration: Calibrate, from_begin: Tensor, to_end: Tensor, parity: bool = False) -> Tensor:
    """bool, like `from_begin`: the key stands where the calibration looks."""
    edge, may = calibration.edge, from_begin >= 0
    if calibration.region == "sink":
        return may & (from_begin < edge)
    if calibration.region == "recent":
        return may & (to_end < edge - parity)
    if calibration.region == "middle":
        return may & (from_begin >= edge + parity) & (to_end >= edge)
    return may


class AttendCalibrated(nn.Module):
    """Attention of a query over the keys of a cache, and itself; abnormal keys are hidden from it, or from what follows."""

    def __init__(self, site: AttentionSite, group: str, parity: bool, calibrations: Sequence[Calibrate]) -> None:
        super().__init__()
        self.attend, self.parity = Attend(site), parity
        self.abnormal = Abnormal(self.attend, group, calibrations, parity)
        self.at_once = any(c.apply for c in calibrations)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor,
        from_begin: Tensor,
        to_end: Tensor,
        chosen: Tensor,
        table_index: Tensor,
        table_end: Tensor,
    ) -> Tensor:
        """The output.

        Args:
            chosen: int64 `[B, H, C]`, the keys that have gone to the slots.
            table_index, table_end: int32 `[B, H, C]`, of the slots; those of abnormal keys are freed, in place.
        """
        output, lse = self.attend.with_lse(query, key, value, start, end, query_index)
        if self.parity:  # regions of the original: of everything in the cache, the query included
            from_begin, to_end = start, query_index[-1] - start
        # A key of the query is seen from its own row on; those of padding never are.
        num_queries = query.size(2)
        is_token = (end > start)[:, :1, -num_queries:].expand(query.size(0), -1, -1)[:, 0]
        later, at_once = self.abnormal(from_begin, to_end, query, key, lse, start, end, query_index, is_token=is_token)
        if self.at_once:
            output = self.attend(query, key, value, start, end.masked_fill(at_once, 0), query_index)
        gone = later.expand(*chosen.shape[:2], -1).gather(2, chosen)
        table_index.masked_fill_(gone, FREE)
        table_end.masked_fill_(gone, 0)
        return output
