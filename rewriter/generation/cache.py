"""The KV cache as a register file: keys in fixed slots, reused when a key's live range has ended.

`LiveRangeCache` is a transformers `Cache`, whatever the policy: the layout comes from the pass that lowered the model to
slots, and the graphs of that pass change it in place. What is here makes it, and does to it what generation asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.cache_utils import CacheLayerMixin

from rewriter.errors import CacheError
from rewriter.kernels import FOREVER
from rewriter.passes import CacheLayout
from rewriter.passes.lower.cache_layout import FREE
from rewriter.passes.lower.cache_layout import SiteLayout
from rewriter.passes.lower.cache_layout import StateTensor
from rewriter.passes.policy import NO_TOKEN


@dataclass(frozen=True)
class ExpectedCall:
    """A call that must come next: so many tokens at once, through a graph of the policy's own."""

    graph: str
    num_tokens: int


class LiveRangeCache(Cache):
    """Keys and values that may still be seen, in as many slots as ever live at once. Made by `OptimizedModel.new_cache`.

    All tensors are made at the first call, which decides the batch size, and changed in place from then on.

    Args:
        layout: of the model's graphs.
        max_length: tokens that a row may have in all, padding included; asked for where the policy forgets too little to bound
            the slots, and of no meaning elsewhere.
        device: of all tensors.
        grows: make room for more tokens than `max_length` when they come; a larger cache is another graph to compile.

    Attributes:
        length: tokens taken so far, those forgotten and those of padding included.
        capacities: slots of each table of ranges.
        last_ids: int64 `[B]`, the last token of each row; None where it is not known.
        is_broken: a call was interrupted in the middle; only `reset` helps.
        position_shift: int64 `[B, 1]`, added to the positions of what comes: after a context that was read in chunks. None for
            nothing.
        expected_call: the next call, where that must be a certain one; None for any.

    Raises:
        CacheError: `max_length` is left out, and a table has no bound of its own.
    """

    def __init__(
        self, layout: CacheLayout, max_length: int | None, device: torch.device, *, grows: bool = False
    ) -> None:
        unbounded = [t for t in layout.tables if t.capacity(FOREVER) == FOREVER]
        if max_length is None and unbounded:
            raise CacheError(
                f"under {unbounded[0].policy} every key may live on, so the cache needs a max_length: the tokens of a row, "
                "prompt and generated ones together"
            )
        if max_length is not None and max_length < 1:
            raise CacheError(f"max_length must be at least 1, got {max_length}")
        super().__init__(layers=[_Layer(self, number) for number in range(len(layout.sites))])
        self.layout = layout
        self.max_length = max_length if unbounded else None
        self.device = device
        self.grows = grows
        self.capacities = self._capacities()
        self.length = 0
        self.last_ids: Tensor | None = None
        self.is_broken = False
        self.position_shift: Tensor | None = None
        self.expected_call: ExpectedCall | None = None
        self.tables: list[dict[str, Tensor]] = []
        self.stores: list[dict[str, Tensor]] = []

    def _capacities(self) -> list[int]:
        bounds = [t.capacity(FOREVER) for t in self.layout.tables]
        return [self.max_length if b == FOREVER and self.max_length is not None else b for b in bounds]

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return self.stores[0]["key"].size(0) if self.stores else -1

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.state())

    def check_rows(self, batch_size: int) -> None:
        """Raises `CacheError` where the tensors are there, for another number of rows."""
        if self.stores and self.batch_size != batch_size:
            raise CacheError(
                f"the cache holds {self.batch_size} rows and the call has {batch_size}; a cache goes on with the rows it began "
                "with: make another with new_cache()"
            )

    def allocate(self, batch_size: int) -> None:
        """Makes the tensors for so many rows, if they are not there."""
        if not self.stores:
            self.tables = self._make_tables(batch_size)
            self.stores = [self._make_store(site, batch_size) for site in self.layout.sites]

    def _make_tables(self, batch_size: int) -> list[dict[str, Tensor]]:
        return [
            {s.name: s.make(batch_size, capacity, self.device) for s in table.state}
            for table, capacity in zip(self.layout.tables, self.capacities, strict=True)
        ]

    def _make_store(self, site: SiteLayout, batch_size: int) -> dict[str, Tensor]:
        return {s.name: s.make(batch_size, self.capacities[site.table], self.device) for s in site.state}

    def state(self) -> list[Tensor]:
        """All tensors, in the order of the graphs' inputs."""
        return [t for part in (*self.tables, *self.stores) for t in part.values()]

    def release(self) -> None:
        """Gives the tensors of an empty cache back; the next call decides the batch size anew."""
        self.tables, self.stores, self.last_ids, self.is_broken = [], [], None, False
        self.position_shift, self.expected_call = None, None

    def fill(
        self,
        length: int,
        tables: list[Mapping[str, Tensor]],
        sites: Iterable[tuple[list[Tensor], list[Tensor]]],
        shift: Tensor,
    ) -> None:
        """Puts keys that were computed elsewhere in the first `length` slots of an empty cache.

        Args:
            tables: of each table, by the names of its state: `[B, H|1, length]` of the keys; where `index` is negative there
                is none.
            sites: of each attention the keys and the values of each row, `[H, n, D]`, which go to the last n of these slots.
                They are taken one by one, so that what has been put here need not stay.
            shift: int64 `[B, 1]`, see `position_shift`.
        """
        self.make_room(length)
        batch_size = shift.size(0)
        self.tables = self._make_tables(batch_size)
        for table, given in zip(self.tables, tables, strict=True):
            for name, tensor in given.items():
                table[name][:, :, :length] = tensor
            table["length"].fill_(length)
            table["forgotten"].fill_(length)  # nothing before the end of the context can be cropped to
            table["origin"].fill_(0)
        self.stores = []
        for layout, (keys, values) in zip(self.layout.sites, sites, strict=True):
            store = self._make_store(layout, batch_size)
            for b, (key, value) in enumerate(zip(keys, values, strict=True)):
                store["key"][b, :, length - key.size(1) : length] = key
                store["value"][b, :, length - value.size(1) : length] = value
            self.stores.append(store)
        self.length, self.position_shift = length, shift

    def make_room(self, num_new: int) -> None:
        """Raises `CacheError` where so many more tokens do not fit and the cache does not grow, or it is broken."""
        self._check_whole()
        needed = self.length + num_new
        if self.max_length is not None and needed > self.max_length:
            if not self.grows:
                raise CacheError(
                    f"the cache has {self.length} of at most {self.max_length} tokens, and {num_new} more do not fit; make a "
                    "larger one with new_cache(max_length=...)"
                )
            self._grow(rounded_up(max(needed, 2 * self.max_length)))
        if needed >= NO_TOKEN:
            raise CacheError(f"a cache takes fewer than {NO_TOKEN} tokens, this one has {self.length}")

    def _grow(self, max_length: int) -> None:
        """More slots, free ones, after those that are there."""
        self.max_length = max_length
        self.capacities = self._capacities()
        if not self.stores:
            return
        old = self._parts()
        self.tables, self.stores = [], []
        self.allocate(old[0][0]["index"].size(0))
        for (before, states), (after, _) in zip(old, self._parts(), strict=True):
            for state in states:
                part = after[state.name]
                if "C" in state.shape:
                    part = part.narrow(state.shape.index("C"), 0, before[state.name].size(state.shape.index("C")))
                part.copy_(before[state.name])

    def living_keys(self, table: int = 0) -> Tensor:
        """How many slots hold a key that the next query sees: int64 `[B, H]`."""
        return (self.tables[table]["end"] > self.length).sum(dim=2)

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_length is None else self.max_length

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        for layout, table in zip(self.layout.tables, self.tables, strict=False):
            for state in layout.state:
                table[state.name].fill_(state.fill)
        self.length, self.last_ids, self.is_broken = 0, None, False
        self.position_shift, self.expected_call = None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self._check_rows(beam_idx)
        if beam_idx.numel() != self.batch_size:
            raise CacheError(f"beam_idx has {beam_idx.numel()} rows, the cache {self.batch_size}")
        for part, states in self._parts():
            for tensor in (part[state.name] for state in states if "B" in state.shape):
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order; they may repeat."""
        self._check_rows(indices)
        for part, states in self._parts():
            for state in states:
                if "B" in state.shape:
                    part[state.name] = part[state.name].index_select(0, indices.to(part[state.name].device))
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        self.last_ids = None if self.last_ids is None else self.last_ids[rows.to(self.last_ids.device)]
        self.position_shift = None if self.position_shift is None else self.position_shift[rows.to(self.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back.

        Args:
            tokens_to_remove: their number, as transformers has it: negative, or 0.

        Raises:
            CacheError: keys that would live again have been forgotten, or keys' ends depend on the tokens that would go.
        """
        if tokens_to_remove > 0:
            raise CacheError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        self._check_whole()
        length = self.length + tokens_to_remove
        if length < 0:
            raise CacheError(f"cannot remove {-tokens_to_remove} tokens, the cache has {self.length}")
        if tokens_to_remove == 0:
            return
        if length == 0:
            self.reset()
            return
        for layout, table in zip(self.layout.tables, self.tables, strict=True):
            if not layout.policy.per_key_ranges:
                raise CacheError(
                    f"under {layout.policy} keys make others leave, which cannot be taken back; only the whole cache can be "
                    "cropped"
                )
            ended = torch.where(table["end"] <= self.length, table["end"], 0).amax()
            shortest = max(int(table["forgotten"]), int(ended))
            if shortest > length:
                raise CacheError(
                    f"keys that {length} tokens would still see are forgotten; the cache can be cropped to {shortest} tokens and "
                    "more"
                )
        for table in self.tables:
            gone = table["index"] >= length
            table["end"].masked_fill_(gone, 0)
            table["index"].masked_fill_(gone, FREE)
            table["length"].fill_(length)
            table["origin"].masked_fill_(table["origin"] >= length, NO_TOKEN)
        self.length, self.last_ids = length, None

    def _check_whole(self) -> None:
        if self.is_broken:
            raise CacheError("a call was interrupted while it changed the cache, which holds half of it; reset() it")

    def _check_rows(self, rows: Tensor) -> None:
        self._check_whole()
        if not self.stores:
            raise CacheError("the cache is empty; there are no rows yet")
        if rows.dim() != 1 or rows.is_floating_point() or bool(((rows < 0) | (rows >= self.batch_size)).any()):
            raise CacheError(f"rows must be integers from 0 to {self.batch_size - 1}, got {rows.tolist()}")

    def _parts(self) -> list[tuple[dict[str, Tensor], tuple[StateTensor, ...]]]:
        """Each table and site: its tensors by name, and what they are."""
        states = (*(t.state for t in self.layout.tables), *(s.state for s in self.layout.sites))
        return list(zip((*self.tables, *self.stores), states, strict=True))

    def __repr__(self) -> str:
        return f"LiveRangeCache({self.length} tokens, slots {self.capacities}, {max(self.batch_size, 0)} rows)"


class _Layer(CacheLayerMixin):
    """One attention of a `LiveRangeCache`, as transformers sees it."""

    def __init__(self, cache: LiveRangeCache, number: int) -> None:
        super().__init__()
        self.cache, self.number = cache, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CacheError(_ONLY_REWRITTEN)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise CacheError(_ONLY_REWRITTEN)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise CacheError(_ONLY_REWRITTEN)

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.get_max_length()

    get_max_cache_shape = get_max_length


_ONLY_REWRITTEN = (
    "a LiveRangeCache is filled by the optimized model that made it; the original model needs a cache of transformers, such as "
    "DynamicCache"
)


def rounded_up(length: int) -> int:
    """A size for caches without a bound of their own, so that few sizes are compiled: at most a quarter more, from 1,024 on."""
    step = max(256, 1 << (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step
