"""Which kernel computes a site: torch's own where a mask hides nothing that it does not skip by itself and it is faster, ours
elsewhere."""

from __future__ import annotations

import enum

import torch
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import flatten
from rewriter.passes.policy import Policy

CHOICES = ("auto", "live_range", "dense")
"""What a user may ask for: the fastest by what is known, or always live ranges, or always torch's own kernel."""

PORTABLE = "portable"
"""What an exporter asks for: torch's own kernel wherever a mask is its flag, since every runtime has one like it."""


class Kernel(enum.Enum):
    """What computes a site; the value is what a report says of it."""

    LIVE_RANGE = "live_range_attention"
    CAUSAL = "scaled_dot_product_attention, causal"
    FULL = "scaled_dot_product_attention, no mask"
    MASKED = "scaled_dot_product_attention, with a mask"
    GIVEN = "live_range_attention where the given mask is ranges, else scaled_dot_product_attention"

    def on(self, device_type: str) -> str:
        """Its name in a report."""
        ours = {"cpu": " (CPU)", "cuda": " (Triton)"} if self is Kernel.LIVE_RANGE else {}
        return self.value + ours.get(device_type, "")


def choose_kernel(choice: str, policy: Policy, site: AttentionSite, proof: MaskProof) -> Kernel | str:
    """The kernel of a site, or why there is none of the kind that was asked for.

    torch's kernel skips what lies above the diagonal, and costs nothing beside it: no ranges, no schedule. So on a GPU a site
    whose proven mask is exactly causal, or nothing, and of which a policy drops nothing, is computed by it. Where a mask holds
    more, padding, say, or a window, what is dead is known at run time only, and the operator of live ranges looks. On a CPU
    that operator is the faster one there, too (`bench/crossover.py`).

    Args:
        choice: one of `CHOICES`, or `PORTABLE`.
    """
    if proof.given:
        return Kernel.GIVEN if choice != "dense" else "whether its mask is ranges is found at the call"
    if choice == "live_range" or (choice in ("auto", PORTABLE) and not _drops_nothing(policy)):
        return Kernel.LIVE_RANGE
    unsupported = _reason_against_dense(policy, site, proof)
    plain = plain_kernel(site, proof)
    if unsupported is None and _drops_nothing(policy) and plain is not None:
        return Kernel.LIVE_RANGE if choice == "auto" and _is_slow_in_torch(site) else plain
    if choice != "dense":
        return Kernel.LIVE_RANGE
    return Kernel.MASKED if unsupported is None else unsupported


def _is_slow_in_torch(site: AttentionSite) -> bool:
    """Whether torch's kernel, causal or without a mask, is slower than live-range attention: on CPUs.

    Measured on one of AMD's, which has AVX-512's 16-bit products. AMX, which torch's kernel uses for 16-bit inputs, was not.
    """
    assert site.query is not None
    value = site.query.meta["val"]
    has_amx = value.dtype.itemsize < 4 and torch.cpu._is_amx_tile_supported()
    return value.device.type in ("cpu", "meta") and not has_amx


def plain_kernel(site: AttentionSite, proof: MaskProof) -> Kernel | None:
    """torch's kernel where a proven mask is what it has a flag for: causal, of as many queries as keys, or nothing at all."""
    assert site.query is not None and site.key is not None
    if proof.bias is not None or proof.others:
        return None
    starts = {start for start in flatten("max", proof.interval.start) if start != ZERO}
    if proof.interval.end != NEVER_ENDS or len(starts) > 1:
        return None
    if not starts:
        return Kernel.FULL
    terms = linear_terms(starts.pop()) or {}  # one may be written as j - 1 + 1
    is_own_row = {term: factor for term, factor in terms.items() if factor} == {Axis(KEY): 1}
    is_square = str(shape(site.query)[-2]) == str(shape(site.key)[-2])
    return Kernel.CAUSAL if is_square and is_own_row else None


def _reason_against_dense(policy: Policy, site: AttentionSite, proof: MaskProof) -> str | None:
    """Why `scaled_dot_product_attention` cannot compute a site, or would do so without a fused kernel."""
    assert site.query is not None and site.key is not None and site.value is not None
    if proof.others:
        return f"a mask of several ranges of each key ({proof.name}) is written for live ranges alone"
    if site.softcap is not None:
        return "scaled_dot_product_attention has no softcap"
    if site.sinks is not None:
        return "scaled_dot_product_attention has no sinks in its denominator"
    if policy.positions == "cache":
        return f"under {type(policy).__name__} positions are places in a cache, which a mask does not move"
    if shape(site.key)[-1] != shape(site.value)[-1]:
        return "scaled_dot_product_attention has no fused kernel for values of another width than keys"
    value = site.query.meta["val"]
    if (proof.bias is not None or policy.has_bias) and value.dtype.itemsize < 4:
        return f"scaled_dot_product_attention would round the key's bias to {value.dtype}"
    heads = [shape(node)[1] for node in (site.query, site.key) if len(shape(node)) == 4]
    if value.device.type == "cuda" and value.dtype == torch.float32 and len({str(size) for size in heads}) > 1:
        return "scaled_dot_product_attention has no fused kernel for grouped heads in fp32"
    return None


def _drops_nothing(policy: Policy) -> bool:
    return policy.is_lossless and not policy.has_bias
