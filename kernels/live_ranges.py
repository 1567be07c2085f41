"""Live ranges: for every attention key, the queries that see it.

    visible(i, j)  <=>  start[j] <= i < end[j]        start, end: int32 `[B|1, Hkv|1, K]`

Two vectors replace a `[Q, K]` mask. Everything here is plain torch on any device and can be traced; the validation
that reads values happens only in the constructors that a user calls, never inside a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FOREVER = 2**31 - 1
"""The `end` of a key that is never forgotten."""


@dataclass(frozen=True)
class LiveRanges:
    """When each key is alive.

    Args:
        start: int32 `[B|1, Hkv|1, K]`, index of the first query that sees the key.
        end: int32 `[B|1, Hkv|1, K]`, index of the first query that no longer sees it (`FOREVER`: never). A key whose
            `end <= start` is never visible.

    Raises:
        ValueError: the shapes are not rank 3 or do not broadcast to each other, or the dtype is not int32.
    """

    start: Tensor
    end: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("start", self.start), ("end", self.end)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"LiveRanges: {name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int32:
                raise ValueError(f"LiveRanges: {name} must be int32, got {tensor.dtype}; convert with .to(torch.int32)")
            if tensor.dim() != 3:
                raise ValueError(
                    f"LiveRanges: {name} must have shape [B|1, Hkv|1, K], got {list(tensor.shape)}; add dimensions of size 1"
                )
        if self.start.size(2) != self.end.size(2):
            raise ValueError(
                f"LiveRanges: start has {self.start.size(2)} keys and end has {self.end.size(2)}; both need one entry per key"
            )
        for dim, name in ((0, "batch rows"), (1, "KV heads")):
            if 1 not in (self.start.size(dim), self.end.size(dim)) and self.start.size(dim) != self.end.size(dim):
                raise ValueError(
                    f"LiveRanges: start has {self.start.size(dim)} {name} and end has {self.end.size(dim)}; "
                    "they must be equal, or one of them 1"
                )
        if self.start.device != self.end.device:
            raise ValueError(f"LiveRanges: start is on {self.start.device} and end on {self.end.device}")

    # Constructors: one per row of the table in the README.

    @classmethod
    def bidirectional(cls, num_keys: int, *, device: torch.device | str | None = None) -> LiveRanges:
        """Every query sees every key."""
        start = torch.zeros(1, 1, num_keys, dtype=torch.int32, device=device)
        return cls(start, torch.full_like(start, FOREVER))

    @classmethod
    def causal(cls, num_keys: int, *, device: torch.device | str | None = None) -> LiveRanges:
        """Key j is visible from query j on."""
        start = _arange(num_keys, device)
        return cls(start, torch.full_like(start, FOREVER))

    @classmethod
    def sliding_window(
        cls, num_keys: int, window: int, *, sinks: int = 0, device: torch.device | str | None = None
    ) -> LiveRanges:
        """Causal; a key lives for `window` queries, its own included; the first `sinks` keys live forever.

        With sinks this is the mask of StreamingLLM (arXiv 2309.17453).
        """
        _check_window(window, sinks, "sinks")
        start = _arange(num_keys, device)
        return cls(start, torch.where(start < sinks, FOREVER, plus_window(start, window)))

    @classmethod
    def separators(cls, is_separator: Tensor, *, window: int, initial: int = 0) -> LiveRanges:
        """The training and prefill mask of SepLLM (arXiv 2412.12094, section 3): separators are never forgotten.

        Args:
            is_separator: bool `[B, K]`.
            window: number of queries that see an ordinary key, its own included.
            initial: number of first keys that are never forgotten.
        """
        _check_window(window, initial, "initial")
        if is_separator.dtype != torch.bool or is_separator.dim() != 2:
            raise ValueError(
                f"is_separator must be bool [B, K], got {is_separator.dtype} {list(is_separator.shape)}; "
                "compute it with torch.isin(input_ids, separators)"
            )
        start = _arange(is_separator.size(1), is_separator.device)
        forever = is_separator[:, None, :] | (start < initial)
        return cls(start, torch.where(forever, FOREVER, plus_window(start, window)))

    @classmethod
    def documents(cls, document_ids: Tensor) -> LiveRanges:
        """Packed documents, bidirectional within each: key j is visible to the queries of its own document.

        Args:
            document_ids: integer `[B, K]`, non-decreasing along each row, so that a document is one run.
        """
        _check_sorted(document_ids)
        return cls(*document_ranges(document_ids))

    @classmethod
    def padding(cls, is_token: Tensor) -> LiveRanges:
        """Keys of padding are never visible, all others always.

        Args:
            is_token: bool `[B, K]`, or an attention mask of 0 and 1.
        """
        if is_token.dim() != 2:
            raise ValueError(f"is_token must be [B, K], got {list(is_token.shape)}")
        end = torch.where(is_token[:, None, :] != 0, FOREVER, 0).to(torch.int32)
        return cls(torch.zeros_like(end), end)

    @classmethod
    def prefix(cls, num_keys: int, prefix_lengths: Tensor) -> LiveRanges:
        """Prefix-LM: the first `prefix_lengths[b]` keys are visible to all queries, the others causally.

        Args:
            prefix_lengths: integer `[B]`.
        """
        if prefix_lengths.dim() != 1:
            raise ValueError(f"prefix_lengths must be [B], got {list(prefix_lengths.shape)}")
        index = _arange(num_keys, prefix_lengths.device)
        start = torch.where(index < prefix_lengths[:, None, None], 0, index).to(torch.int32)
        return cls(start, torch.full_like(index, FOREVER))

    def __and__(self, other: LiveRanges) -> LiveRanges:
        """Visible where both are: the maximum of the starts and the minimum of the ends."""
        if not isinstance(other, LiveRanges):
            return NotImplemented
        if self.num_keys != other.num_keys:
            raise ValueError(f"cannot intersect live ranges of {self.num_keys} and {other.num_keys} keys")
        return LiveRanges(torch.maximum(self.start, other.start), torch.minimum(self.end, other.end))

    @property
    def num_keys(self) -> int:
        return self.start.size(2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B|1, Hkv|1, K)` after broadcasting start and end."""
        return (
            max(self.start.size(0), self.end.size(0)),
            max(self.start.size(1), self.end.size(1)),
            self.num_keys,
        )

    def live_counts(self, query_index: Tensor | None = None) -> Tensor:
        """How many keys each query sees.

        Args:
            query_index: integer `[Q]` or `[B, Q]`; the keys' own indices when left out.

        Returns:
            int64 `[B|1, Hkv|1, Q]`.
        """
        start, end = (t.expand(self.shape) for t in (self.start, self.end))
        query = torch.arange(self.num_keys, device=start.device) if query_index is None else query_index
        query = query.to(torch.int32).view(-1, 1, query.size(-1)).expand(*_leading(query, self.shape), query.size(-1))
        # A key is alive at i when it has started and has not ended; keys that never live must not be counted twice.
        born = torch.where(end > start, start, FOREVER).sort(dim=-1).values
        dead = torch.where(end > start, end, FOREVER).sort(dim=-1).values
        leading = query.shape[:2]
        born, dead = (t.expand(*leading, self.num_keys).contiguous() for t in (born, dead))
        query = query.contiguous()
        return torch.searchsorted(born, query, right=True) - torch.searchsorted(dead, query, right=True)

    def pressure(self, query_index: Tensor | None = None) -> int:
        """The most keys alive at one query, over all rows and heads: the slots that a cache needs."""
        counts = self.live_counts(query_index)
        return int(counts.max()) if counts.numel() else 0

    def live_pairs(self, query_index: Tensor | None = None) -> int:
        """The number of visible (query, key) pairs, summed over the rows and heads of these ranges."""
        return int(self.live_counts(query_index).sum())

    def visible(self, query_index: Tensor) -> Tensor:
        """The dense mask, for references and pictures only.

        Args:
            query_index: integer `[Q]` or `[B, Q]`.

        Returns:
            bool `[B|1, Hkv|1, Q, K]`.
        """
        query = query_index.view(-1, 1, query_index.size(-1), 1)
        return (self.start[:, :, None, :] <= query) & (query < self.end[:, :, None, :])


