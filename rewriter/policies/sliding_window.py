"""`SlidingWindow`, with attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.kernels import LiveRanges
from rewriter.passes import SiteTensors
from rewriter.passes.policy import Policy
from rewriter.policies.checks import check_int
from rewriter.policies.ranges import _windowed


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """Each query sees the last `window` keys, its own included, and the first `sinks` keys (arXiv 2309.17453).

    Args:
        window: at least 1; as long as the sequence or longer, it changes nothing.
        sinks: number of first keys that are never forgotten, counted from each row's first token that is not padding,
            and anew in each packed document.
    """

    per_key_ranges: ClassVar[bool] = True

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        check_int(self, "window", self.window, 1)
        check_int(self, "sinks", self.sinks, 0)

    def live_ranges(self, site: SiteTensors) -> LiveRanges:
        return _windowed(site, self.window, self.sinks, None)

    def keeps_all(self, length: int) -> bool:
        return self.window >= length

    def pressure(self, max_length: int) -> int:
        return self.window + self.sinks
