"""Policies: which keys live how long. Frozen dataclasses, validated when built.

A policy of your own is a frozen dataclass that derives from `Policy` and has one method, `live_ranges`, in plain
torch operations; set `needs_input_ids` or `reads_site` where it looks at them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.compaction import CacheSizes
from rewriter.kernels.compaction import separator_cache_ends
from rewriter.kernels.live_ranges import plus_window
from rewriter.passes import Extended
from rewriter.passes import PolicyError
from rewriter.passes import SiteTensors
from rewriter.passes import Slots
from rewriter.passes.apply_policy import NO_TOKEN

PUNCTUATION = ".,?!;:\n\t"
"""Characters that separate segments of text; a space alone separates words, and is left out."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies.

    Attributes:
        needs_causal: refuse sites that are not proven causal.
        needs_input_ids: the ranges depend on token ids.
        needs_whole_segments: refuse sites whose own mask hides earlier keys of the same document, as a window does.
        adds_parameters: the policy has trainable parameters at each site, made by `initial_parameters`.
        reads_site: the ranges depend on query, key or value, and are computed for each site.
        ends_alone: `live_ranges` gives each key its range from that key alone (its `site.index`, its token, the row's
            `site.origin`) and from no other key, so that a cache can go on with new keys.
        competes: keys compete with each other, and one that the model's own mask hides still takes part.
        has_bias: `live_ranges` returns a bias, too.
        positions: "text": a token's position is its place in the text; "cache": its place among the keys that live; "chunk":
            positions begin anew in each chunk.
        is_chunked: not a mask but a program of two phases, `ChunkedEviction`.
        group: "per_query_head" where each query head keeps keys of its own.
        slot_fields, row_fields: what `extend` wants a cache to keep of each key, and of each row (-1 at first).
    """

    needs_causal: ClassVar[bool] = True
    needs_input_ids: ClassVar[bool] = False
    needs_whole_segments: ClassVar[bool] = False
    adds_parameters: ClassVar[bool] = False
    reads_site: ClassVar[bool] = False
    ends_alone: ClassVar[bool] = False
    competes: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    positions = "text"  # not annotated: a field of SeparatorMask
    is_chunked: ClassVar[bool] = False
    group = "mean"  # a field of ChunkedEviction
    slot_fields: ClassVar[Mapping[str, torch.dtype]] = {}
    row_fields: ClassVar[Mapping[str, torch.dtype]] = {}

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
        if not self.ends_alone:
            raise PolicyError(
                f"{type(self).__name__} does not say how its ranges go on from a cache; set ends_alone = True if live_ranges "
                "gives each key its range by its own site.index, or define extend(slots, site)"
            )
        extra = self.live_ranges(site)
        live, bias = extra if isinstance(extra, tuple) else (extra, None)
        end = torch.full_like(site.index, FOREVER) if live is None else live.end
        return Extended(torch.full_like(slots.end, FOREVER), end, bias=bias)

    def needs_order(self, one: bool) -> bool:
        """Whether `extend` wants the slots oldest first, when one new key comes, or several."""
        del one
        return False

    def pressure(self, max_length: int) -> int:
        """The most keys alive at one query of a text of `max_length` tokens: the slots that a cache needs."""
        return max_length

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
        """The most keys that are alive after a compaction; asked for where positions are places in the cache."""
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
        known = {cls.__name__: cls for cls in _subclasses(Policy)}
        if name not in known:
            raise PolicyError(f"{name!r} is not a policy; known are {', '.join(sorted(known))}")
        return known[name]._build({k: v for k, v in data.items() if k != "policy"})

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> Policy:
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        except TypeError as error:
            raise PolicyError(f"{cls.__name__} cannot be built from {fields}: {error}") from error


@dataclass(frozen=True)
class Exact(Policy):
    """Lossless: each mask is replaced by its own live ranges."""

    needs_causal: ClassVar[bool] = False
    ends_alone: ClassVar[bool] = True

    def live_ranges(self, site: SiteTensors) -> None:
        return None


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """Each query sees the last `window` keys, its own included, and the first `sinks` keys (arXiv 2309.17453).

    Args:
        window: at least 1; as long as the sequence or longer, it changes nothing.
        sinks: number of first keys that are never forgotten, counted from each row's first token that is not padding.
    """

    ends_alone: ClassVar[bool] = True

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        check_int(self, "window", self.window, 1)
        check_int(self, "sinks", self.sinks, 0)

    def live_ranges(self, site: SiteTensors) -> LiveRanges:
        return _windowed(site, self.window, self.sinks, None)

    def pressure(self, max_length: int) -> int:
        return self.window + self.sinks


@dataclass(frozen=True)
class SeparatorMask(Policy):
    """Separators and the first keys are never forgotten, others live for a window (SepLLM, arXiv 2412.12094, section 3).

    With `max_separators`, of those separators that have left the window only the newest are seen. With `capacity` too, it
    is the cache of the paper's section 4, four blocks: first keys, separators, what has left the window, the window. A key
    is forgotten only when the cache is full: after a query that has seen `capacity + 1` keys, all but the first keys, the
    newest separators and the window are dropped at once.

    Args:
        separators: token ids; found by `from_tokenizer`.
        initial: number of first keys that are never forgotten, counted from each row's first token that is not padding.
        window: queries that see an ordinary key, its own included; with a capacity, at least so many.
        max_separators: separators kept beyond the window; None for all.
        capacity: keys of the cache; at least `initial + max_separators + window`.
        positions: "text": a token's position is its place in the text; "cache", with a capacity: its place in the cache, for
            streams longer than the model was trained for. Keys are then stored as they were before their rotation.
        names: what the separators look like, for printing; filled in by `from_tokenizer`.

    Raises:
        PolicyError: a field is out of its range, or does not fit the others.
    """

    needs_input_ids: ClassVar[bool] = True

    separators: tuple[int, ...]
    initial: int = 3
    window: int = 256
    max_separators: int | None = None
    capacity: int | None = None
    positions: str = "text"
    names: tuple[str, ...] = field(default=(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.separators, (str, bytes)) or not isinstance(self.separators, Iterable):
            raise PolicyError(f"SeparatorMask: separators must be token ids, got {self.separators!r}")
        ids = tuple(self.separators)
        if not ids:
            raise PolicyError(
                "SeparatorMask: separators is empty; give token ids, use SeparatorMask.from_tokenizer(tokenizer), "
                "or SlidingWindow(window, sinks) for no separators"
            )
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise PolicyError(f"SeparatorMask: separators must be token ids of at least 0, got {token!r}")
        object.__setattr__(self, "separators", tuple(sorted(set(ids))))
        check_int(self, "initial", self.initial, 0)
        check_int(self, "window", self.window, 1)
        check_choice(self, "positions", self.positions, ("text", "cache"))
        if self.max_separators is not None:
            check_int(self, "max_separators", self.max_separators, 0)
            # A separator's end depends on those after it.
            object.__setattr__(self, "slot_fields", {"separator": torch.bool})
        object.__setattr__(self, "ends_alone", self.max_separators is None)
        object.__setattr__(self, "competes", self.max_separators is not None)
        if self.capacity is None:
            if self.positions == "cache":
                raise PolicyError(
                    'SeparatorMask: positions="cache" needs a capacity, the keys at which it is compacted'
                )
            return
        if self.max_separators is None:
            raise PolicyError("SeparatorMask: capacity needs max_separators, or separators alone would fill the cache")
        check_int(self, "capacity", self.capacity, self.most_carried)
        object.__setattr__(self, "row_fields", {"due": torch.int32})

    @property
    def most_carried(self) -> int:
        """The most keys that a compaction keeps."""
        assert self.max_separators is not None
        return self.initial + self.max_separators + self.window

    def __str__(self) -> str:
        parts = [f"{len(self.separators)} separators", f"initial={self.initial}", f"window={self.window}"]
        special = ("max_separators", "capacity", "positions")
        parts += [f"{n}={getattr(self, n)}" for n in special if getattr(self, n) not in (None, "text")]
        return f"SeparatorMask({', '.join(parts)})"

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        *,
        initial: int = 3,
        window: int = 256,
        max_separators: int | None = None,
        capacity: int | None = None,
        positions: str = "text",
        characters: str = PUNCTUATION,
    ) -> SeparatorMask:
        """Finds every token that is made of separator characters, merged ones such as `."` or two newlines included.

        A token is a separator if it decodes to at least one of `characters` and otherwise only to white space, quotes
        and closing brackets. `names` lists what was chosen.

        Args:
            tokenizer: a transformers tokenizer.
            characters: what separates.

        Raises:
            PolicyError: no token is a separator.
        """
        special = set(tokenizer.all_special_ids)
        around = set(" \t\r\n\"'”’»)]}")
        chosen: dict[int, str] = {}
        for token in sorted(set(tokenizer.get_vocab().values())):
            text = "" if token in special else tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if any(c in characters for c in text) and all(c in characters or c in around for c in text):
                chosen[token] = text
        if not chosen:
            raise PolicyError(f"no token of this tokenizer is made of {characters!r}; give separators=... as token ids")
        names = tuple(chosen.values())
        return cls(tuple(chosen), initial, window, max_separators, capacity, positions, names=names)

    def live_ranges(self, site: SiteTensors) -> LiveRanges:
        assert site.input_ids is not None
        if self.max_separators is None:
            return _windowed(site, self.window, self.initial, _is_any(site.input_ids, self.separators))
        separator = self._is_separator(site)
        origin = site.origin.expand(separator.size(0), 1, 1)
        end, _ = separator_cache_ends(
            site.index.expand(separator.size(0), -1, -1).contiguous(),
            separator,
            origin,
            torch.full_like(origin, -1),
            site.index[0, 0, :1],
            site.index.size(2),
            self._sizes,
        )
        return LiveRanges(site.index, end)

    def extend(self, slots: Slots, site: SiteTensors) -> Extended:
        if self.max_separators is None:
            return super().extend(slots, site)
        separator = self._is_separator(site)
        num_batch, num_slots, num_new = slots.index.size(0), slots.index.size(2), site.index.size(2)
        due = slots.rows["due"] if self.capacity is not None else torch.full_like(site.origin, -1)
        end, times = separator_cache_ends(
            torch.cat((slots.index, site.index.expand(num_batch, 1, -1)), dim=2),
            torch.cat((slots.fields["separator"] & slots.alive, separator.expand(num_batch, 1, -1)), dim=2),
            site.origin,
            due.expand(num_batch, 1, 1),
            site.index[0, 0, :1],
            num_new,
            self._sizes,
        )
        rows = {}
        if times is not None:
            # A row of nothing but padding is not due yet.
            rows["due"] = torch.where(site.origin == NO_TOKEN, -1, times[:, :, -1:])
        return Extended(end[:, :, :num_slots], end[:, :, num_slots:], {"separator": separator}, rows, times=times)

    def needs_order(self, one: bool) -> bool:
        return self.max_separators is not None

    def pressure(self, max_length: int) -> int:
        if self.capacity is not None:
            return self.capacity + 1
        return max_length if self.max_separators is None else self.most_carried

    def _is_separator(self, site: SiteTensors) -> Tensor:
        assert site.input_ids is not None
        return _is_any(site.input_ids, self.separators)[:, None, :] & site.is_token

    @property
    def _sizes(self) -> CacheSizes:
        assert self.max_separators is not None
        return CacheSizes(self.initial, self.max_separators, self.window, self.capacity)


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

    needs_whole_segments: ClassVar[bool] = True
    adds_parameters: ClassVar[bool] = True
    reads_site: ClassVar[bool] = True
    competes: ClassVar[bool] = True
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
        object.__setattr__(self, "needs_whole_segments", self.on_window == "refuse")

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

    def needs_order(self, one: bool) -> bool:
        return not one

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


@dataclass(frozen=True)
class PerLayer(Policy):
    """A policy for each attention site, numbered from 0 in the order of the model.

    Args:
        layers: keys are numbers (`0`), ranges with both ends (`"1-8"`) or `"default"` (`Exact()` if left out).
    """

    needs_causal: ClassVar[bool] = False

    layers: Mapping[int | str, Policy]

    def __post_init__(self) -> None:
        by_layer: dict[int, Policy] = {}
        default: Policy = Exact()
        for key, policy in self.layers.items():
            if not isinstance(policy, Policy):
                raise PolicyError(f"PerLayer: the policy of {key!r} is {policy!r}, expected a policy such as Exact()")
            if isinstance(policy, PerLayer):
                raise PolicyError(f"PerLayer: the policy of {key!r} is itself a PerLayer")
            if policy.is_chunked:
                raise PolicyError(f"PerLayer: the policy of {key!r} is a program for the whole model, {policy}")
            if key == "default":
                default = policy
                continue
            for layer in layer_numbers(key):
                if layer in by_layer:
                    raise PolicyError(f"PerLayer: layer {layer} is named twice")
                by_layer[layer] = policy
        object.__setattr__(self, "adds_parameters", any(p.adds_parameters for p in self.layers.values()))
        object.__setattr__(self, "_by_layer", by_layer)
        object.__setattr__(self, "_default", default)

    def __hash__(self) -> int:
        return hash((tuple(sorted(self._by_layer.items(), key=lambda item: item[0])), self._default))

    def for_layer(self, layer: int) -> Policy:
        return self._by_layer.get(layer, self._default)

    def parts(self) -> tuple[Policy, ...]:
        return (*self._by_layer.values(), self._default)

    def to_dict(self) -> dict[str, Any]:
        return {"policy": "PerLayer", "layers": {str(k): p.to_dict() for k, p in self.layers.items()}}

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> PerLayer:
        layers = fields.get("layers", {})
        return cls({int(k) if str(k).isdigit() else k: Policy.from_dict(v) for k, v in layers.items()})

    _by_layer: dict[int, Policy] = field(init=False, repr=False, compare=False)
    _default: Policy = field(init=False, repr=False, compare=False)


def policy_ranges(policy: Policy, input_ids: Tensor) -> LiveRanges:
    """The ranges that a policy gives a plain causal site, for pictures, counts and references.

    Args:
        policy: one that does not look at query, key and value.
        input_ids: int64 `[B, K]`.
    """
    causal = LiveRanges.causal(input_ids.size(1), device=input_ids.device)
    if policy.reads_site:
        raise PolicyError(f"{type(policy).__name__} depends on a site's query, key and value; there is no site here")
    nothing = torch.empty(input_ids.size(0), 1, input_ids.size(1), 1, device=input_ids.device)
    origin = SiteTensors.first_token(causal, causal.start)
    site = SiteTensors(causal, torch.ones_like(causal.end), causal.start, origin, input_ids, nothing, nothing, nothing)
    extra = policy.live_ranges(site)
    if extra is None:
        return causal
    return causal & (extra[0] if isinstance(extra, tuple) else extra)


def _windowed(site: SiteTensors, window: int, first: int, forever: Tensor | None) -> LiveRanges:
    """Causal; a key lives for `window` queries, or for ever: the `first` keys of a row, and where `forever` says so.

    Args:
        forever: bool `[B, K]`.
    """
    kept = torch.zeros_like(site.index, dtype=torch.bool) if forever is None else forever[:, None, :]
    if first:
        # Rows are padded differently.
        kept = kept | ((site.index >= site.origin) & (site.index < site.origin + first))
    return LiveRanges(site.index, torch.where(kept, FOREVER, plus_window(site.index, window)))


def _is_any(input_ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Whether each id is one of `tokens`: runs of neighbouring ids are one comparison. bool, like `input_ids`."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and runs[-1][1] == token - 1:
            runs[-1][1] = token
        else:
            runs.append([token, token])
    result = torch.zeros_like(input_ids, dtype=torch.bool)
    for low, high in runs:
        result = result | ((input_ids >= low) & (input_ids <= high) if low < high else input_ids == low)
    return result


def layer_numbers(key: int | str, of: str = "PerLayer", examples: str = '3, "1-8" or "default"') -> Sequence[int]:
    """The attention sites that a user means by `3` or `"1-8"`.

    Raises:
        PolicyError: neither, in the words of the policy `of`.
    """
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return (key,)
    if isinstance(key, str):
        low, dash, high = key.partition("-")
        if low.isdigit() and (high.isdigit() if dash else True):
            first, last = int(low), int(high) if dash else int(low)
            if first <= last:
                return range(first, last + 1)
    raise PolicyError(f"{of}: {key!r} is not a layer; write {examples}")


def check_int(policy: object, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{type(policy).__name__}: {name} must be an integer of at least {least}, got {value!r}")


def check_choice(policy: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PolicyError(f"{type(policy).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")


def _subclasses(cls: type[Policy]) -> list[type[Policy]]:
    return [cls, *(s for sub in cls.__subclasses__() for s in _subclasses(sub))]
