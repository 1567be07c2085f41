"""`ChunkedEviction`, for contexts longer than a model was trained for; `rewriter.chunked.reading` is its program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import ClassVar

import torch
from torch.fx import GraphModule

from rewriter.chunked.calibrate import Calibrate
from rewriter.chunked.lowering import lower_phases
from rewriter.errors import PolicyError
from rewriter.passes import Extended
from rewriter.passes import SiteTensors
from rewriter.passes import Slots
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.lower.slots import CachedLowering
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.policy import Policy
from rewriter.policies.checks import check_choice
from rewriter.policies.checks import check_int


@dataclass(frozen=True)
class ChunkedEviction(Policy):
    """A long context read in chunks, of which the best keys of the best are kept (ParallelComp, arXiv 2502.14317).

    Not a mask but a program of two phases, run by `OptimizedModel.generate(context_ids, query_ids=...)` and `answer`. First
    each chunk is read alone, with the query behind it and with the positions of a first chunk. The chunks under which the query
    is most likely are kept, and of their keys those with the most attention from the query's last rows, in each head. Then
    the query is read again over all that was kept, and the answer generated. A context that fits in one chunk is read as a
    whole, and nothing is forgotten.

    Args:
        chunk: most tokens of a chunk, a BOS included; the context is divided evenly. With the query and the answer it should
            fit what the model was trained for.
        keep_chunks: chunks that are kept.
        capacity: keys of each head that are kept of each chunk, besides its BOS; None for all.
        observe: last rows of the query whose attention decides which keys are kept (eq. 6).
        calibration: `Calibrate`s; `MIXED_CALIBRATION` is the paper's.
        group: what the query heads of a KV head make of a key together: their "mean", their "max"; or "per_query_head", where
            each keeps keys of its own, and the cache is as many times larger.
        smoothing: a key counts as much as the best of so many around it (odd; 1 for none).
        align: "left": all chunks begin at position 0, and the query follows the longest kept; "right": all chunks end before the
            query.
        bos: where the context begins with a BOS, and so each chunk does: "first" keeps that of the first kept chunk, "all" keeps
            each.
        parity: as the original program does it where that is well defined: scores and keys per query head, a BOS in the
            query counts, the BOS of the first chunk competes, the first kept key of each later chunk is lost, calibration hides
            as many keys in each head, its regions are those of the merged cache, and even one chunk is evicted from.

    Raises:
        PolicyError: a field is out of its range, or does not fit the others.
    """

    is_program: ClassVar[bool] = True
    per_key_ranges: ClassVar[bool] = True
    positions_repeat: ClassVar[bool] = True

    chunk: int
    keep_chunks: int = 3
    capacity: int | None = None
    observe: int = 8
    calibration: tuple[Calibrate, ...] = ()
    group: str = "mean"
    smoothing: int = 7
    align: str = "left"
    bos: str = "first"
    parity: bool = False

    def __post_init__(self) -> None:
        check_int(self, "chunk", self.chunk, 2)
        check_int(self, "keep_chunks", self.keep_chunks, 1)
        check_int(self, "observe", self.observe, 1)
        check_int(self, "smoothing", self.smoothing, 1)
        if self.smoothing % 2 == 0:
            raise PolicyError(f"ChunkedEviction: smoothing must be odd, got {self.smoothing}")
        if self.capacity is not None:
            check_int(self, "capacity", self.capacity, 1)
        if isinstance(self.calibration, Calibrate) or not all(isinstance(c, Calibrate) for c in self.calibration):
            raise PolicyError(
                f"ChunkedEviction: calibration must be a list of Calibrate(...), got {self.calibration!r}"
            )
        object.__setattr__(self, "calibration", tuple(self.calibration))
        check_choice(self, "group", self.group, ("mean", "max", "per_query_head"))
        check_choice(self, "align", self.align, ("left", "right"))
        check_choice(self, "bos", self.bos, ("first", "all"))
        if self.parity:
            if (self.align, self.bos) != ("left", "first") or any(c.phase == "local" for c in self.calibration):
                raise PolicyError(
                    'ChunkedEviction: parity=True is for align="left", bos="first" and calibration in the phase "merged"; the '
                    "original does nothing else that is well defined"
                )
            object.__setattr__(self, "group", "per_query_head")

    @property
    def keys_per_query_head(self) -> bool:  # type: ignore[override]
        return self.group == "per_query_head"

    @property
    def reads_site(self) -> bool:  # type: ignore[override]
        """Calibration hides keys in each layer and head."""
        return bool(self.calibration)

    @property
    def slot_fields(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        return {"from_begin": torch.int32, "to_end": torch.int32} if self.calibration else {}

    def calibrations(self, plan: PlannedSite, phase: str) -> tuple[Calibrate, ...]:
        """Those of a site, in one of the two phases."""
        own = (c for c in self.calibration if c.phase == phase)
        return tuple(c for c in own if plan.layer in c.layer_range(plan.num_layers))

    def reason_against(self, site: AttentionSite, proof: MaskProof) -> str | None:
        if site.sinks is None:
            return None
        return "ChunkedEviction scores keys by their weights, of which the model's sinks take a part"

    def own_graphs(self, lowered: CachedLowering) -> Mapping[str, GraphModule]:
        """ "chunk", the first phase; "query", the prefill of the second, where keys are calibrated then."""
        return lower_phases(self, lowered)

    def __str__(self) -> str:
        special = (f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default)
        return (
            f"ChunkedEviction({', '.join([str(self.chunk), *(f'{f.name}={getattr(self, f.name)}' for f in special)])})"
        )

    def live_ranges(self, site: SiteTensors) -> None:
        return None

    def extend(self, slots: Slots, site: SiteTensors) -> Extended:
        """The second phase: what is in the cache stays, and so does what comes."""
        never = torch.full_like(site.index, -1)
        return dataclasses.replace(super().extend(slots, site), fields=dict.fromkeys(self.slot_fields, never))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "calibration": [dataclasses.asdict(c) for c in self.calibration]}

    def check_sites(self, num_sites: int) -> None:
        for calibration in self.calibration:
            own = calibration.layer_range(num_sites)
            if num_sites and len(own) and own[-1] >= num_sites:
                raise PolicyError(
                    f"{calibration} is for attention sites that the model, with {num_sites}, does not have"
                )

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> Policy:
        calibration = [Calibrate(**c) for c in fields.get("calibration", ())]
        return super()._build({**fields, "calibration": calibration})
