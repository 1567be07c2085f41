"""`SeparatorMask`: SepLLM's mask, and its streaming cache (arXiv 2412.12094)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.errors import PolicyError
from rewriter.kernels import LiveRanges
from rewriter.kernels.separator_cache import CacheSizes
from rewriter.kernels.separator_cache import separator_cache_ends
from rewriter.passes import Extended
from rewriter.passes import SiteTensors
from rewriter.passes import Slots
from rewriter.passes.policy import NO_TOKEN
from rewriter.passes.policy import Policy
from rewriter.policies.checks import check_choice
from rewriter.policies.checks import check_int
from rewriter.policies.ranges import _windowed

PUNCTUATION = ".,?!;:\n\t"
"""Characters that separate segments of text; a space alone separates words, and is left out."""


@dataclass(frozen=True)
class SeparatorMask(Policy):
    """Separators and the first keys are never forgotten, others live for a window (SepLLM, arXiv 2412.12094, section 3).

    With `max_separators`, of those separators that have left the window only the newest are seen. With `capacity` too, it
    is the cache of the paper's section 4, four blocks: first keys, separators, what has left the window, the window. A key
    is forgotten only when the cache is full: after a query that has seen `capacity + 1` keys, all but the first keys, the
    newest separators and the window are dropped at once.

    Args:
        separators: token ids; found by `from_tokenizer`.
        initial: number of first keys that are never forgotten, counted from each row's first token that is not padding,
            and anew in each packed document.
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
            raise PolicyError(
                f"SeparatorMask: separators must be token ids, got {self.separators!r}; SeparatorMask.from_tokenizer(tokenizer) "
                "finds them"
            )
        ids = tuple(self.separators)
        if not ids:
            raise PolicyError(
                "SeparatorMask: separators is empty; give token ids, use SeparatorMask.from_tokenizer(tokenizer), "
                "or SlidingWindow(window, sinks) for no separators"
            )
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                hint = "; SeparatorMask.from_tokenizer(tokenizer) finds them" if isinstance(token, str) else ""
                raise PolicyError(f"SeparatorMask: separators must be token ids of at least 0, got {token!r}{hint}")
        object.__setattr__(self, "separators", tuple(sorted(set(ids))))  # the field itself, in one order
        check_int(self, "initial", self.initial, 0)
        check_int(self, "window", self.window, 1)
        check_choice(self, "positions", self.positions, ("text", "cache"))
        if self.max_separators is not None:
            check_int(self, "max_separators", self.max_separators, 0)
        if self.capacity is None:
            if self.positions == "cache":
                raise PolicyError(
                    'SeparatorMask: positions="cache" needs a capacity, the keys at which it is compacted'
                )
            return
        if self.max_separators is None:
            raise PolicyError("SeparatorMask: capacity needs max_separators, or separators alone would fill the cache")
        check_int(self, "capacity", self.capacity, self.most_carried)

    @property
    def per_key_ranges(self) -> bool:  # type: ignore[override]
        return self.max_separators is None

    @property
    def ranks_hidden_keys(self) -> bool:  # type: ignore[override]
        return self.max_separators is not None

    @property
    def slot_fields(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        """A separator's end depends on those after it, where their number is bounded."""
        return {} if self.max_separators is None else {"separator": torch.bool}

    @property
    def row_fields(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        return {} if self.capacity is None else {"due": torch.int32}

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
        if not hasattr(tokenizer, "get_vocab"):
            raise PolicyError(
                f"SeparatorMask.from_tokenizer: expected a tokenizer of transformers, got {tokenizer!r}; load it first: "
                "AutoTokenizer.from_pretrained(...)"
            )
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
        origin = site.origin.expand(separator.size(0), 1, -1)
        end, _ = separator_cache_ends(
            site.index.expand(separator.size(0), -1, -1).contiguous(),
            separator,
            origin,
            torch.full_like(origin[:, :, :1], -1),
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

    def needs_order(self, decode: bool) -> bool:
        return self.max_separators is not None

    def keeps_all(self, length: int) -> bool:
        return self.max_separators is None and self.window >= length

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
