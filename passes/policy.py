"""What a policy sees and returns: the base of all policies."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any
from typing import ClassVar

import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from torch import Tensor

from rewriter.errors import PolicyError

if TYPE_CHECKING:
    from rewriter.passes.attention.site import AttentionSite
    from rewriter.passes.lower.slots import CachedLowering
    from rewriter.passes.masks.intervals import MaskProof
    from torch.fx import GraphModule


@dataclass(frozen=True)
class SiteTensors:
    """What a policy may look at, in plain torch operations; everything here is traced into the graph.

    Attributes:
        live: the model's own live ranges, from its proven mask.
        segment: int32 `[B|1, 1, K]`, the same for all keys of a document (of the row, where there are none) and rising
            from document to document; 0 for keys of padding.
        index: int32 `[1, 1, K]`, each key's place in its row, which is also its query's index; 0 .. K - 1 where no earlier
            keys are in a cache.
        origin: int32 `[B|1, 1, 1]`, the index of each row's first token that is not padding; where documents are packed,
            `[B|1, 1, K]`, the first token of each key's own document.
        input_ids: `[B, K]`, or None where the policy does not ask for them.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, K, D]`.
        value: `[B, Hkv, K, Dv]`.
        parameters: the policy's own trainable parameters at this site, by name.
    """

    live: LiveRanges
    segment: Tensor
    index: Tensor
    origin: Tensor
    input_ids: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_token(self) -> Tensor:
        """bool `[B|1, 1, K]`: the key is ever seen; false for padding."""
        return self.live.end > self.live.start

    @staticmethod
    def first_token(live: LiveRanges, index: Tensor) -> Tensor:
        """int32 `[B|1, 1, 1]`: the index of the first key that is ever seen, `NO_TOKEN` where there is none."""
        return torch.where(live.end > live.start, index, NO_TOKEN).amin(dim=(1, 2), keepdim=True)


NO_TOKEN = 2**30
"""The `origin` of a row that has held nothing but padding so far."""


@dataclass(frozen=True)
class Slots:
    """The keys of a cache when new ones come, as a policy sees them.

    Attributes:
        index: int32 `[B, H, C]`, H the KV heads or 1; negative in a slot without a living key.
        end: int32 `[B, H, C]`, the policy's end as far as it was known; `FOREVER` while it is not.
        fields: what the policy keeps of each key, by the names of its `slot_fields`, `[B, H, C]` each.
        rows: what it keeps of each row, by the names of its `row_fields`, `[B, 1, 1]` each.
    """

    index: Tensor
    end: Tensor
    fields: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    @property
    def alive(self) -> Tensor:
        return self.index >= 0


@dataclass(frozen=True)
class Extended:
    """What a policy makes of new keys that join those of a cache.

    Attributes:
        slot_end: int32 `[B|1, H|1, C]`, the ends of the keys in the slots; only earlier ones count.
        end: int32 `[B|1, H|1, K]`, the new keys' ends, `FOREVER` while not known.
        fields, rows: as in `Slots`, of the new keys, and after them.
        bias: `[B|1, H|1, K]` of the new keys, added to their logits; None for none.
        times: int32 `[B, 1, E]`, the queries after which keys are dropped; only where positions are cache-relative.
    """

    slot_end: Tensor
    end: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """Base of all policies.

    Attributes:
        needs_causal: refuse sites that are not proven causal.
        needs_input_ids: the ranges depend on token ids.
        needs_whole_segments: refuse sites whose own mask hides earlier keys of the same document, as a window does.
        adds_parameters: the policy has trainable parameters at each site, made by `initial_parameters`.
        reads_site: the ranges depend on query, key or value, and are computed for each site.
        per_key_ranges: `live_ranges` gives each key its range from that key alone (its `site.index`, its token, the row's
            `site.origin`) and from no other key, so that a cache can go on with new keys.
        ranks_hidden_keys: keys are ranked against each other, and one that the model's own mask hides is ranked, too.
        has_bias: `live_ranges` returns a bias, too.
        positions: "text": a token's position is its place in the text; "cache": its place among the keys that live.
        positions_repeat: several keys of a cache may have the same position.
        is_lossless: every key that the model itself sees is seen, so that a cache of another library serves as well.
        is_program: not one mask but a program of several calls, as `ChunkedEviction` is: one call of the model cannot apply it.
        keys_per_query_head: each query head keeps keys of its own, and a cache holds so many heads.
        slot_fields, row_fields: what `extend` wants a cache to keep of each key, and of each row (-1 at first).
    """

    needs_causal: ClassVar[bool] = True
    needs_input_ids: ClassVar[bool] = False
    needs_whole_segments: ClassVar[bool] = False
    adds_parameters: ClassVar[bool] = False
    reads_site: ClassVar[bool] = False
    per_key_ranges: ClassVar[bool] = False
    ranks_hidden_keys: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    positions = "text"  # not annotated: a field of SeparatorMask
    positions_repeat: ClassVar[bool] = False
    is_lossless: ClassVar[bool] = False
    is_program: ClassVar[bool] = False
    keys_per_query_head: ClassVar[bool] = False
    slot_fields: ClassVar[Mapping[str, torch.dtype]] = {}
    row_fields: ClassVar[Mapping[str, torch.dtype]] = {}

    known: ClassVar[dict[str, type[Policy]]] = {}
    """All policies by name, for `from_dict`; a class is entered when it is defined."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        Policy.known[cls.__name__] = cls

    def live_ranges(self, site: SiteTensors) -> LiveRanges | tuple[LiveRanges, Tensor] | None:
        """The policy's ranges, to be intersected with the model's own; None keeps the model's.

        Args:
            site: the site's tensors; `site.live` are the model's own ranges.

        Returns:
            The ranges, or the ranges and a bias `[B|1, Hkv|1, K]` that is added to the scaled logits.
        """
        raise NotImplementedError(f"{type(self).__name__} must define live_ranges(site)")

    def extend(self, slots: Slots, site: SiteTensors) -> Extended:
        """The recurrent form of `live_ranges`: what becomes of the keys of a cache, and of new ones that join them.

        Args:
            slots: the keys that live.
            site: tensors of the new keys, one or several; `site.index` goes on from the earlier ones.

        Raises:
            PolicyError: a key's end depends on other keys, and the policy has no recurrent form.
        """
        if not self.per_key_ranges:
            raise PolicyError(
                f"{type(self).__name__} does not say how its ranges go on from a cache; set per_key_ranges = True if live_ranges "
                "gives each key its range by its own site.index, or define extend(slots, site)"
            )
        extra = self.live_ranges(site)
        live, bias = extra if isinstance(extra, tuple) else (extra, None)
        end = torch.full_like(site.index, FOREVER) if live is None else live.end
        return Extended(torch.full_like(slots.end, FOREVER), end, bias=bias)

    def needs_order(self, decode: bool) -> bool:
        """Whether `extend` wants the slots oldest first, when one new key comes (`decode`), or several."""
        del decode
        return False

    def check_sites(self, num_sites: int) -> None:
        """Raises `PolicyError` where the policy names attention sites that a model with so many does not have."""
        del num_sites

    def reason_against(self, site: AttentionSite, proof: MaskProof) -> str | None:
        """Why the policy is not defined for a site whose mask is proven, beyond what the attributes say; None if it is."""
        del site, proof
        return None

    def own_graphs(self, lowered: CachedLowering) -> Mapping[str, GraphModule]:
        """Graphs of a model over a cache that this policy needs besides those for prefill and decoding, by name.

        Raises:
            NotCacheable: with the reason.
        """
        del lowered
        return {}

    def pressure(self, max_length: int) -> int:
        """The most keys alive at one query of a text of `max_length` tokens: the slots that a cache needs."""
        return max_length

    def keeps_all(self, length: int) -> bool:
        """Whether every key of a text of so many tokens lives to its end, so that tokens can be taken back."""
        del length
        return self.is_lossless

    def initial_parameters(self, layer: int, num_kv_heads: int, value_dim: int) -> dict[str, Tensor]:
        """The parameters of site number `layer`, in fp32 on the CPU, by the names that `site.parameters` has."""
        raise NotImplementedError(
            f"{type(self).__name__} must define initial_parameters(layer, num_kv_heads, value_dim)"
        )

    def for_layer(self, layer: int) -> Policy:
        """The policy of the attention site number `layer`, from 0 in the order of the model."""
        del layer
        return self

    @property
    def most_carried(self) -> int:
        """The most keys that are alive after a compaction; asked for where positions are cache-relative."""
        raise NotImplementedError(f"{type(self).__name__} must define most_carried")

    def parts(self) -> tuple[Policy, ...]:
        """The policies that sites may have under this one."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"policy": type(self).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Policy:
        """The policy that `to_dict` wrote.

        Raises:
            PolicyError: the name is not a policy, or its fields are not those of `data`.
        """
        name = data.get("policy")
        if name not in Policy.known:
            near = difflib.get_close_matches(str(name), Policy.known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PolicyError(f"{name!r} is not a policy; known are {', '.join(sorted(Policy.known))}{hint}")
        return Policy.known[name]._build({k: v for k, v in data.items() if k != "policy"})

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> Policy:
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        needed = [
            f.name
            for f in dataclasses.fields(cls)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise PolicyError(f"{cls.__name__} has no field {name!r}; it has {', '.join(known)}{hint}")
        for name in needed:
            if name not in fields:
                raise PolicyError(f"{cls.__name__} needs {name!r}; given are {', '.join(fields) or 'no fields'}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
