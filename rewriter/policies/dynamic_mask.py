"""`DynamicMask`: the best keys by a trained score (arXiv 2508.02124)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.errors import PolicyError
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.live_ranges import plus_window
from rewriter.passes import Extended
from rewriter.passes import SiteTensors
from rewriter.passes import Slots
from rewriter.passes.policy import Policy
from rewriter.policies.checks import check_choice
from rewriter.policies.checks import check_int


@dataclass(frozen=True)
class DynamicMask(Policy):
    """Each query sees the `keep` best keys of its prefix, by a trained score of each key's value (arXiv 2508.02124),
    and, beyond the paper, the last `local` keys.

        u[b, h, j] = softplus(W[h] . v[b, :, j]),   v: the values of all KV heads, before any rotation
        delta[b, h, j] = exp(A[h] * u)  ("exp"),    A[h] * u  ("log")

    The best by delta are kept, of equals the older; delta is also added to the kept logits, which is how `W` and `A`
    get gradients. Scores are fp32 whatever the model's dtype. A row that sees at most `keep` keys sees them all. The
    ranking restarts with each packed document and leaves padding out. A NaN score hides its key; exponents are cut at
    88, where exp still fits fp32.

    Two parameters per rewritten site. `W` begins as a normal random matrix with a variance of 1 / (Hkv * Dv), so that
    keys of different values have different scores, and `A` at 0.01, so that the bias, which hardly differs from key to
    key, leaves a pretrained model's weights among the kept keys as they were. (A = 0 would make all keys equal.)

    Args:
        keep: keys that a query sees, in each KV head.
        score: "exp", the paper's, or "log", which is milder: it multiplies a key's unnormalised weight by exp(A * u).
        seed: of the initial `W`.
        local: last keys that a query sees in any case, its own included; 0 is the paper's mask, in which a query may not
            see its own key. A score of the key alone knows nothing of distance, and text needs its neighbours.
        on_window: what to do with a site whose own mask is a window: "refuse", or "intersect": the best keys of the
            whole prefix, as far as the window shows them, fewer than `keep` then.

    Raises:
        PolicyError: a field is out of its range.
    """

    adds_parameters: ClassVar[bool] = True
    reads_site: ClassVar[bool] = True
    ranks_hidden_keys: ClassVar[bool] = True
    has_bias: ClassVar[bool] = True
    slot_fields: ClassVar[Mapping[str, torch.dtype]] = {"rank": torch.float32}

    keep: int = 1024
    score: str = "exp"
    seed: int = 0
    local: int = 0
    on_window: str = "refuse"

    def __post_init__(self) -> None:
        check_int(self, "keep", self.keep, 1)
        check_int(self, "seed", self.seed, 0)
        if self.seed >= 2**63:
            raise PolicyError(f"DynamicMask: seed must be below 2^63, got {self.seed}")
        check_int(self, "local", self.local, 0)
        check_choice(self, "score", self.score, ("exp", "log"))
        check_choice(self, "on_window", self.on_window, ("refuse", "intersect"))

    @property
    def needs_whole_segments(self) -> bool:  # type: ignore[override]
        return self.on_window == "refuse"

    def __str__(self) -> str:
        special = (f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default)
        return (
            f"DynamicMask({', '.join([f'keep={self.keep}', *(f'{f.name}={getattr(self, f.name)}' for f in special)])})"
        )

    def live_ranges(self, site: SiteTensors) -> tuple[LiveRanges, Tensor]:
        rank, bias = self.score_keys(site.value, site.parameters)
        return self.ranked_ranges(rank, site.segment), bias

    def extend(self, slots: Slots, site: SiteTensors) -> Extended:
        rank, bias = self.score_keys(site.value, site.parameters)
        rank, now = rank.float(), site.index[:, :, :1]
        # The best so far are the slots that end never; the others are there as local keys, and have lost.
        best = slots.alive & (slots.end == FOREVER)
        ranked = site.is_token & ~rank.isnan()
        if rank.size(2) == 1:
            slot_end, end = self._extend_by_one(slots, best, now, rank, ranked)
        else:
            several = torch.cat((best, ranked.expand(rank.shape)), dim=2).to(torch.int32)
            places = running_topk_ranges(
                torch.cat((slots.fields["rank"], rank), dim=2), min(self.keep, FOREVER), segment=several
            ).end
            num_slots = slots.index.size(2)
            end = torch.where(places == FOREVER, FOREVER, places - num_slots + now)
            slot_end, end = end[:, :, :num_slots], end[:, :, num_slots:]
        if self.local:
            slot_end = torch.maximum(slot_end, plus_window(slots.index, self.local))
            end = torch.maximum(end, plus_window(site.index, self.local))
        end = torch.where(ranked, end, 0)
        return Extended(torch.where(best, slot_end, slots.end), end, {"rank": rank}, bias=bias)

    def _extend_by_one(
        self, slots: Slots, best: Tensor, now: Tensor, rank: Tensor, ranked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The ends of slots and new key: one key meets the `keep` best so far; it, or the worst of them, leaves for good."""
        full = best.sum(dim=2, keepdim=True) >= self.keep
        scores = torch.where(best, slots.fields["rank"], math.inf)
        lowest = scores.amin(dim=2, keepdim=True)
        # Of equals the older wins: the newest of the worst is the one that leaves, and a newcomer must be better.
        worst = torch.where(best & (scores == lowest), slots.index, -1).argmax(dim=2, keepdim=True)
        wins = ranked & (~full | (rank > lowest))
        number = torch.arange(slots.index.size(2), device=now.device)
        slot_end = torch.where((number == worst) & wins & full, now, slots.end)
        return slot_end, torch.where(wins, FOREVER, now)

    def needs_order(self, decode: bool) -> bool:
        return not decode

    def pressure(self, max_length: int) -> int:
        return self.keep + self.local

    def ranked_ranges(self, rank: Tensor, segment: Tensor) -> LiveRanges:
        """The ranges of keys with these ranks.

        Args:
            rank: `[B, Hkv, K]`; a key whose rank is NaN is never seen.
            segment: int32 `[B|1, 1, K]`, see `SiteTensors`.
        """
        best = running_topk_ranges(rank, min(self.keep, FOREVER), segment=torch.where(rank.isnan(), 0, segment))
        # Both ranges begin at the key, so that their union is one.
        end = torch.maximum(best.end, plus_window(best.start, self.local)) if self.local else best.end
        return LiveRanges(best.start, torch.where(rank.isnan(), 0, end))

    def score_keys(self, value: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What keys are ranked by, `A * u`, and what is added to their logits, delta.

        Args:
            value: `[B, Hkv, K, Dv]`.
            parameters: `W` `[Hkv, Hkv * Dv]` and `A` `[Hkv]`.

        Returns:
            Two `[B, Hkv, K]` in fp32 (fp64 for fp64 values): the rank, NaN where a key is never seen, without a gradient;
            and the bias, finite.
        """
        dtype = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(value.device.type, enabled=False):
            flat = value.to(dtype).transpose(1, 2).flatten(2)
            z = torch.nn.functional.linear(flat, parameters["W"].to(dtype)).transpose(1, 2)
        rate = parameters["A"].to(dtype)[:, None]
        # Where a score is cut, its gradient is 0: what is not finite stays out of both directions.
        u = torch.nn.functional.softplus(z.nan_to_num(0.0, LARGEST_SCORE, -LARGEST_SCORE))
        log_delta = rate.nan_to_num(0.0, LARGEST_SCORE, -LARGEST_SCORE) * u
        rank = torch.where(z.isnan() | rate.isnan(), math.nan, log_delta.detach())
        if self.score == "exp":
            return rank, log_delta.clamp(max=LARGEST_EXPONENT).exp()
        return rank, log_delta.clamp(-LARGEST_SCORE, LARGEST_SCORE)

    def initial_parameters(self, layer: int, num_kv_heads: int, value_dim: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.seed + layer)
        inputs = num_kv_heads * value_dim
        weight = torch.randn(num_kv_heads, inputs, generator=random) / inputs**0.5
        return {"W": weight, "A": torch.full((num_kv_heads,), 0.01)}


LARGEST_EXPONENT = 88.0
"""exp of it is 1.7e38: it fits fp32 in natural units, and in the units of log2 that kernels use."""


LARGEST_SCORE = 1e30
"""Scores are cut to this: sums and products with finite gradients stay finite."""
