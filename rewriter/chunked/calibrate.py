"""`Calibrate`: which keys with abnormally much attention are hidden, and where (ParallelComp, section 3.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewriter.errors import PolicyError
from rewriter.policies.checks import check_choice
from rewriter.policies.checks import check_int
from rewriter.policies.per_layer import layer_numbers


@dataclass(frozen=True)
class Calibrate:
    """Hides keys that get abnormally much attention, at some attention sites (ParallelComp, arXiv 2502.14317, section 3.3).

    Args:
        layers: sites, counted from 0: `"0-25%"`, from 0 up to a quarter of the depth; `"4-7"`, both included; or a number.
        region: where in its chunk such a key stands: "sink", among the first `edge` keys; "recent", among the last; "middle",
            in between; "all".
        threshold: of the mean attention weight; at 1 nothing is hidden.
        observe: so many last rows of the query are looked at.
        edge: keys at either end of a chunk that are sinks, or recent.
        phase: "merged": the query's attention over all kept chunks decides; "local": that over each chunk alone.
        apply: hide the keys from the rows that decided, too, and not only from what comes after.

    Raises:
        PolicyError: a field is out of its range.
    """

    layers: int | str
    region: str
    threshold: float = 0.1
    observe: int = 1
    edge: int = 100
    phase: str = "merged"
    apply: bool = True

    def __post_init__(self) -> None:
        self.layer_range(100)
        check_choice(self, "region", self.region, ("sink", "middle", "recent", "all"))
        if not isinstance(self.threshold, (int, float)) or not self.threshold > 0:
            raise PolicyError(f"Calibrate: threshold must be a positive number, got {self.threshold!r}")
        check_int(self, "observe", self.observe, 1)
        check_int(self, "edge", self.edge, 1)
        check_choice(self, "phase", self.phase, ("merged", "local"))

    def layer_range(self, num_layers: int) -> range:
        """The sites that it is for, in a model of so many."""
        share = re.fullmatch(r"(\d+)-(\d+)%", self.layers) if isinstance(self.layers, str) else None
        if share is None:
            numbers = layer_numbers(self.layers, "Calibrate", '3, "1-8" or "0-25%"')
            return range(min(numbers), max(numbers) + 1)
        low, high = int(share[1]), int(share[2])
        if not low < high <= 100:
            raise PolicyError(f"Calibrate: layers must rise and end at 100% at most, got {self.layers!r}")
        return range(low * num_layers // 100, high * num_layers // 100)


MIXED_CALIBRATION = (
    Calibrate("0-25%", "middle"),
    Calibrate("25-50%", "recent"),
    Calibrate("75-100%", "sink"),
)
"""The recipe of the paper's "Ours-calibration" (tables 6 and 8), in shares of the depth."""
