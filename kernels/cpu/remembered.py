"""What was made of the same live ranges before: all layers of a model have them in common, and a backward has its forward's.

By the values of the tensors, not by which tensors they are: compiled code writes new values into the same tensor. To compare two
vectors of 4,096 numbers takes some microseconds; to make a schedule and its masks of them, a thousand.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from collections.abc import Sequence
from typing import Generic
from typing import TypeVar

import torch
from torch import Tensor

ENTRIES = 2
"""Models with windows at some layers alternate between two kinds of ranges."""

T = TypeVar("T")


class Remembered(Generic[T]):
    """The last results of a function of some plain values and some tensors. Threads may share it."""

    def __init__(self) -> None:
        self._known: list[tuple[Hashable, list[Tensor], T]] = []
        self._lock = threading.Lock()

    def find(self, values: Hashable, tensors: Sequence[Tensor]) -> T | None:
        """What was kept for equal values and equal tensors, not to be changed; None if nothing was."""
        with self._lock:
            known = self._known
        for own_values, own_tensors, result in known:
            if own_values == values and all(torch.equal(a, b) for a, b in zip(own_tensors, tensors, strict=True)):
                return result
        return None

    def keep(self, values: Hashable, tensors: Sequence[Tensor], result: T) -> None:
        with self._lock:
            self._known = [(values, [t.clone() for t in tensors], result), *self._known][:ENTRIES]

    def clear(self) -> None:
        with self._lock:
            self._known = []
