"""The step of one token as a CUDA graph: recorded once for a cache, and replayed for each further token.

One token of a model launches some ten kernels a layer, each of which is over sooner than the CPU can launch the next one.
Replayed as one graph they follow one another without the CPU (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import CacheError

Code = Callable[..., tuple[Tensor, ...]]


class RecordedStep:
    """Code that is recorded at the second call with the same weights and cache, and replayed while these stay where they are.

    The first call loads kernels, which cannot be recorded. A graph reads and writes the memory that it was recorded with: what
    differs from call to call is copied into it, and weights or a cache elsewhere make another graph. What is returned belongs to
    the caller; the next token does not overwrite it.

    Args:
        code: takes tensors on one CUDA device, and may write to those that are not `varying`; no value decides what it launches.
        varying: the places of the inputs that are others at each call.
    """

    def __init__(self, code: Code, varying: Collection[int]) -> None:
        self.code, self.varying = code, frozenset(varying)
        # Of the last call: what its inputs are, by identity where they are fixed; of the graph, if there is one: its memory.
        self._kinds: list[Any] = []
        self._fixed: dict[int, Callable[[], Tensor | None]] = {}
        self._replay: Callable[[], None] | None = None
        self._inputs: dict[int, Tensor] = {}
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        kinds = [_kind(t) if n in self.varying else _place(t) for n, t in enumerate(tensors)]
        is_known = kinds == self._kinds and all(own() is tensors[n] for n, own in self._fixed.items())
        if not is_known:
            self._forget()
            outputs = self.code(*tensors)
            # A cache that is no longer used takes the graph with it.
            fixed = (n for n in range(len(tensors)) if n not in self.varying)
            self._fixed = {n: weakref.ref(tensors[n], lambda _: self._forget()) for n in fixed}
            self._kinds = kinds
            return outputs
        if self._replay is None:
            self._record(tensors)
        assert self._replay is not None
        for n, own in self._inputs.items():
            own.copy_(tensors[n])
        self._replay()
        return tuple(output.clone() for output in self._outputs)

    def _record(self, tensors: Sequence[Tensor]) -> None:
        self._inputs = {n: tensors[n].clone() for n in self.varying}
        try:
            self._replay, self._outputs = record(self.code, [self._inputs.get(n, t) for n, t in enumerate(tensors)])
        except Exception as error:
            raise CacheError(
                f"the step of one token cannot be recorded as a CUDA graph: {type(error).__name__}: {error}; leave cuda_graphs "
                "out"
            ) from error

    def _forget(self) -> None:
        """Gives the graph's memory back."""
        self._kinds, self._fixed, self._replay, self._inputs, self._outputs = [], {}, None, {}, ()


def check_records(device: torch.device) -> None:
    """Raises `CacheError` where the device has no such graphs."""
    if device.type != "cuda":
        raise CacheError(
            f"cuda_graphs needs the model on a CUDA device, it is on {device}; move it there, or leave cuda_graphs out"
        )


def record(code: Code, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """The launches of a call, which is not run: a function that does them all, and the outputs that it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph):
        outputs = code(*inputs)
    return graph.replay, tuple(outputs)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.dtype)
