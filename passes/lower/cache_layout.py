"""The layout of a cache: which tensors it has, of which sizes. `slots.py` decides it, `rewriter.generation.cache` makes them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

FREE = -1
"""The `index` of a slot without a key."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a cache.

    Attributes:
        name: what it is called within its table or site.
        shape: sizes; "B" for the rows of the batch, "C" for the slots.
        fill: its value in an empty cache.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    fill: int | float | bool

    def make(self, batch_size: int, capacity: int, device: torch.device | str | None) -> Tensor:
        sizes = [{"B": batch_size, "C": capacity}.get(s, s) if isinstance(s, str) else s for s in self.shape]
        return torch.full(sizes, self.fill, dtype=self.dtype, device=device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TableLayout:
    """The slots' ranges, shared by the sites that have the same.

    Attributes:
        policy: whose ranges they are.
        window: queries that see a key under the model's own mask, where that is a constant.
        sites: positions in `CacheLayout.sites`.
        state: in the order of the graphs' inputs.
    """

    policy: Any
    window: int | None
    sites: tuple[int, ...]
    state: tuple[StateTensor, ...]

    @property
    def num_heads(self) -> int:
        """Heads that have ranges of their own; 1 where all have the same."""
        return next(int(s.shape[1]) for s in self.state if s.name == "index")

    def capacity(self, max_length: int) -> int:
        """Slots that are never too few for a text of so many tokens."""
        pressure = min(max_length, self.policy.pressure(max_length))
        # Where several keys have the same position, a window shows them all.
        unbounded = self.window is None or self.policy.ranks_hidden_keys or self.policy.positions_repeat
        return pressure if unbounded else min(pressure, self.window)


@dataclass(frozen=True)
class SiteLayout:
    """The keys and values of one attention."""

    layer: int
    table: int
    state: tuple[StateTensor, ...]


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds; its tensors are the last inputs of the graphs: those of the tables, then those of the sites.

    Attributes:
        tables, sites: their layouts.
        graphs: which graphs the cache is for; a copy of a cache, or what was pickled, is for the same.
    """

    tables: tuple[TableLayout, ...]
    sites: tuple[SiteLayout, ...]
    graphs: str = field(default_factory=lambda: uuid.uuid4().hex)
