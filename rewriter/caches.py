"""The KV cache as a register file: keys of one attention in fixed slots, reused when a key's live range has ended."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.policies import DynamicMask

FREE = -1
"""The `index` of a slot that has never held a key."""


class CacheError(ValueError):
    """A cache cannot take what it was given; it is as it was before."""


class KeySlots:
    """The keys and values of one attention that may still be seen, in as many slots as ever live at once.

    A slot is free when its key's range has ended. All tensors are made once, and changed in place.

    Args:
        batch_size, num_kv_heads, capacity, head_dim, value_dim: sizes; the capacity is the policy's pressure.
        dtype, device: of keys and values.

    Attributes:
        key: `[B, Hkv, C, D]`.
        value: `[B, Hkv, C, Dv]`.
        index: int32 `[B, Hkv, C]`, the place of each slot's key in its row, or `FREE`.
        end: int32 `[B, Hkv, C]`, the first query that no longer sees it, as far as is known; 0 in a free slot.
        rank, bias: fp32 `[B, Hkv, C]`, what a policy ranks keys by, and what is added to their logits.
        length: keys taken so far, those forgotten included: the index of the next one.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, capacity)
        self.key = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
        self.index = torch.full(shape, FREE, dtype=torch.int32, device=device)
        self.end = torch.zeros(shape, dtype=torch.int32, device=device)
        self.rank = torch.zeros(shape, dtype=torch.float32, device=device)
        self.bias = torch.zeros(shape, dtype=torch.float32, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.key.size(2)

    def fill(self, key: Tensor, value: Tensor, live: LiveRanges, rank: Tensor, bias: Tensor) -> None:
        """Takes the keys of a whole prompt, of which those that a later query may see are kept.

        Args:
            key, value: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]`.
            live: ranges of these keys, as far as these keys decide them; the next query has index K.
            rank, bias: `[B, Hkv, K]`.

        Raises:
            CacheError: the slots hold keys already, or are fewer than the keys that live on.
        """
        if self.length:
            raise CacheError(f"the slots have taken {self.length} keys already; make new ones for another prompt")
        self._check(key, value, one=False)
        num_keys, shape = key.size(2), self.end.shape[:2]
        end = live.end.expand(*shape, num_keys)
        # A key whose range ends with the prompt is not seen by the next query.
        survives = end > num_keys
        most = int(survives.sum(dim=2).max()) if num_keys else 0
        if most > self.capacity:
            raise CacheError(
                f"{most} of the prompt's keys live on, and there are {self.capacity} slots; give more slots"
            )
        # The survivors first, in their order.
        chosen = survives.int().argsort(dim=2, descending=True, stable=True)[:, :, : self.capacity]
        kept = survives.gather(2, chosen)
        used = slice(0, chosen.size(2))
        self.key[:, :, used] = key.gather(2, _expanded(chosen, key))
        self.value[:, :, used] = value.gather(2, _expanded(chosen, value))
        self.index[:, :, used] = torch.where(kept, chosen, FREE).to(torch.int32)
        self.end[:, :, used] = torch.where(kept, end.gather(2, chosen), 0)
        self.rank[:, :, used] = rank.expand(*shape, num_keys).gather(2, chosen)
        self.bias[:, :, used] = bias.expand(*shape, num_keys).gather(2, chosen)
        self.length = num_keys

    def push(
        self, key: Tensor, value: Tensor, end: Tensor, rank: Tensor, bias: Tensor, *, ends: Tensor | None = None
    ) -> None:
        """Takes the next key of every row, in a slot whose key is dead; a key that nobody sees takes none.

        Args:
            key, value: `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`.
            end, rank, bias: `[B, Hkv, 1]`; the end is the first query that does not see it, its own index for none.
            ends: int32 `[B, Hkv, C]`, the ends of the keys in the slots where the new key changes them.

        Raises:
            CacheError: a row has no free slot, or the sizes are not the slots' own.
        """
        self._check(key, value, one=True)
        now = self.length
        free = (self.end if ends is None else ends) <= now
        seen = end > now
        slot = free.int().argmax(dim=2, keepdim=True)
        if bool((seen & ~free.gather(2, slot)).any()):
            raise CacheError(
                f"all {self.capacity} slots hold living keys at index {now}; the policy's pressure is higher"
            )
        if ends is not None:
            self.end.copy_(ends)
        for store, new in ((self.key, key), (self.value, value)):
            at = _expanded(slot, store)
            store.scatter_(2, at, torch.where(seen[..., None], new.to(store.dtype), store.gather(2, at)))
        own_index = torch.full_like(end, now)
        for store, new in ((self.index, own_index), (self.end, end), (self.rank, rank), (self.bias, bias)):
            store.scatter_(2, slot, torch.where(seen, new.to(store.dtype), store.gather(2, slot)))
        self.length = now + 1

    def _check(self, key: Tensor, value: Tensor, *, one: bool) -> None:
        for name, given, store in (("key", key, self.key), ("value", value, self.value)):
            sizes = (*store.shape[:2], 1 if one else key.size(2), store.size(3))
            if tuple(given.shape) != sizes:
                raise CacheError(
                    f"{name} is {list(given.shape)}, expected {list(sizes)}{' (one key at a time)' if one else ''}"
                )

    def attend(self, query: Tensor, *, scale: float | None = None, softcap: float | None = None) -> Tensor:
        """Attention of the last key's own query over the slots.

        Args:
            query: `[B, Hq, 1, D]`, of index `length - 1`.

        Returns:
            `[B, Hq, 1, Dv]`.
        """
        now = torch.full((1,), self.length - 1, dtype=torch.int32, device=query.device)
        live = LiveRanges(self.index, self.end)
        output = live_range_attention(
            query, self.key, self.value, live, query_index=now, bias=self.bias, scale=scale, softcap=softcap
        )
        assert isinstance(output, Tensor)
        return output


def dynamic_mask_slots(
    policy: DynamicMask, key: Tensor, value: Tensor, live: LiveRanges, rank: Tensor, bias: Tensor
) -> KeySlots:
    """The slots of one attention after a prompt: at most `keep + local` keys in each KV head.

    Args:
        key, value: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]` of the prompt.
        live: its ranges under the policy.
        rank, bias: `[B, Hkv, K]`, from `policy.score_keys`.
    """
    if policy.on_window != "refuse":
        raise CacheError("slots know no window of the model's own; give a policy with on_window='refuse'")
    capacity = policy.keep + policy.local
    slots = KeySlots(key.size(0), key.size(1), capacity, key.size(3), value.size(3), dtype=key.dtype, device=key.device)
    slots.fill(key, value, live, rank, bias)
    return slots


def push_dynamic_mask(
    slots: KeySlots, policy: DynamicMask, key: Tensor, value: Tensor, rank: Tensor, bias: Tensor
) -> None:
    """The next key of every row meets the `keep` best so far; it, or the worst of them, leaves for good.

    The best are the slots that end never. What leaves is seen on as one of the last `local` keys, if it is one.

    Args:
        key, value: `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`.
        rank, bias: `[B, Hkv, 1]`, from `policy.score_keys`.
    """
    rank = rank.float()  # as keys of a prompt are ranked
    now = slots.length
    best = slots.end == FOREVER
    full = best.sum(dim=2, keepdim=True) >= policy.keep
    ranked = torch.where(best, slots.rank, torch.inf)
    lowest = ranked.amin(dim=2, keepdim=True)
    # Of equals the older wins: the newest of the worst is the one that leaves, and a newcomer must be better.
    worst = torch.where(best & (ranked == lowest), slots.index, FREE).argmax(dim=2, keepdim=True)
    wins = ~rank.isnan() & (~full | (rank > lowest))
    leaves = slots.index.gather(2, worst) + policy.local
    ends = slots.end.scatter(2, worst, torch.where(wins & full, leaves.clamp(min=now), slots.end.gather(2, worst)))
    end = torch.where(wins, FOREVER, torch.where(rank.isnan(), now, now + policy.local))
    slots.push(key, value, end.to(torch.int32), rank, bias, ends=ends)


def _expanded(slot: Tensor, store: Tensor) -> Tensor:
    """Places `[B, Hkv, N]` as the index of a gather from or scatter to `[B, Hkv, C, D]`."""
    return slot[..., None].expand(*slot.shape, store.size(-1))