def document_ranges(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of each key's run of equal ids. `document_ids` `[B, K]` is non-decreasing along each row."""
    ids = document_ids.contiguous()
    start = torch.searchsorted(ids, ids, right=False)
    end = torch.searchsorted(ids, ids, right=True)
    return start[:, None, :].to(torch.int32), end[:, None, :].to(torch.int32)


def _arange(num_keys: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(num_keys, dtype=torch.int32, device=device)[None, None, :]


def plus_window(start: Tensor, window: int) -> Tensor:
    """`start + window` without leaving int32, for starts below 2^30.

    The window is cut in Python, not by a clamp in the graph: Inductor (torch 2.13) folds some clamps of index ranges
    with a dynamic length to their bound, 2^31 - 1, and then no key would ever start.
    """
    return start + min(window, 2**30)


def _leading(query: Tensor, shape: tuple[int, int, int]) -> tuple[int, int]:
    rows = query.size(0) if query.dim() == 2 else 1
    return max(rows, shape[0]), shape[1]


def _check_window(window: int, first: int, name: str) -> None:
    if window < 1:
        raise ValueError(f"window must be at least 1 (a query sees its own key), got {window}")
    if first < 0:
        raise ValueError(f"{name} must not be negative, got {first}")


def _check_sorted(document_ids: Tensor) -> None:
    if document_ids.dim() != 2 or document_ids.is_floating_point():
        raise ValueError(f"document_ids must be integer [B, K], got {document_ids.dtype} {list(document_ids.shape)}")
    if bool((document_ids[:, 1:] < document_ids[:, :-1]).any()):
        raise ValueError(
            "document_ids must be non-decreasing along each row: a document is one run of keys; renumber the documents"
        )
