"""`Exact`: lossless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes import SiteTensors
from rewriter.passes.policy import Policy


@dataclass(frozen=True)
class Exact(Policy):
    """Lossless: each mask is replaced by its own live ranges."""

    needs_causal: ClassVar[bool] = False
    per_key_ranges: ClassVar[bool] = True
    is_lossless: ClassVar[bool] = True

    def live_ranges(self, site: SiteTensors) -> None:
        return None
